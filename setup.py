"""Package metadata and dependencies: `pip install -e .[test]` is all a clone needs."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "qdiff" / "__init__.py").read_text(encoding="utf8"))[1]


def shipped(folder: str) -> list[tuple[str, list[str]]]:
    """The files of a folder, for <prefix>/share/qdiff/<folder>, where `qdiff.utils.files.find_shipped` looks."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / folder).rglob("*.y*ml")) + sorted((ROOT / folder).rglob("*.txt")):
        where = path.relative_to(ROOT)
        found.setdefault(f"share/qdiff/{where.parent.as_posix()}", []).append(where.as_posix())
    return list(found.items())


setup(
    name="qdiff",
    version=VERSION,
    description="Post-training quantization of diffusion models: calibrate, compare, and run for real",
    long_description=(ROOT / "README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["qdiff", "qdiff.*", "ddim", "ddim.*", "ldm", "ldm.*"]),
    package_data={"qdiff.evaluation": ["report.css", "report.html.jinja", "report.js"]},
    data_files=shipped("configs"),
    entry_points={"console_scripts": ["qdiff = qdiff.cli.main:run"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.7",
        "torchvision",
        "numpy",
        "omegaconf",
        "pyyaml",
        "safetensors",
        "tqdm",
        "torch-fidelity>=0.4.0",
        "matplotlib",
        "jinja2",
        "pytorch-lightning>=2.6",
        "transformers>=4.40",
        "taming-transformers-rom1504",  # plain taming-transformers lacks VectorQuantizer2
        "einops",  # imported by taming, which does not ask for it
    ],
    extras_require={
        "onnx": ["onnx", "onnxruntime"],
        "diffusers": ["diffusers"],
        "tensorboard": ["tensorboard"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "onnx",
            "onnxruntime",
            "selenium",
            "tensorboard",
            "ruff~=0.17.5",
        ],
    },
)

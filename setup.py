"""Package metadata and dependencies: `pip install -e .[test]` is all a clone needs."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="qdiff",
    version="0.1.0",
    description="Post-training quantization of diffusion models: calibrate, compare, and run for real",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["qdiff", "qdiff.*", "ddim", "ddim.*", "ldm", "ldm.*"]),
    package_data={"qdiff.evaluation": ["report.css", "report.html.jinja", "report.js"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
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

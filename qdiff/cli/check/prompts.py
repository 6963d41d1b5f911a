"""How often the bundled CIFAR-10 classifier names the prompt's class in the images of runs of txt2img.py.

The first run is the one that the others are compared with: the float model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qdiff.cli.parser import make_parser
from qdiff.evaluation.images import open_images
from qdiff.evaluation.pairs import numbers_of
from qdiff.evaluation.prompts import prompt_accuracy
from qdiff.evaluation.runs import PROMPTS_NAME, read_run_prompts
from qdiff.evaluation.similarity import pooled_psnr_db, to_uint8
from qdiff.evaluation.table import markdown_table

BATCH = 250  # images read at once
COLUMNS = [
    ("run", "run", "s"),
    ("images", "images", "d"),
    ("accuracy", "prompt's class named", ".3f"),
    ("ratio", "of the first run's", ".3f"),
    ("psnr_db", "PSNR to the first run (dB)", ".2f"),
]


def parse_args(argv: Sequence[str] | None):
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders that txt2img.py wrote")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)


def read_run(folder: Path) -> tuple[Tensor, tuple[str, ...]]:
    """(images [N, 3, H, W] in [0, 1], their prompts). Raises FileNotFoundError or ValueError naming the folder."""
    prompts = read_run_prompts(folder)
    if prompts is None:
        raise FileNotFoundError(f"run {folder / PROMPTS_NAME}: no such file")
    images = open_images(folder)
    if len(images) != len(prompts):
        raise ValueError(f"{folder}: expected {len(prompts)} images, found {len(images)}; is the run finished?")
    if numbers_of(images.names) != tuple(range(len(images))):
        raise ValueError(f"{folder}: expected images with the numbers 0 to {len(images) - 1}, found others")
    return torch.cat(list(images.batches(BATCH))).float() / 255, prompts


def main(argv: Sequence[str] | None = None) -> None:
    rows, reference = [], None
    for folder in parse_args(argv).runs:
        images, prompts = read_run(folder)
        row = {"run": str(folder), "images": len(images), "accuracy": prompt_accuracy(to_uint8(images), prompts)}
        if reference is None:
            reference, first = images, row["accuracy"]
        elif images.shape == reference.shape:
            row["psnr_db"] = pooled_psnr_db(images, reference)
        rows.append(row | {"ratio": row["accuracy"] / first if first else None})
    print(markdown_table(rows, [column for column in COLUMNS if any(column[0] in row for row in rows)]))

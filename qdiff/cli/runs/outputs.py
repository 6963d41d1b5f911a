"""What a sampling run keeps of its images: their files, and features, of which statistics are made at the end."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qdiff.cli.parser import Options
from qdiff.cli.runs.sampling import missing_batches
from qdiff.evaluation.runs import IMAGES_IN, STATISTICS_NAME
from qdiff.utils.files import save_safetensors
from qdiff.utils.images import save_png
from qdiff.utils.team import Team

if TYPE_CHECKING:
    from qdiff.cli.runs.features import Features

logger = logging.getLogger(__name__)
NETWORKS = ("cifar10", "inception")
FOLDER = "features"


def add_kept_flags(parser: argparse.ArgumentParser) -> None:
    """--features, --inception, --no_images."""
    about = "Made while sampling, batch by batch, so that images need not be kept."
    group = parser.add_argument_group("statistics", about)
    networks = "keep the features of every image and write statistics.npz, for evaluate.py --reference and for FID"
    group.add_argument("--features", choices=NETWORKS, help=networks)
    group.add_argument("--inception", type=Path, metavar="FILE", help="Inception's weights (default: torch-fidelity's)")
    group.add_argument("--no_images", action="store_true", help="keep no images, their features alone")
    parser.set_defaults(skip_save=False)  # of txt2img alone


@dataclass(frozen=True)
class KeptOptions(Options):
    """What the flags of `add_kept_flags` say, under the flags' names; skip_save is of txt2img.py."""

    features: str | None = None
    inception: Path | None = None
    no_images: bool = False
    skip_save: bool = False


def check_kept_flags(options: KeptOptions, shape: Sequence[int]) -> None:
    """shape: (C, H, W) of an image. Raises ValueError naming the flag at fault."""
    if options.no_images and options.features is None:
        raise ValueError("--no_images: keeps nothing without --features")
    if options.inception is not None and options.features != "inception":
        raise ValueError("--inception: for --features inception")
    if options.features is not None:
        from qdiff.cli.runs.features import check_feature_flags

        check_feature_flags(options, shape)


def describe_kept(options: KeptOptions, folder: str) -> dict[str, Any]:
    """What a run is known by of it. folder: of the images within the run's, which tells readers where they lie."""
    where = {IMAGES_IN: None if options.no_images or options.skip_save else folder}
    return (
        where if options.features is None else {"features": options.features, "no_images": options.no_images, **where}
    )


@dataclass(frozen=True)
class Kept:
    """The files of a run: of images, by index, and of features, by batch."""

    options: KeptOptions
    folder: Path
    path_of: Callable[[int], Path]
    indices: tuple[range, ...]
    device: torch.device

    def features_of(self, batch: range) -> Path:
        """Where a batch's features lie."""
        return self.folder / FOLDER / f"{batch.start:07d}.safetensors"

    def files(self, batch: range) -> list[Path]:
        """All that is kept of a batch."""
        images = [] if self.options.no_images else [self.path_of(index) for index in batch]
        return images + [self.features_of(batch)] * (self.options.features is not None)

    def all_files(self) -> list[Path]:
        """Without which a run is unfinished."""
        statistics = [self.folder / STATISTICS_NAME] * (self.options.features is not None)
        return [path for batch in self.indices for path in self.files(batch)] + statistics

    def count(self) -> int:
        """Images that are there; where none are kept, those whose features are."""
        if self.options.no_images:
            return sum(len(batch) for batch in self.indices if self.features_of(batch).exists())
        return sum(self.path_of(index).exists() for batch in self.indices for index in batch)

    @property
    def place(self) -> Path:
        """Where to look."""
        return self.folder / FOLDER if self.options.no_images else self.path_of(0).parent

    def missing(self, team: Team) -> list[range]:
        """The batches of which something is not there yet; see `missing_batches`."""
        return missing_batches(self.indices, self.files, team)

    @cached_property
    def _features(self) -> Features:
        from qdiff.cli.runs.features import Features

        return Features(self.options, self.device)

    @torch.no_grad()
    def write(self, batch: range, images: Tensor) -> None:
        """images: [N, C, H, W] in [0, 1], of the batch's indices."""
        if not self.options.no_images:
            for index, image in zip(batch, images, strict=True):
                self.path_of(index).parent.mkdir(parents=True, exist_ok=True)
                save_png(image, self.path_of(index))
        if self.options.features is not None:
            save_safetensors({"features": self._features.of(images)}, self.features_of(batch), {})
        logger.info("images %d to %d", batch.start, batch.stop - 1)

    def finish(self) -> list[str]:
        """Write statistics.npz once all batches are there. Returns what there is to say about it."""
        if self.options.features is None:
            return []
        files = [self.features_of(batch) for batch in self.indices]
        return self._features.write_statistics(files, self.folder / STATISTICS_NAME)

"""The features that a sampling run keeps of its images, and the statistics that it makes of them.

A module of its own, imported for --features alone: torch-fidelity and torchvision double the time to the first image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics

from qdiff.cli.runs.outputs import KeptOptions
from qdiff.evaluation.extractors import CIFAR10, CIFAR10_LAYER, INCEPTION, POOLED, Extractor, found_weights
from qdiff.evaluation.features import IMAGE_SHAPE
from qdiff.evaluation.fidelity import Statistics, frechet_distance, load_train_statistics
from qdiff.evaluation.table import FD_NAME
from qdiff.utils.atomic import atomic

NETWORKS = {"cifar10": (CIFAR10, CIFAR10_LAYER), "inception": (INCEPTION, POOLED)}


def check_feature_flags(options: KeptOptions, shape: Sequence[int]) -> None:
    """As `qdiff.cli.runs.outputs.check_kept_flags`, with --features given."""
    if options.features == "cifar10" and tuple(shape) != IMAGE_SHAPE:
        raise ValueError(f"--features cifar10: takes images of {list(IMAGE_SHAPE)}, the model makes {list(shape)}")
    if _weights(options) is None:
        raise ValueError("--features inception: no weights found; give --inception FILE (docs/protocol.md)")
    if options.inception is not None and not options.inception.is_file():
        raise FileNotFoundError(f"--inception {options.inception}: no such file")


def _weights(options: KeptOptions) -> Path | None:
    return options.inception or found_weights(NETWORKS[options.features][0])


class Features:
    """Of one run: the network that makes them, loaded with the first images."""

    def __init__(self, options: KeptOptions, device: torch.device) -> None:
        self.options, self.device = options, device

    @cached_property
    def _network(self) -> nn.Module:
        name, layer = NETWORKS[self.options.features]
        return Extractor(name, (layer,), _weights(self.options), self.device).load()

    def of(self, images: Tensor) -> Tensor:
        """images: [N, C, H, W] in [0, 1]. Returns [N, features] float32."""
        pixels = images.float().mul(255).add(0.5).clamp(0, 255).to(self.device, torch.uint8)  # as in a PNG file
        (features,) = self._network(pixels)
        return features.float()

    def write_statistics(self, files: Sequence[Path], path: Path) -> list[str]:
        """Statistics of all features; files: of the batches, in order. Returns what there is to say about it."""
        features = torch.cat([load_file(file)["features"] for file in files])
        if len(features) < 2:
            return [f"{path.name}: not written, a covariance takes at least 2 images"]
        found = {key: np.float64(value) for key, value in fid_features_to_statistics(features).items()}
        with atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, mu=found["mu"], sigma=found["sigma"], n=len(features))
        said = [f"{path}: of {len(features)} images"]
        if self.options.features == "cifar10":
            own = Statistics(found["mu"], found["sigma"], len(features))
            said.append(f"{FD_NAME} to the training images: {frechet_distance(own, load_train_statistics()):.4f}")
        return said

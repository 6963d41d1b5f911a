"""Times of alternatives, measured once on a machine, so that `--runtime auto` decides alike in every run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from qdiff.checkpoints.native import digest_of, tensor_hash
from qdiff.utils.devices import device_name
from qdiff.utils.measurement_cache import MeasurementCache, cache_folder, hash_of_sources, milliseconds

DECISIVE = ("spec", "policy")  # attributes of modules that decide how fast they are


class RuntimeTimings:
    """Milliseconds, or other numbers, by name, in runtimes.json of the cache folder.

    They are kept under what was measured, the device and the versions.
    """

    def __init__(self, device: torch.device) -> None:
        versions = f"torch {torch.__version__}, qdiff {_sources_version()}"
        self._machine = f"{device_name(device)} | {versions}"
        self._measured = MeasurementCache(cache_folder() / "runtimes.json", milliseconds)

    def of(self, what: str, measure: Callable[[], dict[str, float]]) -> tuple[dict[str, float], bool]:
        """(numbers of the alternatives for `what`, whether they were known before)"""
        key = f"{self._machine} | {what}"
        known = self._measured.get(key)
        if known is not None:
            return known, True
        return self._measured.add(key, measure()), False


def sizes_of(arguments: tuple[Tensor, ...]) -> str:
    """The shapes of a call's arguments, in words."""
    return " ".join("x".join(map(str, x.shape)) for x in arguments)


def signature(network: nn.Module) -> str:
    """A hash of what a network's speed depends on: sizes and types of its tensors, the grids of its layers."""
    tensors = [f"{name} {tuple(x.shape)} {x.dtype}" for name, x in network.state_dict().items()]
    grids = [f"{name} {key} {getattr(m, key, None)}" for name, m in network.named_modules() for key in DECISIVE]
    return hashlib.sha256("\n".join([type(network).__name__, *tensors, *grids]).encode()).hexdigest()[:12]


def contents(network: nn.Module) -> str:
    """A hash of a network's parameters and buffers, values included."""
    return digest_of({name: tensor_hash(x) for name, x in network.state_dict().items()})[:16]


@cache
def _sources_version() -> str:
    package = Path(__file__).parents[1]  # but for cli/, which decides nothing about speed
    return hash_of_sources(sorted(set(package.rglob("*.py")) - set((package / "cli").rglob("*.py"))))

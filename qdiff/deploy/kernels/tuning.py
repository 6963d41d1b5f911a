"""Which tile sizes a kernel runs with: measured once per shape and device, then kept in a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from qdiff.utils.measurement_cache import MeasurementCache, cache_folder, hash_of_sources

LOGGER = logging.getLogger(__name__)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_FILES = ("product.py", "attention.py")  # what choices of tiles were measured with
WARMUP_MS, MEASURED_MS = 5, 20

Timer = Callable[[Callable[[], object]], float]  # runs a function several times, returns its time in milliseconds


@dataclass(frozen=True)
class Config:
    """Tile of a program and how it is compiled: rows, columns, inner dimension; warps; depth of the load pipeline.

    `block_k` counts bytes or values of the weight for products, value channels for attention.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3

    @classmethod
    def of(cls, **values: float) -> Config:
        """From a file's entries. Raises TypeError or ValueError for others."""
        return cls(**{name: int(value) for name, value in values.items()})

    @property
    def options(self) -> dict[str, int]:
        """What Triton's launcher takes by name."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class Tuner:
    """Chooses configurations by time and remembers them, in memory and in a JSON file."""

    def __init__(self, path: Path, device: str, timer: Timer | None) -> None:
        """path: the file; device: part of every key; timer: None takes every first candidate unmeasured."""
        self.device, self.timer = device, timer
        self._version = f"triton {triton.__version__}, kernels {_kernels_version()}"
        self._measured = MeasurementCache(path, Config.of)

    def choose(self, kernel: str, shape: Sequence[object], candidates: Sequence[Config], launch: Callable) -> Config:
        """The fastest candidate for launch(config), from memory or measured now.

        kernel, shape: what the choice is remembered under. Candidates that do not compile or ask for more shared
        memory than there is are passed over. Raises the last one's error where none runs.
        """
        key = " | ".join([self.device, self._version, kernel, " ".join(map(str, shape))])
        known = self._measured.get(key)
        if known is not None:
            return known
        if self.timer is None:
            return candidates[0]
        return self._measured.add(key, self._fastest(candidates, launch))

    def _fastest(self, candidates: Sequence[Config], launch: Callable) -> Config:
        times: dict[Config, float] = {}
        failure: Exception | None = None
        for config in candidates:
            try:
                times[config] = self.timer(lambda config=config: launch(config))
            except (TritonError, RuntimeError) as error:  # the compiler's passes raise plain RuntimeErrors
                failure = error
                LOGGER.debug("%s does not run: %s", config, error)
        if not times:
            raise failure
        return min(times, key=times.get)


def on_device(run: Callable[[], object]) -> float:
    """The timer of GPUs: median milliseconds of a run, the cache flushed in between."""
    return triton.testing.do_bench(run, warmup=WARMUP_MS, rep=MEASURED_MS, return_mode="median")


@cache
def _tuner(device: str) -> Tuner:
    path = cache_folder() / "kernels.json"
    return Tuner(path, device, on_device)


def tuned(kernel: str, shape: Sequence[object], candidates: Sequence[Config], launch: Callable, x: Tensor) -> None:
    """Run launch(config) with the best configuration for tensors like x; the first one where nothing can be timed:
    interpreted, or while a CUDA graph is captured."""
    if INTERPRETED:
        launch(candidates[0])
        return
    tuner = _tuner(torch.cuda.get_device_name(x.device))
    tuner.timer = None if torch.cuda.is_current_stream_capturing() else on_device
    with torch.cuda.device_of(x):
        launch(tuner.choose(kernel, shape, candidates, launch))


def fitting(candidates: Sequence[Config], rows: int, columns: int) -> list[Config]:
    """The candidates without tiles of which more than half would lie outside a product of that size."""
    found = [c for c in candidates if c.block_m < 2 * rows and c.block_n < 2 * columns]
    return found or list(candidates[-1:])


def bucket(count: int) -> int:
    """The power of two from `count` on: sizes that vary with the batch share a choice."""
    return triton.next_power_of_2(count)


@cache
def _kernels_version() -> str:
    return hash_of_sources(Path(__file__).parent / name for name in KERNEL_FILES)

"""Time that calls take, the device's queue drained: what the benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

SETTLING = 2  # untimed calls before a timed one: the first after another network takes 1.15 times what later ones do


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, the device's queue drained."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def in_turn(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each, taken in turn so that a change of load meets them all.

    Before each timed call there are others that are not, as in sampling, where a network follows itself: what the one
    before left in caches, and its threads that still wait for work, are not this one's time.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            for _ in range(SETTLING):
                run()
            times[name].append(1e3 * seconds_of(run, device))
    return {name: statistics.median(found) for name, found in times.items()}

"""Factors of a learning rate over the steps, for `torch.optim.lr_scheduler.LambdaLR`; published names and arguments."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)


def scheduled(optimizer: torch.optim.Optimizer, config: Mapping[str, Any] | None) -> Any:
    """What Lightning's `configure_optimizers` returns: the optimizer, with the factor that a configuration describes on
    its rate at each step, or without one."""
    if config is None:
        return optimizer
    factor = instantiate_from_config(config).schedule
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class LambdaWarmUpCosineScheduler:
    """Linear from `lr_start` to `lr_max` over `warm_up_steps`, then half a cosine down to `lr_min` at
    `max_decay_steps`, where it stays. All are factors of the optimizer's rate."""

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,  # log the factor every so many steps; 0: never
    ):
        self.warm_up_steps = warm_up_steps
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.lr_start = lr_start
        self.max_decay_steps = max_decay_steps
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int) -> float:
        """The factor at step n."""
        if n < self.warm_up_steps:
            factor = _between(self.lr_start, self.lr_max, n / self.warm_up_steps)
        else:
            length = max(self.max_decay_steps - self.warm_up_steps, 1)
            factor = _cosine(self.lr_max, self.lr_min, min((n - self.warm_up_steps) / length, 1.0))
        return _logged(n, factor, self.verbosity_interval)

    __call__ = schedule


class _Cycles(ABC):
    """One warm-up and one descent per cycle; every argument but the last has one entry per cycle.

    Step n belongs to the first cycle that ends at n or later; after the last one its final factor stays.
    Raises ValueError where the lengths differ, or where a warm-up is longer than its cycle.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],  # factor at the end of the cycle
        f_max: Sequence[float],  # after the warm-up
        f_start: Sequence[float],  # at the start of the cycle
        cycle_lengths: Sequence[int],  # in steps, the warm-up included
        verbosity_interval: int = 0,  # log the factor every so many steps; 0: never
    ):
        lists = {
            "warm_up_steps": warm_up_steps,
            "f_min": f_min,
            "f_max": f_max,
            "f_start": f_start,
            "cycle_lengths": cycle_lengths,
        }
        sizes = {name: len(values) for name, values in lists.items()}
        if len(set(sizes.values())) != 1 or not cycle_lengths:
            found = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"expected lists of one entry per cycle, found lengths {found}")
        for warm_up, length in zip(warm_up_steps, cycle_lengths, strict=True):
            if not 0 <= warm_up <= length or length < 1:
                raise ValueError(f"warm_up_steps: expected at most the cycle's {length} steps, found {warm_up}")
        for name, values in lists.items():
            setattr(self, name, list(values))
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int) -> float:
        """The factor at step n."""
        ends = list(accumulate(self.cycle_lengths))
        cycle = next((i for i, end in enumerate(ends) if n <= end), len(ends) - 1)
        length, warm_up = self.cycle_lengths[cycle], self.warm_up_steps[cycle]
        step = min(n - (ends[cycle] - length), length)
        if step < warm_up:
            factor = _between(self.f_start[cycle], self.f_max[cycle], step / warm_up)
        else:
            factor = self._descend(cycle, step)
        return _logged(n, factor, self.verbosity_interval)

    __call__ = schedule

    @abstractmethod
    def _descend(self, cycle: int, step: int) -> float:
        """The factor at a step of a cycle, counted from its start, that lies behind the warm-up."""


class LambdaWarmUpCosineScheduler2(_Cycles):
    """Cycles of a warm-up and half a cosine down to `f_min`."""

    def _descend(self, cycle: int, step: int) -> float:
        warm_up = self.warm_up_steps[cycle]
        length = max(self.cycle_lengths[cycle] - warm_up, 1)
        return _cosine(self.f_max[cycle], self.f_min[cycle], (step - warm_up) / length)


class LambdaLinearScheduler(_Cycles):
    """Cycles of a warm-up and a line towards `f_min` at the end of the cycle.

    The line starts from `f_max` at the start of the cycle, as published: after the warm-up the factor is already
    a little below `f_max`.
    """

    def _descend(self, cycle: int, step: int) -> float:
        return _between(self.f_max[cycle], self.f_min[cycle], step / self.cycle_lengths[cycle])


def _between(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


def _cosine(start: float, end: float, share: float) -> float:
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * share))


def _logged(n: int, factor: float, interval: int) -> float:
    if interval > 0 and n % interval == 0:
        logger.info("step %d: learning rate × %g", n, factor)
    return factor

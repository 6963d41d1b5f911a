"""Temporary modes and hooks, each added and removed in one place: restored on leaving the block, also on error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from qdiff.calibration.batch_noise import BatchNoise
from qdiff.nn.quantizers import ActQuantizer


@contextmanager
def training_mode(module: nn.Module, mode: bool) -> Iterator[None]:
    """Within the block the module and all inside are in train (True) or eval (False) mode."""
    former = {m: m.training for m in module.modules()}
    module.train(mode)
    try:
        yield
    finally:
        for m, training in former.items():
            m.training = training


@contextmanager
def recording_inputs(module: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the block, `take` is given the first argument of every call of the module."""
    handle = module.register_forward_pre_hook(lambda _, args: take(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recording_calls(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Yield a list that fills with the modules as they are called."""
    called: list[nn.Module] = []
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(lambda m, _: called.append(m)).remove)
        yield called


@contextmanager
def recording_outputs(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list that fills with the modules' outputs in the order of their calls."""
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(lambda _, args, out: outputs.append(out)).remove)
        yield outputs


@contextmanager
def observing(quantizers: Iterable[ActQuantizer], observer: Callable[[ActQuantizer, Tensor], None]) -> Iterator[None]:
    """Within the block each quantizer shows `observer` its inputs before it quantizes them."""
    quantizers = list(quantizers)
    for quantizer in quantizers:
        quantizer.observer = observer
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.observer = None


@contextmanager
def dropping(quantizers: Iterable[ActQuantizer], probability: float, noise: BatchNoise) -> Iterator[None]:
    """Within the block each element stays float with the given probability (QDrop, arXiv 2203.05740)."""
    quantizers = list(quantizers) if probability > 0 else []

    def drop(x: Tensor, snapped: Tensor) -> Tensor:
        return torch.where(noise.uniform(x) < probability, x, snapped)

    for quantizer in quantizers:
        quantizer.drop = drop
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.drop = None

"""Whether what may run in place of a network gives its numbers: one comparison on real inputs before it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qdiff.deploy.layers import IntegerAttention, IntegerLayer
from qdiff.nn.layers import QuantAttention, QuantLayer

LIMIT = "limit"
LEAST_LIMIT = 0.01  # relative RMS
NOISE_SHARE = 3.0  # of what the network's own answer changes by when every layer is nudged
NUDGE = 2.0**-19  # of a layer's RMS output; about what sums of a thousand float32 products in another order differ by
NUDGED = (QuantLayer, QuantAttention, IntegerLayer, IntegerAttention, nn.GroupNorm, nn.LayerNorm)


@torch.no_grad()
def distances(candidates: dict[str, nn.Module], arguments: tuple[Tensor, ...]) -> dict[str, float]:
    """How far each candidate's answer lies from the first one's, and under `LIMIT` how far it may.

    Distances are RMS differences over the RMS of the first candidate's answer. Sums in another order move codes across
    ties, and later layers amplify that, in some networks more than in others: the limit follows from what nudges of the
    first candidate's layers do, up in one run and down in another, so that one of them crosses every near tie.
    arguments: x, t and what else the network takes.
    """
    reference, *others = candidates
    expected = candidates[reference](*arguments)
    noise = []
    for sign in (1, -1):
        with _nudged_layers(candidates[reference], sign * NUDGE):
            noise.append(_distance(candidates[reference](*arguments), expected))
    limit = max(LEAST_LIMIT, NOISE_SHARE * max(noise))
    return {name: _distance(candidates[name](*arguments), expected) for name in others} | {LIMIT: limit}


@contextmanager
def _nudged_layers(network: nn.Module, size: float) -> Iterator[None]:
    """Within the block outputs of layers and norms are off by `size` times their RMS, up and down by a fixed draw."""
    generator = torch.Generator().manual_seed(0)

    def nudge(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        return output + size * output.square().mean().sqrt() * signs

    hooks = [module.register_forward_hook(nudge) for module in network.modules() if isinstance(module, NUDGED)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).double().norm() / expected.double().norm()).item()

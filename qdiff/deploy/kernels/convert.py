"""An integer network put on kernels: layers, attention products, and the norms that may write codes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdiff.deploy.layers import IntegerAttention, IntegerLayer
from qdiff.nn.family import Adapter

if TYPE_CHECKING:
    from qdiff.deploy.kernels.layers import KernelGrid
    from qdiff.nn.feeds import NormFeed

RUNS_FLOAT, RUNS_INTEGER = "float", "integer"


def check_triton() -> None:
    """Raise ValueError where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("integer kernels: need Triton, found none; it comes with PyTorch for Linux")


@torch.no_grad()
def to_kernels(
    network: nn.Module, adapter: Adapter, dtype: torch.dtype = torch.float16, choices: Mapping[str, str] | None = None
) -> nn.Module:
    """Put kernels into an integer network (`qdiff.deploy.convert.integer_network`), in place; return the network.

    It then computes in `dtype`, takes inputs in any float dtype and returns its prediction in that of x. Kernels run on
    GPUs. choices: "float" for layers and attention products, by dotted name, that are to run as plain ones in `dtype`
    with dequantized weights and no quantized input. Raises ValueError where there is no Triton.
    """
    check_triton()
    from qdiff.deploy.kernels.layers import KernelAttention, KernelLayer, PlainAttention, plain_layer

    choices = choices or {}
    for name, module in list(network.named_modules()):
        plain = choices.get(name) == RUNS_FLOAT
        if isinstance(module, IntegerLayer):
            layer = KernelLayer(module, dtype)
            network.set_submodule(name, plain_layer(layer) if plain else layer)
        elif isinstance(module, IntegerAttention):
            attention = KernelAttention(module, dtype)
            network.set_submodule(name, PlainAttention(attention) if plain else attention)
    for feed in adapter.norm_feeds(network):
        _fuse(network, feed)
    _cast_rest(network, dtype)
    # The first parameter, whose type samplers take for their states: these stay float32 whatever the network takes.
    network.placeholder = nn.Parameter(torch.empty(0, device=network.step_table.lookup.device), requires_grad=False)
    network.register_forward_hook(_as_input, with_kwargs=True)
    return network


def shared_grid(network: nn.Module, feed: NormFeed) -> KernelGrid | None:
    """The grid that all readers of a norm have; None where they differ, or one reads floats, or the norm is of a kind
    that writes no codes. Also of a network without kernels yet."""
    norm = network.get_submodule(feed.norm)
    if norm.weight is None or norm.bias is None or len(getattr(norm, "normalized_shape", (1,))) > 1:
        return None
    grids = [_input_grid(network.get_submodule(name)) for name in feed.layers]
    if any(grid is None for grid in grids) or not all(grids[0].same_as(grid) for grid in grids[1:]):
        return None
    return grids[0]


def _input_grid(layer: nn.Module) -> KernelGrid | None:
    """The one grid of a layer's input codes; None for a layer of float inputs or of two parts."""
    from qdiff.deploy.kernels.layers import KernelGrid, KernelLayer

    if not isinstance(layer, (IntegerLayer, KernelLayer)) or len(layer.parts) > 1:
        return None
    part = layer.parts[0]
    if isinstance(layer, KernelLayer):
        return part.grid
    return KernelGrid(part.input) if part.integer else None


def _fuse(network: nn.Module, feed: NormFeed) -> None:
    """Let the norm write codes, if its readers share a grid; a SiLU of its own becomes part of it."""
    from qdiff.deploy.kernels.layers import KernelNorm

    grid = shared_grid(network, feed)
    if grid is None:
        return
    network.set_submodule(feed.norm, KernelNorm(network.get_submodule(feed.norm), feed.silu, grid))
    if feed.activation is not None:
        network.set_submodule(feed.activation, nn.Identity())


def _cast_rest(network: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers to `dtype` but for those of kernels, whose scales stay float32."""
    from qdiff.deploy.kernels.layers import KernelAttention, KernelLayer, KernelNorm

    kept = {
        id(m) for own in network.modules() if isinstance(own, (KernelAttention, KernelLayer)) for m in own.modules()
    }
    kept |= {id(own.grid) for own in network.modules() if isinstance(own, KernelNorm)}
    for module in network.modules():
        if id(module) in kept:
            continue
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _as_input(network: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    x = args[0] if args else kwargs["x"]
    return output.to(x.dtype)

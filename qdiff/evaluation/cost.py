"""What a model takes: bytes, multiply-accumulates, and bit operations as the papers count them.

Bit operations of a layer are FLOPs x bits of the weights x bits of the activations, with two FLOPs for each
multiply-accumulate, and a float32 number counted as the 23 bits of its mantissa: that, with the attention products
counted as layers, gives the totals of Q-Diffusion's tables (docs/protocol.md has the derivation).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.families import Adapter
from qdiff.recipes.recipe import QuantSpec

FLOAT_BYTES = 4  # float32
FLOAT_BITS = 32
MANTISSA_BITS = 23  # what a float32 operand counts as
FLOPS_PER_MAC = 2
COUNTED = (nn.Conv1d, nn.Conv2d, nn.Linear)


def stored_bytes(path: Path | str) -> int:
    """Bytes of a file, or of all files in a folder and below. Raises FileNotFoundError where path is neither."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    raise FileNotFoundError(f"{path}: expected a file or a folder, found nothing")


def float_bytes(network: nn.Module) -> int:
    """4 bytes for each parameter of a float network, a shared one counted once; buffers are left out."""
    return FLOAT_BYTES * sum(parameter.numel() for parameter in network.parameters())


@dataclass(frozen=True)
class Product:
    """A layer, or one of the two attention products, at one evaluation of the network on one image.

    macs: its multiply-accumulates. weights, biases: its numbers of parameters, 0 for attention products. bits: of the
    two operands, weights before activations; attention has q and k, and softmax outputs and v.
    """

    name: str
    kind: str  # "conv", "linear" or "attention"
    macs: int
    weights: int = 0
    biases: int = 0
    bits: tuple[int, int] = (FLOAT_BITS, FLOAT_BITS)

    @property
    def bops(self) -> int:
        """Bit operations."""
        first, second = map(counted_bits, self.bits)
        return FLOPS_PER_MAC * self.macs * first * second

    @property
    def parameter_bytes(self) -> int:
        """Bytes of packed weights and float32 biases, scales left out."""
        return -(-self.weights * self.bits[0] // 8) + FLOAT_BYTES * self.biases


@dataclass(frozen=True)
class Cost:
    """A network's products in the order in which they first run, and the parameters that are in none of them."""

    products: tuple[Product, ...]
    other_parameters: int  # norms, embeddings of labels; float32

    @property
    def parameters(self) -> int:
        return self.other_parameters + sum(product.weights + product.biases for product in self.products)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of packed weights and float32 rest, scales left out."""
        return FLOAT_BYTES * self.other_parameters + sum(product.parameter_bytes for product in self.products)

    @property
    def macs(self) -> int:
        return sum(product.macs for product in self.products)

    @property
    def bops(self) -> int:
        """Bit operations at each product's own bits."""
        return sum(product.bops for product in self.products)

    def uniform_bops(self, weight_bits: int, act_bits: int) -> int:
        """Bit operations as the papers' tables have them: every product, attention's too, at the same two widths."""
        return FLOPS_PER_MAC * self.macs * counted_bits(weight_bits) * counted_bits(act_bits)


def counted_bits(bits: int) -> int:
    """The bits that an operand counts as: its own, or a mantissa's for float32."""
    return MANTISSA_BITS if bits == FLOAT_BITS else bits


@torch.no_grad()
def cost_of(network: nn.Module, adapter: Adapter, shape: tuple[int, ...], context: tuple[int, ...] = ()) -> Cost:
    """The cost of one evaluation for one image. network: float, quantized or integer, on any device, also meta.

    shape: (C, H, W) of x; context: of the conditioning of one image, () for labels or none. The multiply-accumulates
    are those of a float twin on the meta device, so nothing is computed; bits are those of the network's own layers.
    """
    with torch.device("meta"):
        twin = adapter.build(adapter.config_of(network))
        inputs = torch.empty(1, *shape), torch.zeros(1)
        seen = _conditioning(twin, adapter, context)
    macs: dict[str, int] = {}
    attention = adapter.attention_products(twin)
    hooks = [m.register_forward_hook(_counter(n, macs)) for n, m in twin.named_modules() if isinstance(m, COUNTED)]
    hooks += [m.register_forward_hook(_attention_counter(n, macs)) for n, m in attention.items()]
    twin(*inputs, **seen)
    for hook in hooks:
        hook.remove()
    products = tuple(_product(twin, network, name, count) for name, count in macs.items())
    inside = sum(product.weights + product.biases for product in products)
    return Cost(products, sum(parameter.numel() for parameter in twin.parameters()) - inside)


def _conditioning(twin: nn.Module, adapter: Adapter, context: tuple[int, ...]) -> dict[str, Tensor]:
    """What the network takes beside x and t: vectors of the given shape, or a label where it has classes."""
    if context:
        return adapter.conditioning(twin, torch.empty(1, *context))
    if getattr(twin, "label_emb", None) is not None:
        return {"y": torch.zeros(1, dtype=torch.long)}
    return {}


def _counter(name: str, macs: dict[str, int]) -> Any:
    """A hook that counts a layer's multiply-accumulates: each output value takes one row of the weights."""

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        macs[name] = macs.get(name, 0) + output.numel() * layer.weight[0].numel()

    return count


def _attention_counter(name: str, macs: dict[str, int]) -> Any:
    """A hook that counts the two products of q [..., L, d], k [..., S, d] and v [..., S, e]."""

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        q, k, v = inputs[:3]
        scores = q.shape[:-1].numel() * k.shape[-2]
        for product, depth in (("q·k", q.shape[-1]), ("softmax·v", v.shape[-1])):
            macs[f"{name}.{product}"] = macs.get(f"{name}.{product}", 0) + scores * depth

    return count


def _product(twin: nn.Module, network: nn.Module, name: str, macs: int) -> Product:
    owner, _, operand = name.rpartition(".")
    if operand in ("q·k", "softmax·v"):
        operands = ("q", "k") if operand == "q·k" else ("w", "v")
        module = network.get_submodule(owner)
        return Product(name, "attention", macs, bits=tuple(_operand_bits(module, each) for each in operands))
    layer = twin.get_submodule(name)
    biases = 0 if layer.bias is None else layer.bias.numel()
    kind = "linear" if isinstance(layer, nn.Linear) else "conv"
    return Product(name, kind, macs, layer.weight.numel(), biases, _layer_bits(network.get_submodule(name)))


def _layer_bits(layer: nn.Module) -> tuple[int, int]:
    """(bits of weights, bits of activations) of a float, quantized or integer layer."""
    parts = getattr(layer, "parts", None)
    if parts is not None:
        return _most(part.spec for part in parts), _most(part.input and part.input.spec for part in parts)
    weights = [quantizer.spec for quantizer in getattr(layer, "weight_quantizers", ())]
    activations = [quantizer.spec for quantizer in getattr(layer, "act_quantizers", ())]
    return _most(weights), _most(activations)


def _operand_bits(module: nn.Module, operand: str) -> int:
    """Bits of an operand of an attention module, float32 where it has no grid."""
    for name in (f"act_quantizer_{operand}", operand):
        spec = getattr(getattr(module, name, None), "spec", None)
        if spec is not None:
            return spec.bits
    return FLOAT_BITS


def _most(specs: Iterable[QuantSpec | None]) -> int:
    """The bits of a layer's parts, which one recipe gives the same; float32 without a grid."""
    return max((FLOAT_BITS if spec is None else spec.bits for spec in specs), default=FLOAT_BITS)

"""Q-Diffusion's calibrated checkpoint, `ckpt.pth`, in and out.

A state dict under `model.` in which each layer has its original weight, and per weight part delta, zero_point and
AdaRound's alpha: the code is clip(floor(w / delta) + [alpha >= 0] + z, 0, 2^b - 1). The file does not say its bit
widths or grids; what can be derived from it is checked against what the caller expects. Files written here carry
their recipe in the state dict's `_metadata`, which the original code ignores.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qdiff.checkpoints.native import require_calibrated
from qdiff.nn.family import Adapter
from qdiff.nn.grid import Grid
from qdiff.nn.layers import QuantLayer, act_quantizers, quant_layers
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.recipe import QuantSpec, Recipe, softmax_spec
from qdiff.utils.errors import FieldError
from qdiff.utils.files import load_pickle, parse_json, save_pickle

PREFIX = "model."
RECIPE_KEY = "qdiff_recipe"


class Published:
    """A published checkpoint's tensors, `model.` stripped, and what can be derived from them."""

    def __init__(self, path: str | Path) -> None:
        """Raises FileNotFoundError, or ValueError naming the file and what it is instead."""
        self.path = Path(path)
        content = load_pickle(path, "Q-Diffusion checkpoint")
        tensors = content if isinstance(content, dict) else {}
        self.state = {k[len(PREFIX) :]: v for k, v in tensors.items() if k.startswith(PREFIX) and torch.is_tensor(v)}
        if not any(key.endswith("weight_quantizer.delta") for key in self.state):
            found = f"{len(tensors)} entries such as {next(iter(tensors))!r}" if tensors else type(content).__name__
            raise ValueError(
                f"{path}: expected a Q-Diffusion checkpoint (model.<layer>.weight_quantizer.delta, ...), found {found}"
            )
        self._check_numbers()
        self._check_weights()
        try:
            about = getattr(content, "_metadata", {}).get("", {}).get(RECIPE_KEY)
            self.recipe = None if about is None else Recipe.from_dict(parse_json(about))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the recipe it brings cannot be read: {error}") from error

    def _check_numbers(self) -> None:
        """Raise ValueError naming a tensor with numbers that are not finite or no floating-point numbers, or a scale
        that is not positive. Zero points may be integers."""
        for key, value in self.state.items():
            if value.numel() == 0 or (not value.is_floating_point() and key.endswith(".zero_point")):
                continue
            if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                found = str(value.dtype).removeprefix("torch.")
                raise ValueError(f"{self.path}: {key}: expected floating-point numbers, found {found}")
            low, high = value.aminmax()
            if not (low.isfinite() and high.isfinite()):
                raise ValueError(
                    f"{self.path}: {key}: expected finite numbers, found {low.item():g} to {high.item():g}"
                )
            if key.endswith(".delta") and not low > 0:
                raise ValueError(f"{self.path}: {key}: expected scales above 0, found {low.item():g}")

    def _check_weights(self) -> None:
        """Raise ValueError naming the first tensor of a weight that is missing or does not fit the others."""
        for layer, part in self._parts():
            keys = [f"{layer}.weight", *(f"{layer}.{part}.{end}" for end in ("delta", "zero_point", "alpha"))]
            for key in keys:
                if key not in self.state:
                    raise ValueError(f"{self.path}: expected a Q-Diffusion checkpoint, but {key} is missing")
            weight, alpha = self._part(layer, part)
            grid = [weight.shape[0], *[1] * (weight.dim() - 1)]
            for key, shape in zip(keys[1:], (grid, grid, list(weight.shape)), strict=True):
                if list(self.state[key].shape) != shape:
                    found = list(self.state[key].shape)
                    raise ValueError(f"{self.path}: expected {key} of shape {shape}, found {found}")

    @property
    def split(self) -> bool:
        """Whether shortcuts have two quantizers."""
        return any(".weight_quantizer_0." in key for key in self.state)

    @property
    def has_activations(self) -> bool:
        """Whether activations were calibrated."""
        return any(re.search(r"act_quantizer(_\w)?\.delta$", key) for key in self.state)

    @property
    def symmetric(self) -> bool:
        """Whether every activation's zero point but the softmax's is 0."""
        zeros = [v for k, v in self.state.items() if re.search(r"act_quantizer(_[0qkv])?\.zero_point$", k)]
        return all(bool((torch.as_tensor(zero) == 0).all()) for zero in zeros)

    def weight_bits(self) -> range:
        """The weight widths that the codes allow; just the true one for files that bring their recipe.

        A channel's codes, before they are clipped, span 2^b - 1 steps, or more where the range search narrowed the
        grid; the median channel is narrowed by less than half for 4 bits and more.
        """
        if self.recipe is not None:
            return range(self.recipe.weights.bits, self.recipe.weights.bits + 1)
        spans, zeros = [], []
        for layer, part in self._parts():
            weight, alpha = self._part(layer, part)
            codes = (torch.floor(weight / self.state[f"{layer}.{part}.delta"]) + (alpha >= 0)).flatten(1)
            spans.append(codes.amax(1) - codes.amin(1))
            zeros.append(self.state[f"{layer}.{part}.zero_point"].max())
        largest = int((torch.cat(spans).median() + 1.5).log2())
        smallest = max(2, largest - 1, int(max(zeros)).bit_length())
        return range(smallest, max(smallest, largest) + 1)

    def _parts(self) -> list[tuple[str, str]]:
        """(layer, "weight_quantizer" or "weight_quantizer_0") of every weight part."""
        keys = [key for key in self.state if re.search(r"weight_quantizer(_0)?\.delta$", key)]
        return [tuple(key.removesuffix(".delta").rsplit(".", 1)) for key in keys]

    def _part(self, layer: str, part: str) -> tuple[Tensor, Tensor]:
        """(weight, alpha) of one weight part."""
        alpha = self.state[f"{layer}.{part}.alpha"]
        weight = self.state[f"{layer}.weight"]
        width = alpha.shape[1]
        return (weight[:, -width:] if part.endswith("_0") else weight[:, :width]), alpha


def check_recipe(published: Published, recipe: Recipe, activations: bool) -> None:
    """Raise FieldError, naming the option and the file, where a recipe contradicts what the file shows."""
    path = published.path
    if recipe.split_shortcuts != published.split:
        has = "split shortcuts" if published.split else "none"
        raise _contradiction("split", recipe.split_shortcuts, path, has)
    if recipe.weights.bits not in (bits := published.weight_bits()):
        wrong = f" {recipe.weights.bits}: contradicts {path}, whose codes have {bits[-1]} bits"
        raise FieldError("weight_bits", wrong)
    if not activations:
        return
    if not published.has_activations:
        raise FieldError("act_bits", f": contradicts {path}, which holds no activation quantizers")
    symmetric = recipe.activations.kind == "signed"
    if symmetric != published.symmetric:
        has = "symmetric activations" if published.symmetric else "activations with non-zero zero points"
        raise _contradiction("act_symmetric", symmetric, path, has)


def _contradiction(field: str, given: bool, path: Path, has: str) -> FieldError:
    return FieldError(field, f"{'' if given else ' left out'}: contradicts {path}, which has {has}")


def published_recipe(
    weight_bits: int,
    act_bits: int | None,
    symmetric: bool,
    softmax_bits: int,
    split: bool,
    adapter: Adapter,
    network: nn.Module,
) -> Recipe:
    """The structure that a checkpoint of the original code has, for flags that the file does not hold.

    network: the float network, whose kind of attention decides how the original quantizes softmax outputs.
    """
    kind = "signed" if symmetric else "affine"
    activations = None if act_bits is None else QuantSpec(act_bits, kind)
    softmax = None if act_bits is None else QuantSpec(softmax_bits, adapter.published_softmax_kind(network, kind))
    weights = QuantSpec(weight_bits, "affine", "out_channel")
    compat = ("symmetric_softmax",) if softmax is not None and softmax.kind != "unsigned" else ()
    return Recipe("published", weights, activations, softmax, split, compat=compat)


def load_published(path: str | Path, network: nn.Module, adapter: Adapter, recipe: Recipe) -> tuple[nn.Module, Recipe]:
    """Put quantizers into a float network and fill them from a ckpt.pth; with no activations in the recipe those of
    the file are ignored. Codes are computed in the network's dtype, float32 for those of the original code.

    A file written by this toolkit brings its own recipe, of which `recipe` says only whether activations are used.
    Returns (network, recipe). Raises ValueError naming the file, what was expected and what was found.
    """
    published = Published(path)
    check_recipe(published, recipe, recipe.activations is not None)
    if published.recipe is not None:
        own = published.recipe
        recipe = own if recipe.activations is not None else replace(own, activations=None, softmax=None)
    insert_quantizers(network, recipe, adapter)
    state = dict(published.state)
    try:
        for name, layer in quant_layers(network).items():
            _fill_layer(name, layer, state)
        for name, quantizer in act_quantizers(network).items():
            key = adapter.published_name(name)
            scale, zero_point = (_take_one(state, f"{key}.{end}") for end in ("delta", "zero_point"))
            quantizer.set_grid(Grid(scale, zero_point, quantizer.spec))
        _fill_float_parts(network, state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: expected a checkpoint of this architecture: {_reason(error)}") from error
    return network.eval().requires_grad_(False), recipe


def _reason(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())


def _take(state: dict[str, Tensor], key: str) -> Tensor:
    return torch.as_tensor(state.pop(key))


def _take_one(state: dict[str, Tensor], key: str) -> Tensor:
    tensor = _take(state, key)
    if tensor.numel() != 1:
        raise RuntimeError(f"{key} has shape {list(tensor.shape)}, expected a single number")
    return tensor.reshape(())


def _fill_layer(name: str, layer: QuantLayer, state: dict[str, Tensor]) -> None:
    weight = _take(state, f"{name}.weight")
    if weight.shape != layer.weight.shape:
        raise RuntimeError(f"{name}.weight has shape {list(weight.shape)}, expected {list(layer.weight.shape)}")
    if layer.bias is not None:
        layer.bias.data.copy_(_take(state, f"{name}.bias"))
    codes = []
    for part, quantizer, suffix in zip(layer.slices, layer.weight_quantizers, ("", "_0"), strict=False):
        key = f"{name}.weight_quantizer{suffix}"
        scale, zero, alpha = (_take(state, f"{key}.{end}") for end in ("delta", "zero_point", "alpha"))
        zero = zero + quantizer.spec.qmin  # the file's codes start at 0
        rows = quantizer.scale.shape[0]  # 1 for a grid per tensor, of which every row of the file has a copy
        quantizer.set_grid(Grid(scale[:rows], zero[:rows], quantizer.spec))
        # In the network's dtype, as the original computes it: a ratio near a whole number must fall as it does there.
        dtype = layer.weight.dtype
        above = torch.floor(weight[:, part].to(dtype) / scale.to(dtype)) + (alpha >= 0) + zero
        codes.append(above.clamp(quantizer.spec.qmin, quantizer.spec.qmax))
    layer.freeze(torch.cat(codes, 1))


@torch.no_grad()
def _fill_float_parts(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Norms, and whatever else is not quantized; what is left of the file must be activation quantizers."""
    own = set()
    for name, layer in quant_layers(network).items():
        own |= {f"{name}.{key}" for key in layer.state_dict()}
    for key, tensor in network.state_dict().items():
        if key not in own and "act_quantizer" not in key:
            tensor.copy_(_take(state, key))
    foreign = [key for key in state if "act_quantizer" not in key]
    if foreign:
        raise RuntimeError(f"{foreign[0]} is not part of it")


def published_state(
    network: nn.Module, adapter: Adapter, recipe: Recipe, float_weights: dict[str, Tensor] | None = None
) -> OrderedDict[str, Tensor]:
    """The calibrated network as the original code stores it.

    float_weights: original weights by layer name ("conv_in" -> [O, ...]); each element is written as it was where its
    code is one of its two neighbours, which is all that alpha can say, and as its dequantized value elsewhere. Raises
    ValueError naming what the format cannot express.
    """
    require_calibrated(network)
    _require_expressible(network, recipe)
    state: OrderedDict[str, Tensor] = OrderedDict()
    own = set()
    for name, layer in quant_layers(network).items():
        own |= {f"{name}.{key}" for key in layer.state_dict()}
        weight = layer.weight.detach().clone()
        for part, quantizer, suffix in zip(layer.slices, layer.weight_quantizers, ("", "_0"), strict=False):
            original = None if float_weights is None else float_weights[name][:, part]
            shift = -quantizer.spec.qmin  # the original's codes start at 0
            base, alpha = _rounding_that_gives(layer.codes[:, part] + float(shift), quantizer, original, shift)
            weight[:, part] = base
            key = f"{PREFIX}{name}.weight_quantizer{suffix}"
            rows = (layer.weight.shape[0], *quantizer.scale.shape[1:])
            state[f"{key}.delta"] = quantizer.scale.detach().expand(rows).clone()
            state[f"{key}.zero_point"] = (quantizer.zero_point + shift).expand(rows).clone()
            state[f"{key}.alpha"] = alpha
        state[f"{PREFIX}{name}.weight"] = weight
        if layer.bias is not None:
            state[f"{PREFIX}{name}.bias"] = layer.bias.detach().clone()
    for name, quantizer in act_quantizers(network).items():
        key = f"{PREFIX}{adapter.published_name(name)}"
        state[f"{key}.delta"] = quantizer.scale.detach()[0].clone()
        state[f"{key}.zero_point"] = quantizer.zero_point[0].clone()
    for key, tensor in network.state_dict().items():
        if key not in own and "act_quantizer" not in key:
            state[f"{PREFIX}{key}"] = tensor.detach().clone()
    state._metadata = OrderedDict({"": {RECIPE_KEY: json.dumps(recipe.to_dict())}})
    return state


def _rounding_that_gives(codes: Tensor, quantizer, original: Tensor | None, shift: int) -> tuple[Tensor, Tensor]:
    """(weight, alpha = -1 or 1) from which the original code computes exactly these codes (which start at 0)."""
    scale, zero, top = quantizer.scale, quantizer.zero_point + shift, 2**quantizer.spec.bits - 1

    def gives(weight: Tensor, up: int) -> Tensor:
        return (torch.floor(weight / scale) + up + zero).clamp(0, top) == codes

    folded = (codes - zero) * scale
    weight = folded if original is None else torch.where(gives(original, 0) | gives(original, 1), original, folded)
    return weight, torch.where(gives(weight, 0), -1.0, 1.0)


def _require_expressible(network: nn.Module, recipe: Recipe) -> None:
    layers = quant_layers(network)
    _require_one_width("weight", {n: m.weight_quantizers for n, m in layers.items()}, recipe.weights.bits)
    if recipe.activations is None:
        return
    _require_one_width("activation", {n: m.act_quantizers for n, m in layers.items()}, recipe.activations.bits)
    sets = max(quantizer.steps.count for quantizer in act_quantizers(network).values())
    if sets > 1 or recipe.activations.axis != "tensor":
        raise ValueError("ckpt.pth holds one activation scale per tensor, found scales per step group or channel")
    if recipe.activations.kind in ("unsigned", "unsigned_mid"):
        raise ValueError(f"ckpt.pth holds signed or affine activations, found {recipe.activations.kind}")


def _require_one_width(what: str, quantizers: dict[str, list[nn.Module]], bits: int) -> None:
    for name, parts in quantizers.items():
        found = f"{parts[0].spec.bits} bits" if parts else "float"
        if found != f"{bits} bits":
            raise ValueError(f"ckpt.pth holds one {what} width for all layers, here {bits} bits; {name} has {found}")


def save_published(
    path: str | Path,
    network: nn.Module,
    adapter: Adapter,
    recipe: Recipe,
    float_weights: dict[str, Tensor] | None = None,
) -> None:
    """Write ckpt.pth atomically; see `published_state`."""
    save_pickle(published_state(network, adapter, recipe, float_weights), path)


def original_softmax_bits(recipe: Recipe, adapter: Adapter, network: nn.Module) -> int:
    """The bits of softmax outputs with which the original code reads a file written from this recipe.

    An unsigned softmax grid of b bits is the upper half of the original's signed grid of b + 1 bits, and a signed one
    beside the original's unsigned grid uses its lower half.
    """
    softmax = softmax_spec(recipe)
    kind = adapter.published_softmax_kind(network, recipe.activations.kind)
    return softmax.bits + (kind == "signed") - (softmax.kind == "signed")

"""The native calibrated checkpoint: one .safetensors with packed integer codes, scales and all it takes to rebuild.

It loads without the float model. Metadata (JSON under "qdiff"): format, model family and configuration, recipe,
sampler timesteps, and where it came from (seed, source checkpoint's SHA-256, the toolkit's version).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qdiff.adapters import Adapter, adapter_for
from qdiff.files import save_safetensors
from qdiff.layers import act_quantizers, quant_layers
from qdiff.packing import pack_codes, unpack_codes
from qdiff.spec import Recipe
from qdiff.surgery import insert_quantizers

FORMAT = "qdiff-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """A quantized network with the recipe that made it; `provenance` is plain data for people and reports."""

    network: nn.Module
    adapter: Adapter
    recipe: Recipe
    provenance: dict[str, Any]


def require_calibrated(network: nn.Module) -> None:
    """Raise ValueError naming a layer whose codes, or a quantizer whose range, has not been set."""
    for name, layer in quant_layers(network).items():
        if layer.weight_quantizers and not layer.frozen:
            raise ValueError(f"{name}: its weight has no codes yet, so there is nothing to save")
    for name, quantizer in act_quantizers(network).items():
        if not quantizer.enabled:
            raise ValueError(f"{name}: it has no range yet, so there is nothing to save")


def _integers(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    whole = values.to(dtype)
    if not torch.equal(whole.to(values.dtype), values):
        raise ValueError(f"{name}: expected whole numbers that fit {dtype}, found {values.flatten()[:4].tolist()} ...")
    return whole


def packed_state(network: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint stores: the state dict with packed codes in place of quantized weights, integer zero points."""
    require_calibrated(network)
    state = network.state_dict()
    for name, layer in quant_layers(network).items():
        if layer.weight_quantizers:
            spec = layer.weight_quantizers[0].spec
            del state[f"{name}.weight"]
            state[f"{name}.codes"] = pack_codes(layer.codes, spec.bits, spec.lo)
    for key in [key for key in state if key.endswith(".zero_point")]:
        of_weight = "weight_quantizer" in key
        state[key] = _integers(state[key], torch.int16 if of_weight else torch.int32, key)
    return dict(state)


def save_checkpoint(
    path: str | Path,
    network: nn.Module,
    adapter: Adapter,
    recipe: Recipe,
    timesteps: Tensor | None,
    provenance: dict[str, Any],
) -> None:
    """Write a calibrated network atomically. timesteps: [S] of the calibration's sampler, kept for step groups."""
    from qdiff import __version__

    about = {
        "format": FORMAT,
        "family": adapter.family,
        "config": adapter.config_of(network),
        "recipe": recipe.to_dict(),
        "timesteps": None if timesteps is None else timesteps.tolist(),
        "toolkit": __version__,
        **provenance,
    }
    save_safetensors(packed_state(network), path, {"qdiff": json.dumps(about, sort_keys=True)})


def read_about(path: str | Path) -> dict[str, Any]:
    """A checkpoint's metadata. Raises FileNotFoundError, or ValueError naming the file and what it is instead."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("qdiff", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable checkpoint (truncated, or of another kind): {error}") from error
    about = about if isinstance(about, dict) else {}
    if about.get("format") != FORMAT:
        found = about.get("format") or "a safetensors file without our metadata"
        raise ValueError(f"{path}: expected a calibrated checkpoint ({FORMAT}), found {found}")
    return about


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Rebuild a calibrated network on the CPU in float32, in eval mode, weights folded. No float model is needed.

    Raises FileNotFoundError, or ValueError naming the file, what was expected and what was found.
    """
    about = read_about(path)
    try:
        recipe, adapter = Recipe.from_dict(about["recipe"]), adapter_for(about["family"])
        timesteps = None if about["timesteps"] is None else torch.tensor(about["timesteps"], dtype=torch.float64)
        network = insert_quantizers(adapter.build(about["config"]), recipe, adapter, timesteps)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its description does not make a network: {error}") from error
    with safe_open(path, "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    codes = {key: state.pop(key) for key in list(state) if key.endswith(".codes")}
    layers = {f"{n}.codes": m for n, m in quant_layers(network).items() if m.weight_quantizers}
    expected = network.state_dict().keys() - {key.replace(".codes", ".weight") for key in layers}
    _compare(path, "tensors", expected, state.keys())
    _compare(path, "codes", layers.keys(), codes.keys())
    try:
        network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=False)
        for key, layer in layers.items():
            spec = layer.weight_quantizers[0].spec
            layer.freeze(unpack_codes(codes[key], spec.bits, layer.weight.shape, spec.lo))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: its tensors do not fit the network it describes: {reason}") from error
    for quantizer in act_quantizers(network).values():
        quantizer.enabled = True
    network.requires_grad_(False)
    kept = {key: value for key, value in about.items() if key not in ("config", "recipe")}
    return Checkpoint(network.eval(), adapter, recipe, kept)


def _compare(path: str | Path, what: str, expected: set[str], found: set[str]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        first = f"{missing[0]} is missing" if missing else f"{extra[0]} is not part of the network"
        raise ValueError(
            f"{path}: expected {len(expected)} {what} for the network it describes, found {len(found)}; {first}"
        )

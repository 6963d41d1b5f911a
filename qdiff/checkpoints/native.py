"""The native calibrated checkpoint: one .safetensors with packed integer codes, scales and all it takes to rebuild.

It loads without the float model. Metadata (JSON under "qdiff"): format, model family and configuration, recipe,
sampler timesteps, and where it came from (seed, source checkpoint's SHA-256, the toolkit's version).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from qdiff.checkpoints.bounds import check_numbers, check_tables, check_types, check_values, header_of, no_larger_than
from qdiff.checkpoints.packing import check_packed, pack_codes, unpack_codes
from qdiff.families import Adapter, adapter_for
from qdiff.nn.layers import QuantAttention, QuantLayer, act_quantizers, quant_layers
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.recipe import Recipe
from qdiff.utils.files import read_metadata, save_safetensors

FORMAT = "qdiff-checkpoint-2"
SEEN_BYTES = 2**26  # of a file, which stay in memory page by page until it is opened anew
READABLE = ("qdiff-checkpoint-1", FORMAT)  # the first had an entry for every scale and zero point


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
            state[f"{name}.codes"] = pack_codes(layer.codes, spec.bits, spec.qmin)
    for key in [key for key in state if key.endswith(".zero_point")]:
        of_weight = "weight_quantizer" in key
        state[key] = _integers(state[key], torch.int16 if of_weight else torch.int32, key)
    for name, keys in _joined(state).items():
        state[name] = torch.cat([state.pop(key).flatten() for key in keys])
    for key, tensor in state.items():
        check_values(key, tensor)
    return dict(state)


def _joined(keys: Iterable[str]) -> dict[str, list[str]]:
    """Small tensors that are stored as one, since an entry of its own takes a hundred bytes of the header: name of the
    whole -> keys of the parts, in the state dict's order."""
    kinds = {
        "activation_scales": (".act_quantizer", ".scale"),
        "activation_zero_points": (".act_quantizer", ".zero_point"),
        "weight_zero_points": (".weight_quantizer", ".zero_point"),
    }
    keys = list(keys)
    found = {name: [k for k in keys if part in k and k.endswith(end)] for name, (part, end) in kinds.items()}
    return {name: parts for name, parts in found.items() if parts}


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
    state = packed_state(network)
    about["digest"] = digest_of({key: tensor_hash(tensor) for key, tensor in state.items()})
    save_safetensors(state, path, {"qdiff": json.dumps(about, sort_keys=True)})


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, dtype and shape."""
    data = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{data.dtype} {list(data.shape)} ".encode())
    found.update(data.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def digest_of(hashes: dict[str, str]) -> str:
    """One checksum of named tensors, whatever their order."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def read_about(path: str | Path) -> dict[str, Any]:
    """A checkpoint's metadata. Raises FileNotFoundError, or ValueError naming the file and what it is instead."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    about = read_metadata(path, "checkpoint (truncated, or of another kind)")
    if about.get("format") not in READABLE:
        found = str(about.get("format") or "a safetensors file without our metadata")[:60]
        raise ValueError(f"{path}: expected a calibrated checkpoint ({' or '.join(READABLE)}), found {found}")
    return about


class PackedFile:
    """A checkpoint that is being read: `network` has everything but the weights of quantized layers.

    Those are on the meta device until `layers` has handed over their codes, one layer after the other, so that no more
    of the network is in memory than its reader keeps. Raises FileNotFoundError, or ValueError naming the file, what was
    expected and what was found.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.about = path, read_about(path)
        self._hashes: dict[str, str] = {}
        self._file, self._seen = safe_open(path, "pt"), 0
        try:
            self._header = header_of(self._file)
            self.recipe, self.adapter = Recipe.from_dict(self.about["recipe"]), adapter_for(self.about["family"])
            self.network = self._network(self.about["config"], self.about["timesteps"])
        except Exception as error:  # sizes and types that nobody thought of make a network stumble anywhere
            reason = " ".join(f"{error}".split()) or type(error).__name__
            raise ValueError(f"{path}: its description does not make a network: {reason:.400}") from error
        for module in self.network.modules():
            if isinstance(module, QuantAttention):
                module.policy = self.about.get("attention", module.policy)
        self._layers = {f"{n}.codes": m for n, m in quant_layers(self.network).items() if m.weight_quantizers}
        self._read_float_part()

    def _network(self, config: dict[str, Any], steps: list[float] | None) -> nn.Module:
        check_numbers(config, self._header)
        with torch.device("meta"), no_larger_than(self._header):
            network = self.adapter.build(config)
        check_tables(network, self.recipe, self.adapter.num_timesteps(network), len(steps or ()), self._header)
        timesteps = None if steps is None else torch.tensor(steps, dtype=torch.float64)
        if timesteps is not None and not (timesteps.dim() == 1 and bool(timesteps.isfinite().all())):
            raise ValueError("timesteps: expected a list of finite numbers")
        return insert_quantizers(network, self.recipe, self.adapter, timesteps)

    def _tensor(self, key: str) -> Tensor:
        if self._seen > SEEN_BYTES:
            self._file, self._seen = safe_open(self.path, "pt"), 0
        tensor = self._file.get_tensor(key).clone()
        self._seen += tensor.nbytes
        self._hashes[key] = tensor_hash(tensor)
        return tensor

    def _read_float_part(self) -> None:
        keys = set(self._header)
        codes = {key for key in keys if key.endswith(".codes")}
        shapes = {key: tensor.shape for key, tensor in self.network.state_dict().items()}
        expected = shapes.keys() - {key.replace(".codes", ".weight") for key in self._layers}
        joined = _joined(key for key in shapes if key in expected) if self.about["format"] == FORMAT else {}
        expected = expected.difference(*joined.values()).union(joined)
        _compare(self.path, "tensors", expected, keys - codes)
        _compare(self.path, "codes", self._layers.keys(), codes)
        with self._fitting():
            check_types(self._header)
            state = {key: self._tensor(key).float() for key in sorted(keys - codes)}
            for key, tensor in state.items():
                check_values(key, tensor)
            for name, parts in joined.items():
                pieces = state.pop(name).split([shapes[key].numel() for key in parts])
                state |= {key: piece.view(shapes[key]) for key, piece in zip(parts, pieces, strict=True)}
            self.network.load_state_dict(state, strict=False, assign=True)
        for quantizer in act_quantizers(self.network).values():
            quantizer.enabled = True
        self.network.requires_grad_(False)

    def layers(self) -> Iterator[tuple[str, QuantLayer, Tensor]]:
        """(name, layer, packed codes [bytes] uint8) of every layer with a quantized weight."""
        for key, layer in self._layers.items():
            with self._fitting():
                packed, spec = self._tensor(key), layer.weight_quantizers[0].spec
                check_packed(packed, spec.bits, layer.weight.shape)
            yield key.removesuffix(".codes"), layer, packed

    def finish(self) -> Checkpoint:
        """The checkpoint, once the layers have been read. Raises ValueError where the tensors are not those written."""
        written = self.about.get("digest")
        if written is not None and written != digest_of(self._hashes):
            raise ValueError(f"{self.path}: damaged: its tensors are not those that were written (checksum)")
        kept = {key: value for key, value in self.about.items() if key not in ("config", "recipe", "digest")}
        return Checkpoint(self.network.eval(), self.adapter, self.recipe, kept)

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.path}: its tensors do not fit the network it describes: {reason}") from error


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Rebuild a calibrated network on the CPU in float32, in eval mode, weights folded. No float model is needed.

    Raises FileNotFoundError, or ValueError naming the file, what was expected and what was found.
    """
    file = PackedFile(path)
    for _, layer, packed in file.layers():
        spec = layer.weight_quantizers[0].spec
        layer.materialize()
        layer.freeze(unpack_codes(packed, spec.bits, layer.weight.shape, spec.qmin))
    return file.finish()


def _compare(path: str | Path, what: str, expected: set[str], found: set[str]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        first = f"{missing[0]} is missing" if missing else f"{extra[0]} is not part of the network"
        raise ValueError(
            f"{path}: expected {len(expected)} {what} for the network it describes, found {len(found)}; {first}"
        )

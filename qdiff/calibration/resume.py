"""What a calibration has done so far, on disk: a file per finished unit, so that a killed run goes on with the next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qdiff.nn.grid import Grid
from qdiff.nn.layers import act_quantizers, quant_layers
from qdiff.recipes.plain_data import brief
from qdiff.utils.files import parse_json, read_metadata, save_safetensors, write_text

PLAN = "plan.json"


def state_of(network: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """All that calibration may change in the modules called `names`: codes, biases, grids ("" is the network)."""
    state: dict[str, Tensor] = {}
    for prefix in names:
        module = network.get_submodule(prefix)
        for inner, layer in quant_layers(module).items():
            name = _join(prefix, inner)
            if layer.bias is not None:
                state[f"{name}.bias"] = layer.bias.detach()
            for part in layer.weight_quantizers if layer.frozen else ():
                index = layer.weight_quantizers.index(part)
                state[f"{name}.weight_grids.{index}"] = torch.stack([part.scale.detach(), part.zero_point])
            if layer.frozen:
                state[f"{name}.codes"] = layer.codes
        for inner, quantizer in act_quantizers(module).items():
            if quantizer.enabled:
                grid = torch.stack([quantizer.scale.detach(), quantizer.zero_point])
                state[f"{_join(prefix, inner)}.act_grid"] = grid
    return {key: tensor.clone() for key, tensor in state.items()}


def _join(prefix: str, name: str) -> str:
    return ".".join(filter(None, (prefix, name)))


@torch.no_grad()
def put_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `state_of` took, into a network of the same structure."""
    frozen: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, _, kind = key.rpartition(".")
        if kind == "act_grid":
            quantizer = network.get_submodule(name)
            quantizer.set_grid(Grid(tensor[0], tensor[1], quantizer.spec))
        elif kind == "codes":
            frozen[name] = tensor
        elif kind == "bias":
            network.get_submodule(name).bias.copy_(tensor)
        else:
            layer = network.get_submodule(name.removesuffix(".weight_grids"))
            quantizer = layer.weight_quantizers[int(kind)]
            quantizer.set_grid(Grid(tensor[0], tensor[1], quantizer.spec))
    for name, codes in frozen.items():  # folded last, when the grids are there
        network.get_submodule(name).freeze(codes)


class Record:
    """The finished pieces of one calibration, in a folder; without a folder nothing is kept."""

    def __init__(self, folder: Path | None = None, plan: Mapping[str, Any] | None = None, is_main: bool = True) -> None:
        """plan: what determines the result; kept beside the pieces. is_main: whether this process writes.

        Raises ValueError where the folder holds pieces of another plan, naming what differs.
        """
        self.folder, self.is_main = folder, is_main
        self._pieces: dict[tuple[int, str], Path] = {}
        self._next = 0  # number of the next file: always the highest, so that of two of one piece the later is known
        if folder is None:
            return
        found = read_plan(folder)
        plan = json.loads(json.dumps(plan or {}))
        if found is not None and found != plan:
            raise ValueError(f"{folder}: holds an unfinished calibration of another plan: {differences(found, plan)}")
        for path in sorted(folder.glob("[0-9]*.safetensors")):
            about = _about(path)
            self._put((about["stage"], about["unit"]), path)
            self._next = int(path.stem) + 1
        if is_main and found is None:
            write_text(folder / PLAN, json.dumps(plan, indent=1, sort_keys=True))

    def __len__(self) -> int:
        return len(self._pieces)

    def has(self, stage: int, unit: str) -> bool:
        """Whether a piece is finished."""
        return (stage, unit) in self._pieces

    def load(self, stage: int, unit: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, notes) of a finished piece, or None. Raises ValueError naming a damaged file."""
        path = self._pieces.get((stage, unit))
        if path is None:
            return None
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, _about(path)["notes"]  # noqa: SIM118

    def save(self, stage: int, unit: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Keep a finished piece, atomically, in place of a former one of its name.

        Raises OSError where it cannot be written; former pieces stay usable.
        """
        if self.folder is None or not self.is_main:
            return
        path = self.folder / f"{self._next:05d}.safetensors"
        about = json.dumps({"stage": stage, "unit": unit, "notes": dict(notes)})
        save_safetensors(dict(tensors), path, {"qdiff": about})
        self._next += 1
        self._put((stage, unit), path)

    def _put(self, key: tuple[int, str], path: Path) -> None:
        former = self._pieces.get(key)
        self._pieces[key] = path
        if former is not None and self.is_main:
            former.unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget everything: the calibration is finished and its result saved."""
        if self.folder is None or not self.is_main:
            return
        half_written = self.folder.glob(".*")  # by a process that was killed
        for path in [*self._pieces.values(), *half_written, self.folder / PLAN]:
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The plan of the unfinished calibration in a folder; None where there is none."""
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        return parse_json(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a readable plan: {error}") from error


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


def differences(found: Any, wanted: Any, name: str = "", most: int = 4) -> str:
    """Where two plans differ, in words: "seed: 1 there, 2 here"."""
    listed = list(_differences(found, wanted, name))
    return "; ".join(listed[:most]) + (f"; and {len(listed) - most} more" if len(listed) > most else "")


def _differences(found: Any, wanted: Any, name: str) -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = dict.fromkeys([*found, *wanted])
        pairs = ((k, found.get(k, _ABSENT), wanted.get(k, _ABSENT)) for k in keys)
        return [d for k, f, w in pairs for d in _differences(f, w, _join(name, str(k)))]
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        pairs = enumerate(zip(found, wanted, strict=True))
        return [d for i, (f, w) in pairs for d in _differences(f, w, f"{name}[{i}]")]
    return [] if found == wanted else [f"{name}: {brief(found):.60} there, {brief(wanted):.60} here"]


def _about(path: Path) -> dict[str, Any]:
    about = read_metadata(path, "piece of a calibration")
    try:
        return {"stage": int(about["stage"]), "unit": str(about["unit"]), "notes": dict(about["notes"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable piece of a calibration: {error}") from error

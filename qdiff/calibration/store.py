"""Where calibration states live: on the device, then in host memory, then on disk, under one memory limit each."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLACES = ("device", "host", "disk")


@dataclass(frozen=True)
class MemoryLimits:
    """Bytes of states kept on the device and in host memory; None for no limit. On a CPU only the host's counts."""

    device: int | None = None
    host: int | None = None


class Store:
    """Makes columns, each in the fastest place that has room for it, and keeps count of what they take.

    Files lie in the folder `scratch` (default: the system's temporary one) and have no names, so that none is left
    behind. Raises OSError where the disk is full.
    """

    def __init__(self, device: torch.device, limits: MemoryLimits | None = None, scratch: Path | None = None) -> None:
        self.device = torch.device(device)
        limits = limits or MemoryLimits()
        on_host = self.device.type == "cpu"
        self.limits = {"device": 0 if on_host else limits.device, "host": limits.host, "disk": None}
        self.used = dict.fromkeys(PLACES, 0)
        self.peak = dict.fromkeys(PLACES, 0)
        self._scratch = scratch

    def column(self, rows: int, like: Tensor) -> Column:
        """An uninitialised column of `rows` rows, each of the shape and dtype of a row of `like`."""
        shape = (rows, *like.shape[1:])
        size = like.new_empty(0).element_size() * shape[0] * like[:1].numel()
        place = next(p for p in PLACES if self.limits[p] is None or self.used[p] + size <= self.limits[p])
        data = self._allocate(place, shape, like.dtype, size)
        self.used[place] += size
        self.peak[place] = max(self.peak[place], self.used[place])
        column = Column(data, place, self.device)
        weakref.finalize(column, _release, self.used, place, size)
        return column

    def has_spilled(self) -> bool:
        """Whether any column had to go elsewhere than to the device."""
        return self.device.type != "cpu" and self.peak["host"] + self.peak["disk"] > 0

    def _allocate(self, place: str, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        if place != "disk" or size == 0:
            return torch.empty(shape, dtype=dtype, device=self.device if place == "device" else "cpu")
        if self._scratch is not None:
            self._scratch.mkdir(parents=True, exist_ok=True)
        try:  # a file without a name: nothing is left behind, even by a killed process; the mapping keeps the space
            with tempfile.TemporaryFile(dir=self._scratch) as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a mapped write to a full disk would kill the process
                count = size // torch.empty((), dtype=dtype).element_size()
                path = f"/dev/fd/{file.fileno()}"
                return torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno), str(self._scratch or tempfile.gettempdir())) from error


def _release(used: dict[str, int], place: str, size: int) -> None:
    used[place] -= size


class Column:
    """N rows of one quantity, in one place; rows are read to the device."""

    def __init__(self, data: Tensor, place: str, device: torch.device) -> None:
        self.data, self.place, self.device = data, place, device

    def __len__(self) -> int:
        return len(self.data)

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        self.data[rows] = values.to(self.data.device)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """rows: a slice, or [M] long. Returns them on the device."""
        if isinstance(rows, slice):
            return self.data[rows].to(self.device)
        return self.data.index_select(0, rows.to(self.data.device)).to(self.device)


class Rows:
    """Some rows of a column that are read when they are first used: what a segment does not look at costs nothing.

    Stands for a tensor in PyTorch's functions and operators and gives that tensor's attributes.
    """

    def __init__(self, column: Column, rows: slice | Tensor) -> None:
        self.column, self._rows, self._read = column, rows, None

    @property
    def tensor(self) -> Tensor:
        """The rows, on the device."""
        if self._read is None:
            self._read = self.column[self._rows]
        return self._read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*map(read_rows, args), **{key: read_rows(value) for key, value in (kwargs or {}).items()})


def _operator(name: str) -> Callable:
    def apply(self: Rows, *others: Any) -> Any:
        return getattr(self.tensor, name)(*map(read_rows, others))

    return apply


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
for _name in (*_BINARY, *(f"r{n}" for n in _BINARY), "neg", "abs", "lt", "le", "gt", "ge", "getitem", "len", "iter"):
    setattr(Rows, f"__{_name}__", _operator(f"__{_name}__"))  # Python looks these up on the type alone


def read_rows(value: Any) -> Any:
    """The value with rows read into tensors, also inside lists and tuples."""
    if isinstance(value, Rows):
        return value.tensor
    if isinstance(value, (list, tuple)):
        return type(value)(map(read_rows, value))
    return value


def map_leaves(state: Any, function: Callable[[Any], Any]) -> Any:
    """A chain's state (a dataclass of leaves, tuples of leaves and None) with `function` applied to every leaf."""
    return replace(state, **{field.name: _map(getattr(state, field.name), function) for field in fields(state)})


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    # No closure that calls itself: such a cycle would keep the columns that `function` holds until the next collection.
    if isinstance(value, tuple):
        return tuple(_map(part, function) for part in value)
    return None if value is None else function(value)

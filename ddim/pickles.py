"""What a pickle of tensors may be, before it is read and after: nothing that asks for more than the file holds."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

ZIP = b"PK\x03\x04"
LEGACY_PICKLES = 5  # before the tensors' bytes in files of PyTorch before 1.6
REPEATS = 100  # that an entry of a pickle may be counted, on average, where parts occur several times
# Of what PyTorch's weights-only reader allows, the names that make plain dense tensors and containers.
ALLOWED = {
    *("collections OrderedDict", "collections Counter", "builtins set", "_codecs encode"),
    *(f"torch._utils _rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
}
ALLOWED_MODULES = ("torch", "torch.storage")  # dtypes, storages and sizes


class Unfit(Exception):
    """A reason not to read a file, or not to use what was read."""


def foreign(name: str) -> str:
    """The reason for a class or function that is not read."""
    return f"it holds an object of {name}, and only tensors and plain containers are read"


def is_plain(name: str) -> bool:
    """Whether a name in a pickle, "module name", is one that plain dense tensors and containers need."""
    made_of_sizes = name.endswith(("Tensor", "TypedStorage"))  # memory that no file fills
    return name in ALLOWED or (name.split(" ")[0] in ALLOWED_MODULES and not made_of_sizes)


def check_unread(path: Path, is_allowed: Callable[[str], bool] = is_plain) -> None:
    """Look through a file for `torch.load` without making anything of it.

    is_allowed: of names, "module name". Raises Unfit for names that are not, by default those of plain tensors, for
    compressed archives, and for tuples of tuples of ... that would take forever to compare. Raises ValueError,
    IndexError, KeyError or zipfile.BadZipFile for what is no pickle.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP)) == ZIP:
            for data in _pickles_of_archive(path):
                _check_operations(data, is_allowed)
            return
        file.seek(0)
        for _ in range(LEGACY_PICKLES):
            _check_operations(file, is_allowed)


def _pickles_of_archive(path: Path) -> Iterator[bytes]:
    with zipfile.ZipFile(path) as archive:
        entries, held = archive.infolist(), path.stat().st_size
        if (size := sum(entry.file_size for entry in entries)) > held:
            raise Unfit(f"its entries ask for {size} bytes, the file has {held}; PyTorch does not compress them")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                yield archive.read(entry)


def _check_operations(data: bytes | BinaryIO, is_allowed: Callable[[str], bool]) -> None:
    """Run a pickle's operations on sizes in place of objects, which count an object's parts as often as they occur."""
    stack: list[int | None] = []  # None: a mark
    memo: dict[int, int] = {}
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if operation.name == "GLOBAL" and not is_allowed(argument):
            raise Unfit(foreign(argument.replace(" ", ".")))
        if operation.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = stack[-1] or 0
        elif operation.name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif operation.name == "MARK":
            stack.append(None)
        else:
            size = 1 + _pop(stack, operation.stack_before)
            stack.extend([size] * len(operation.stack_after))
            if size > REPEATS * (count + 10):
                raise Unfit("its parts hold one another too often")


def _pop(stack: list[int | None], operands: list) -> int:
    """Take an operation's operands from the stack. Returns their size."""
    total, single = 0, len(operands)
    if pickletools.markobject in operands:
        single = operands.index(pickletools.markobject)
        while (size := stack.pop()) is not None:
            total += size
    return total + sum(stack.pop() or 0 for _ in range(single))


def check_held(tensors: Iterable[Tensor], path: Path) -> None:
    """Raise Unfit where a file's tensors have more memory than it has bytes: not all of it can be from there."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    if (asked := sum(storages.values())) > (held := path.stat().st_size):
        raise Unfit(f"its tensors take {asked} bytes, the file has {held}")


def check_tensors(content: Any, repeats: bool = False) -> None:
    """Raise Unfit unless all tensors in nested containers are plain dense CPU tensors with memory of their own for
    every entry. repeats: those of their first axis may be one entry, repeated."""
    todo, seen = [content], set()
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            _check_tensor(item, repeats)
        elif isinstance(item, (Mapping, list, tuple, set)) and id(item) not in seen:
            seen.add(id(item))
            todo.extend((*item.keys(), *item.values()) if isinstance(item, Mapping) else item)


def _check_tensor(tensor: Tensor, repeats: bool) -> None:
    kinds = {
        "sparse": tensor.layout != torch.strided,
        "nested": tensor.is_nested,
        "quantized": tensor.is_quantized,
        tensor.device.type: tensor.device.type != "cpu",
        type(tensor).__name__: type(tensor) not in (Tensor, nn.Parameter),
    }
    if found := [kind for kind, is_one in kinds.items() if is_one]:
        raise Unfit(f"expected dense tensors, found a {found[0]} one")
    shape = list(tensor.shape)
    if repeats and tensor.dim() and len(tensor) and tensor.stride(0) == 0:
        tensor = tensor[0]
    if (held := tensor.untyped_storage().nbytes()) < tensor.nbytes:
        raise Unfit(f"a tensor of shape {shape} takes {tensor.nbytes} bytes, the file has {held} for it")

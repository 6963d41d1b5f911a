"""Safe reading and atomic writing of files: nothing is unpickled freely, nothing is left half-written."""

from __future__ import annotations

import fcntl
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ddim.files import atomic


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf8")


def save_safetensors(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write tensors and string metadata atomically; the same content gives the same bytes with one metadata key only,
    since safetensors writes several in any order."""
    with atomic(path) as temporary:
        try:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # "I/O error: No space left on device (os error 28)"
            raise OSError(f"{path}: cannot be written: {error}") from error


def save_pickle(content: Any, path: str | Path) -> None:
    """`torch.save`, atomically; the same content gives the same bytes."""
    with atomic(path) as temporary, temporary.open("wb") as file:  # given a path, it would write the name into the file
        try:
            torch.save(content, file)
        except RuntimeError as error:  # its zip writer stumbles over the error that the file gave
            if not isinstance(error.__context__, OSError):
                raise
            raise error.__context__ from None


def load_pickle(path: str | Path, what: str) -> Any:
    """`torch.load` of tensors and plain containers only.

    Raises FileNotFoundError, or ValueError naming the file and the class of a foreign object, or saying that the file
    is truncated or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {what}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, of no use to who reads the error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = _foreign_object(str(error)) or "truncated or not a PyTorch file"
        raise ValueError(f"{path}: not a readable {what}: {reason}") from error
    except Exception as error:  # damaged bytes make the unpickler stumble anywhere: IndexError, struct.error, ...
        raise ValueError(f"{path}: not a readable {what}: truncated or not a PyTorch file") from error


def _foreign_object(message: str) -> str | None:
    """The class that a weights-only load refused, from PyTorch's message."""
    found = re.search(r"unsupported (?:global: GLOBAL|GLOBAL|class) (\S+)", message, re.IGNORECASE)
    if found is None:
        return None
    return f"it holds an object of {found[1].rstrip('.,')}, and only tensors and plain containers are read"


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Within the block no other process can be in such a block for the folder; ends with the process at the latest.

    Raises ValueError where another one is.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            reason = "another process is at work in this folder; wait for it or choose another"
            raise ValueError(f"{folder}: {reason}") from None
        yield
    finally:
        os.close(handle)

"""Safe reading and atomic writing of files: nothing is unpickled freely, nothing is left half-written."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import re
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qdiff.utils.atomic import atomic
from qdiff.utils.pickles import Unfit, check_tensors, check_unread, foreign

REPOSITORY = Path(__file__).resolve().parents[2]


def sha256(path: str | Path, block: int = 1 << 20) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(block):
            digest.update(chunk)
    return digest.hexdigest()


def has_bundled_models() -> bool:
    """Whether the bundled models are there: in a clone, and not beside an installed wheel."""
    return (REPOSITORY / "models" / "cifar10-features").is_dir()


def find_shipped(path: str | Path) -> Path:
    """A configuration or recipe as it is named: from the current folder, or as the toolkit brings it, in a clone or
    from a wheel. What is nowhere comes back as it is."""
    path = Path(path)
    for folder in (Path(), REPOSITORY, Path(sysconfig.get_path("data")) / "share" / "qdiff"):
        if (folder / path).is_file():
            return folder / path
    return path


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


def load_pickle(path: str | Path, what: str, repeats: bool = False) -> Any:
    """`torch.load` of plain containers and plain dense CPU tensors, no larger than what the file holds.

    repeats: a tensor may be one entry repeated along its first axis. Raises FileNotFoundError, or ValueError naming the
    file and the class of a foreign object, or what is wrong with a tensor, or saying that the file is truncated or of
    another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {what}")
    try:
        check_unread(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, of no use to who reads the error below
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(content, repeats)
    except Unfit as error:
        raise ValueError(f"{path}: not a readable {what}: {error}") from error
    except pickle.UnpicklingError as error:
        reason = _foreign_object(str(error)) or "truncated or not a PyTorch file"
        raise ValueError(f"{path}: not a readable {what}: {reason}") from error
    except Exception as error:  # damaged bytes make the unpickler stumble anywhere: IndexError, struct.error, ...
        raise ValueError(f"{path}: not a readable {what}: truncated or not a PyTorch file") from error
    return content


def _foreign_object(message: str) -> str | None:
    """The class that a weights-only load refused, from PyTorch's message."""
    found = re.search(r"unsupported (?:global: GLOBAL|GLOBAL|class) (\S+)", message, re.IGNORECASE)
    return None if found is None else foreign(found[1].rstrip(".,"))


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, for which a text nested too deep is an ordinary ValueError too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None


def read_metadata(path: Path, what: str) -> dict[str, Any]:
    """What one of our safetensors files says about itself, under "qdiff"; {} for one that says nothing.

    what: what the file is meant to be, for messages. Raises ValueError naming a file that cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            about = parse_json((file.metadata() or {}).get("qdiff", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable {what}: {error}") from error
    return about if isinstance(about, dict) else {}


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises FileNotFoundError, or ValueError naming a file that is something else."""
    try:
        return parse_json(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error


class _PlainLoader(yaml.SafeLoader):
    """Without merge keys, by which a few lines ask for any number of entries."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise ValueError("merge keys (<<) are not read")
        super().flatten_mapping(node)


def parse_yaml(text: str) -> Any:
    """`yaml.safe_load` without merge keys. Raises ValueError for whatever is not YAML, or is nested too deep."""
    try:
        return yaml.load(text, _PlainLoader)  # a SafeLoader: it makes plain data only
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("YAML nested too deep") from None


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

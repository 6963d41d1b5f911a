"""Features and statistics of references on disk, each under a hash of what it was made from."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qdiff.checkpoints.native import digest_of, tensor_hash
from qdiff.utils.files import save_safetensors

logger = logging.getLogger(__name__)


def key_of(origin: dict[str, str]) -> str:
    """A file name's worth of hash of what something was made from."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:40]


class Cache:
    """Named tensors in files of a folder. What is damaged counts as absent, with a line in the log; a folder that
    cannot be written costs a warning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sound: set[str] = set()  # keys that were read or written well

    def __contains__(self, key: str) -> bool:
        return key in self._sound

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key; None where there are none, or others than were written."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                written = (file.metadata() or {}).get("sha256")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            logger.warning("%s: damaged, computing anew: %s", path, " ".join(str(error).split()))
            return None
        if written != _checksum(tensors):
            logger.warning("%s: damaged (checksum), computing anew", path)
            return None
        self._sound.add(key)
        return tensors

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a key."""
        self._sound.add(key)  # also where it fails, which is tried and said once
        try:
            save_safetensors(tensors, self.path(key), {"sha256": _checksum(tensors)})
        except OSError as error:
            logger.warning("%s: cannot be written, so nothing is kept: %s", self.folder, error.strerror or error)


def _checksum(tensors: dict[str, Tensor]) -> str:
    return digest_of({name: tensor_hash(tensor) for name, tensor in tensors.items()})

"""What was measured on this machine, kept in files: the same question gets the same answer in every later run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Generic, TypeVar

from qdiff.utils.files import parse_json, write_text

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


def cache_folder() -> Path:
    """$QDIFF_CACHE, or qdiff/ in the user's folder of caches ($XDG_CACHE_HOME, else ~/.cache)."""
    own = os.environ.get("QDIFF_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdiff"


class MeasurementCache(Generic[Answer]):
    """Answers under keys, in memory and in a JSON file.

    Of several processes that look for the same answer the first to write it is right, so that all go on alike. What
    is damaged is found anew, with a warning; so is everything, later, where the folder cannot be written.
    """

    def __init__(self, path: Path, restore: Callable[..., Answer]) -> None:
        """restore: makes an answer of a JSON object's entries, by name; raises TypeError or ValueError for others.
        Answers are dictionaries or dataclasses."""
        self.path, self._restore = path, restore
        self._known = self._read()

    def get(self, key: str) -> Answer | None:
        """What is known under a key."""
        return self._known.get(key)

    def add(self, key: str, answer: Answer) -> Answer:
        """Keep an answer. Returns the one that stands, which another process may have found meanwhile."""
        try:
            with _held(self.path.parent):
                self._known |= self._read()
                self._known.setdefault(key, answer)
                write_text(self.path, json.dumps(dict(sorted(self._known.items())), indent=1, default=asdict))
        except OSError as error:
            self._known.setdefault(key, answer)
            logger.warning("%s: cannot be written, so what was measured is not kept: %s", self.path, error)
        return self._known[key]

    def _read(self) -> dict[str, Answer]:
        try:
            entries = parse_json(self.path.read_text(encoding="utf8"))
            return {key: self._restore(**entry) for key, entry in entries.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("%s: not readable, measured anew: %s", self.path, error)
            return {}


def milliseconds(**times: float) -> dict[str, float]:
    """Times by the names of what took them, to restore them from a file."""
    return {name: float(ms) for name, ms in times.items()}


def hash_of_sources(files: Iterable[Path]) -> str:
    """A short hash of source files: what was measured with others does not count."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Within the block other processes wait before such a block for the folder, where the file system has locks."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

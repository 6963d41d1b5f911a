"""Files that are complete or not there, and what killed processes left behind."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".tmp"


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder that becomes `path` if the block ends well, and vanishes if not.

    Raises OSError naming the file where it cannot be written: a full disk, a folder that is read-only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=SUFFIX, dir=path.parent)
    try:
        _locked(handle)  # until the process has written it, or is dead
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except OSError as error:
        if error.strerror is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # writing to an open file names none
    finally:
        os.close(handle)
        Path(name).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `atomic` below a folder whose processes were killed; those in use stay."""
    for path in folder.rglob(f".*{SUFFIX}"):
        with suppress(FileNotFoundError):  # finished by its process a moment ago
            handle = os.open(path, os.O_RDONLY)
            try:
                if _locked(handle):
                    path.unlink()
            finally:
                os.close(handle)


def _locked(handle: int) -> bool:
    """Lock an open file for this process; False where another one has done so, or the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

"""Files that are complete or not there."""

import os
import signal
import subprocess
import sys

import pytest

from qdiff.utils.atomic import atomic, remove_leftovers

KILLED = """
import os, signal, sys
from qdiff.utils.atomic import atomic
with atomic(sys.argv[1]) as one, atomic(sys.argv[2]) as other:
    one.write_text("half")
    other.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("former", [None, "old"], ids=["new", "overwriting"])
def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path, former):
    path = tmp_path / "notes.txt"
    if former:
        path.write_text(former)
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [p.read_text() for p in tmp_path.iterdir()] == ([former] if former else [])


def test_the_temporary_file_is_in_the_same_folder(tmp_path):
    with atomic(tmp_path / "a.bin") as temporary:
        assert temporary.parent == tmp_path and temporary.name.startswith(".")
        assert not (tmp_path / "a.bin").exists()


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    """A file that is being written is locked by its process, so it stays."""
    files = [tmp_path / name for name in ("img/0.png", "notes.txt")]
    assert subprocess.run([sys.executable, "-c", KILLED, *files], check=False).returncode == -signal.SIGKILL
    (tmp_path / "img" / "1.png").write_text("whole")
    (tmp_path / ".hidden").write_text("a user's")
    assert len(list(tmp_path.rglob(".*.tmp"))) == 2
    with atomic(tmp_path / "img" / "2.png") as temporary:
        temporary.write_text("whole too")
        remove_leftovers(tmp_path)
        assert [path.name for path in tmp_path.rglob(".*.tmp")] == [temporary.name]
    assert sorted(os.listdir(tmp_path)) == [".hidden", "img"]
    assert sorted(os.listdir(tmp_path / "img")) == ["1.png", "2.png"]

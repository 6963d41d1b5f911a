"""Atomic writing and safe reading."""

import os
import pickle
import re
import stat

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file

import qdiff.utils.files
from qdiff.utils.files import load_pickle, save_pickle, save_safetensors, sole_user, write_text


class Foreign:
    """Stands for any object a pickle may bring along."""


def test_a_file_appears_complete_with_ordinary_permissions(tmp_path):
    path = tmp_path / "new" / "folder" / "notes.txt"
    write_text(path, "größer\n")
    assert path.read_text(encoding="utf8") == "größer\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(path.parent) == ["notes.txt"]


def test_safetensors_keep_tensors_and_metadata(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.ones(2, requires_grad=True)}
    save_safetensors(tensors, tmp_path / "a.safetensors", {"key": "value"})
    back = load_file(tmp_path / "a.safetensors")
    assert back["a"].tolist() == [[0, 3], [1, 4], [2, 5]] and back["b"].tolist() == [1, 1]


def test_safetensors_that_fail_to_be_written_leave_nothing(tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(qdiff.utils.files, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_safetensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_comes_back(tmp_path):
    save_pickle({"xs": [torch.ones(2)], "n": 3}, tmp_path / "a.pt")
    back = load_pickle(tmp_path / "a.pt", "calibration data")
    assert back["n"] == 3 and torch.equal(back["xs"][0], torch.ones(2))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt: no such calibration data"):
        load_pickle(tmp_path / "nowhere.pt", "calibration data")
    with pytest.raises(FileNotFoundError, match="no such calibration data"):
        load_pickle(tmp_path, "calibration data")  # a folder


@pytest.mark.parametrize(
    "content",
    [Foreign(), {"a": torch.ones(1), Foreign: 1}, {"f": os.path.join}, {"f": os.system}],
    ids=["object", "class", "function", "blocked-module"],
)
def test_a_foreign_object_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    with pytest.raises(ValueError) as error:
        load_pickle(path, "checkpoint")
    message = str(error.value)
    assert message.startswith(f"{path}: not a readable checkpoint") and "\n" not in message
    assert re.search(r"it holds an object of .*(Foreign|posixpath\.join|posix\.system),", message), message


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_that_runs_code_is_not_run(tmp_path, protocol):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_pickle(path, "checkpoint")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_damaged_files_give_one_clear_error(tmp_path, data):
    """Cut anywhere, or any bytes: never another kind of error, which would reach people as a traceback."""
    path = tmp_path / "a.pt"
    kind = data.draw(st.sampled_from(["cut", "cut pickle", "bytes", "flipped"]))
    if kind == "bytes":
        content = data.draw(st.binary(max_size=80))
    elif kind == "cut pickle":
        content = pickle.dumps({"a": [1, 2.5, "text"] * 4, 3: b"x"}, protocol=data.draw(st.integers(0, 4)))
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        save_pickle({"weight": torch.arange(50.0), "names": ["a", "b"]}, path)
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if kind == "cut":
            content = content[:place]
        else:
            content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        load_pickle(path, "checkpoint")
    except ValueError as error:
        assert str(error).startswith(f"{path}: not a readable checkpoint") and "\n" not in str(error)
    else:
        assert kind in ("flipped", "bytes")  # a flipped bit of a value, or bytes that happen to be a pickle


WRITERS = {
    "a.txt": lambda path: write_text(path, "x" * 2**15),
    "a.pt": lambda path: save_pickle({"long": torch.ones(2**14)}, path),
    "b.pt": lambda path: save_pickle({"text": "x" * 2**15}, path),
    "a.safetensors": lambda path: save_safetensors({"long": torch.ones(2**14)}, path, {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_refuses_is_an_os_error_that_names_the_file(tmp_path, smaller_files, name):
    """Where no disk can be filled: files of 16 KiB may be written and no larger ones."""
    with smaller_files(2**14), pytest.raises(OSError) as error:
        WRITERS[name](tmp_path / name)
    assert "File too large" in str(error.value) and str(tmp_path / name) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_one_user_at_a_time(tmp_path):
    with sole_user(tmp_path):
        with pytest.raises(ValueError, match="another process is at work in this folder"), sole_user(tmp_path):
            pytest.fail("two users")
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), sole_user(tmp_path):
        raise KeyError
    with sole_user(tmp_path):
        pass

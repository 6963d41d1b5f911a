"""Answers are kept in a file that processes share; the first one stands, and damage costs a warning only."""

import json
import logging
import threading

import pytest

from qdiff.utils.measurement_cache import MeasurementCache, cache_folder, hash_of_sources, milliseconds


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "times.json"


def test_what_was_added_comes_back(path):
    kept = MeasurementCache(path, milliseconds)
    assert kept.get("layer") is None
    assert kept.add("layer", {"integer": 1.5, "16-bit eager": 2.0}) == {"integer": 1.5, "16-bit eager": 2.0}
    again = MeasurementCache(path, milliseconds)
    assert again.get("layer") == {"integer": 1.5, "16-bit eager": 2.0} and again.get("other") is None


def test_the_first_of_two_processes_is_right_and_both_keep_their_answers(path):
    one, other = MeasurementCache(path, milliseconds), MeasurementCache(path, milliseconds)
    one.add("both", {"integer": 1.0})
    assert other.add("both", {"integer": 9.0}) == {"integer": 1.0} == other.get("both")
    other.add("own", {"integer": 3.0})
    assert MeasurementCache(path, milliseconds).get("own") == {"integer": 3.0}
    assert MeasurementCache(path, milliseconds).get("both") == {"integer": 1.0}


def test_nothing_is_lost_where_many_write_at_once(path):
    def write(number):
        MeasurementCache(path, milliseconds).add(f"key {number}", {"ms": number})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(path.read_text()) == {f"key {number}": {"ms": number} for number in range(16)}


@pytest.mark.parametrize("content", ["{", "[1]", '{"layer": {"ms": "x"}}', '{"layer": 3}', b"\xff"])
def test_a_damaged_file_is_measured_anew_with_a_warning(content, path, caplog):
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING):
        kept = MeasurementCache(path, milliseconds)
    assert f"{path}: not readable" in caplog.text
    assert kept.add("layer", {"ms": 1.0}) == {"ms": 1.0} == MeasurementCache(path, milliseconds).get("layer")


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    kept = MeasurementCache(tmp_path / "file" / "times.json", milliseconds)
    with caplog.at_level(logging.WARNING):
        assert kept.add("layer", {"ms": 1.0}) == {"ms": 1.0} == kept.get("layer")
    assert "what was measured is not kept" in caplog.text


def test_the_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("QDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "qdiff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "qdiff")


def test_other_sources_have_another_hash(tmp_path):
    (tmp_path / "a.py").write_text("1")
    before = hash_of_sources([tmp_path / "a.py"])
    assert before == hash_of_sources([tmp_path / "a.py"])
    (tmp_path / "a.py").write_text("2")
    assert hash_of_sources([tmp_path / "a.py"]) != before

"""Configurations are timed once, kept in a file, and a damaged file costs a warning only."""

import json
import logging

import pytest

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from qdiff.deploy.kernels.tuning import Config, Tuner, bucket, fitting

SLOW, FAST, HUGE = Config(16, 16, 32), Config(64, 64, 64), Config(512, 512, 512)
TIMES = {SLOW: 2.0, FAST: 1.0}


@pytest.fixture
def timed():
    """(timer, launch, what was timed): a launch leaves its time, HUGE does not fit the chip."""
    seen = []

    def launch(config):
        if config == HUGE:
            raise OutOfResources(300000, 232448, "shared memory")
        seen.append(config)

    def timer(run):
        run()
        return TIMES[seen[-1]]

    return timer, launch, seen


def test_the_fastest_is_taken_and_remembered(timed, tmp_path):
    timer, launch, seen = timed
    path = tmp_path / "folder" / "kernels.json"
    tuner = Tuner(path, "a chip", timer)
    assert tuner.choose("product", (8, 3), (HUGE, SLOW, FAST), launch) == FAST
    assert seen == [SLOW, FAST]
    assert tuner.choose("product", (8, 3), (SLOW, FAST), launch) == FAST
    assert Tuner(path, "a chip", timer).choose("product", (8, 3), (SLOW,), launch) == FAST
    assert len(seen) == 2
    assert Tuner(path, "another chip", timer).choose("product", (8, 3), (SLOW,), launch) == SLOW
    assert tuner.choose("product", (8, 4), (SLOW,), launch) == SLOW
    keys = list(json.loads(path.read_text()))
    assert len(keys) == 3 and all("triton" in key and "product" in key for key in keys)


def test_two_processes_keep_what_both_found(timed, tmp_path):
    timer, launch, _ = timed
    first, second = (Tuner(tmp_path / "kernels.json", "a chip", timer) for _ in range(2))
    first.choose("product", (1,), (SLOW,), launch)
    second.choose("product", (2,), (SLOW,), launch)
    assert len(json.loads((tmp_path / "kernels.json").read_text())) == 2


def test_without_a_timer_the_first_is_taken_and_not_kept(timed, tmp_path):
    tuner = Tuner(tmp_path / "kernels.json", "a chip", None)
    assert tuner.choose("product", (1,), (SLOW, FAST), timed[1]) == SLOW
    assert not (tmp_path / "kernels.json").exists() and not timed[2]


def test_where_none_runs_the_reason_is_raised(timed, tmp_path):
    with pytest.raises(OutOfResources, match="shared memory"):
        Tuner(tmp_path / "kernels.json", "a chip", timed[0]).choose("product", (1,), (HUGE,), timed[1])


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"key": {"block_m": "x"}}', '{"key": {"rows": 1}}', '{"key": 3}', b"\xff"]
)
def test_a_damaged_file_is_ignored_with_a_warning(content, timed, tmp_path, caplog):
    path = tmp_path / "kernels.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING):
        tuner = Tuner(path, "a chip", timed[0])
        assert str(path) in caplog.text
        assert tuner.choose("product", (1,), (SLOW, FAST), timed[1]) == FAST
    assert len(json.loads(path.read_text())) == 1


def test_sizes_that_share_a_choice():
    assert [bucket(n) for n in (1, 5, 8, 9)] == [1, 8, 8, 16]


def test_tiles_mostly_outside_the_product_are_not_tried():
    tiles = (HUGE, FAST, SLOW)
    assert fitting(tiles, 4096, 320) == list(tiles)
    assert fitting(tiles, 4096, 33) == [FAST, SLOW]
    assert fitting(tiles, 2, 3) == [SLOW]

"""make_calibration_data.py: shards and the original's file, interrupted and continued, other settings refused."""

import shutil
import signal
import subprocess
import time

import pytest
import torch
from running import ENVIRONMENT, call, command, passed, refused, tree

from qdiff.calibration.trajectories import load_trajectories, original_layout, shard_path, shard_provenance
from qdiff.cli import record as make_calibration_data

SHARDS = [f"shard_{i:05d}.safetensors" for i in range(3)]


def test_a_folder_of_shards(data, tmp_path):
    """Once more: the same bytes."""
    result = passed(call("make_calibration_data", *data.flags, "--out", "shards"))
    assert result.out == "shards: 5 samples of 4 steps\n" and result.bars == ["calibration data"]
    assert sorted(tree(tmp_path / "shards")) == SHARDS
    assert tree(tmp_path / "shards") == tree(data.shards)
    log = (tmp_path / "shards" / "run.log").read_text()
    assert "command: " in log and "--n_samples 5" in log and f"{SHARDS[2]}: 1 samples, 4 steps" in log


def test_what_is_recorded(data):
    found = load_trajectories(data.shards, (3, 16, 16))
    assert (found.steps, found.samples, found.timesteps.tolist()) == (4, 5, [750, 500, 250, 0])
    about = shard_provenance(shard_path(data.shards, 0))
    assert about["seed"] == 1234 and about["source"] == "tiny.safetensors" and len(about["source_sha256"]) == 64


def test_the_originals_file_holds_the_same(data):
    content = torch.load(data.file, weights_only=True)
    assert {key: tuple(value.shape) for key, value in content.items()} == {"xs": (4, 5, 3, 16, 16), "ts": (4, 5)}
    for key, value in original_layout(load_trajectories(data.shards)).items():
        assert torch.equal(value, content[key])
    assert [path.name for path in data.file.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_shard_alone_is_made_again(data, tmp_path, missing):
    shutil.copytree(data.shards, tmp_path / "shards")
    before = {name: (tmp_path / "shards" / name).stat().st_mtime_ns for name in SHARDS}
    (tmp_path / "shards" / SHARDS[missing]).unlink()
    passed(call("make_calibration_data", *data.flags, "--out", tmp_path / "shards"))
    assert tree(tmp_path / "shards") == tree(data.shards)
    after = {name: (tmp_path / "shards" / name).stat().st_mtime_ns for name in SHARDS}
    assert [name for name in SHARDS if after[name] != before[name]] == [SHARDS[missing]]


@pytest.mark.parametrize("name", ["shards", "data.pt"])
def test_an_interrupted_recording_goes_on_where_it_stopped(data, tmp_path, monkeypatch, name):
    made, save_shard = [], make_calibration_data.save_shard

    def save(part, path, provenance):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        save_shard(part, path, provenance)

    with monkeypatch.context() as patch:
        patch.setattr(make_calibration_data, "save_shard", save)
        assert call("make_calibration_data", *data.flags, "--out", tmp_path / name).code == 130
    assert made == SHARDS[:2] and not (tmp_path / "data.pt").exists()
    passed(call("make_calibration_data", *data.flags, "--out", tmp_path / name))
    if name == "shards":
        assert tree(tmp_path / name) == tree(data.shards)
    else:
        assert tree(tmp_path) == {"data.pt": data.file.read_bytes()}


@pytest.mark.long
def test_a_killed_recording_goes_on_where_it_stopped(tiny, tmp_path):
    flags = (*tiny.model, "--timesteps", 10, "--n_samples", 8, "--batch_size", 1)
    arguments = command("make_calibration_data", *flags, "--out", tmp_path / "killed")
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not shard_path(tmp_path / "killed", 0).exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survived = {name: bytes_ for name, bytes_ in tree(tmp_path / "killed").items() if name.startswith("shard")}
    assert 1 <= len(survived) < 8
    for out in ("killed", "whole"):
        passed(call("make_calibration_data", *flags, "--out", tmp_path / out))
    whole, killed = tree(tmp_path / "whole"), tree(tmp_path / "killed")
    assert len(whole) == 8 and {name: killed[name] for name in whole} == whole
    assert all(whole[name] == bytes_ for name, bytes_ in survived.items())


def test_a_finished_recording_is_left_alone(data, tmp_path):
    shutil.copytree(data.shards, tmp_path / "shards")
    shutil.copy(data.file, tmp_path / "data.pt")
    before = tree(tmp_path)
    passed(call("make_calibration_data", *data.flags, "--out", tmp_path / "shards"))
    refused(call("make_calibration_data", *data.flags, "--out", "data.pt"), "--out data.pt", "exists already")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (("--seed", 1), "seed 1234"),
        (("--n_samples", 6), "n_samples 5"),
        (("--batch_size", 3), "batch_size 2"),
        (("--timesteps", 5), "steps 4"),
        (("--skip_type", "quad"), "skip_type 'uniform'"),
        (("--sample_type", "ddpm_noisy"), "sampler 'generalized'"),
        (("--eta", 0.5), "eta 0.0"),
    ],
    ids=["seed", "n_samples", "batch_size", "timesteps", "skip_type", "sample_type", "eta"],
)
def test_other_settings_in_the_same_folder_are_refused(data, tmp_path, flags, key):
    shutil.copytree(data.shards, tmp_path / "shards")
    before = tree(tmp_path)
    result = call("make_calibration_data", *data.flags, *flags, "--out", tmp_path / "shards")
    refused(result, SHARDS[0], f"made with {key}", "this run has", "--out")
    assert tree(tmp_path) == before


def test_other_weights_in_the_same_folder_are_refused(tiny, data, tmp_path):
    shutil.copytree(data.shards, tmp_path / "shards")
    shutil.copy(tiny.weights, tmp_path / "mine.safetensors")
    result = call("make_calibration_data", *data.flags, "--ckpt", "mine.safetensors", "--out", tmp_path / "shards")
    refused(result, SHARDS[0], "source 'tiny.safetensors'", "'mine.safetensors'")


def test_a_damaged_shard_is_named_and_kept(data, tmp_path):
    shutil.copytree(data.shards, tmp_path / "shards")
    (tmp_path / "shards" / SHARDS[1]).write_bytes(b"damaged")
    before = tree(tmp_path)
    refused(call("make_calibration_data", *data.flags, "--out", tmp_path / "shards"), SHARDS[1], "not a readable")
    assert tree(tmp_path) == before


def test_dry_run_writes_nothing(data, tmp_path):
    result = passed(call("make_calibration_data", *data.flags, "--out", "shards", "--dry_run"))
    assert "n_samples: 5" in result.out and tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--out", "x", "--n_samples", 0), ("--n_samples", "at least 1", "'0'")),
        (("--out", "x", "--batch_size", -1), ("--batch_size", "at least 1", "'-1'")),
        (("--out", "x", "--timesteps", 2000), ("--timesteps 2000", "1000")),
        (("--out", "x", "--device", "nonsense"), ("--device nonsense",)),
        (("--out", "x", "--seed", -1), ("--seed", "'-1'")),
        (("--out", "x", "--ckpt", "nope.pt"), ("nope.pt: no such",)),
        (("--out", "a-file"), ("a-file",)),
        (("--out", "a-file/x"), ("a-file/x",)),
        (("--out", "a-file/x.pt"), ("a-file",)),
        ((), ("--out", "required")),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, tuple) and value and value[0] == "--out" else None,
)
def test_bad_input(tiny, tmp_path, flags, parts):
    (tmp_path / "a-file").touch()
    refused(call("make_calibration_data", *tiny.model, "--timesteps", 4, "--n_samples", 2, *flags), *parts)
    assert tree(tmp_path) == {"a-file": b""}

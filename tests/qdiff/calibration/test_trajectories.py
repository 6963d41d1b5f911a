"""Recorded sampling states: recorded, streamed to disk, read back, and refused where they are not what they seem."""

import pickle
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from qdiff.calibration.trajectories import (
    Recorder,
    Trajectories,
    concatenate,
    load_trajectories,
    original_layout,
    save_shard,
    shard_path,
    shard_provenance,
)


@dataclass
class Call:
    step: int
    t: torch.Tensor
    x: torch.Tensor


def some(samples=2, steps=3, seed=0, **extra):
    generator = torch.Generator().manual_seed(seed)
    xs = tuple(torch.randn(samples, 3, 4, 4, generator=generator) for _ in range(steps))
    return Trajectories(xs, tuple(torch.full((samples,), 900.5 - 300 * s) for s in range(steps)), extra)


def assert_equal(mine, theirs):
    for column, other in ((mine.xs, theirs.xs), (mine.ts, theirs.ts)):
        assert len(column) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(column, other, strict=True))
    assert mine.extra.keys() == theirs.extra.keys()


def test_a_recorder_keeps_every_call_apart_from_what_becomes_of_its_tensors():
    recorder, x = Recorder(), torch.zeros(2, 3, 4, 4)
    for step, t in enumerate((800.0, 400.0)):
        recorder.add(Call(step, torch.full((2,), t), x))
        x += 1
    found = recorder.trajectories()
    assert (found.steps, found.samples) == (2, 2)
    assert [x.unique().item() for x in found.xs] == [0, 1]
    assert found.timesteps.tolist() == [800, 400]


def test_batches_of_samples_become_one():
    joined = concatenate([some(2, seed=0), some(3, seed=1)])
    assert (joined.steps, joined.samples) == (3, 5)
    assert torch.equal(joined.xs[1][2:], some(3, seed=1).xs[1])
    with pytest.raises(ValueError, match=r"different lengths: \[2, 3\] steps"):
        concatenate([some(steps=2), some(steps=3)])


def test_shards_are_read_back_in_their_order(tmp_path):
    parts = [some(2, seed=i) for i in range(11)]
    for i, part in reversed(list(enumerate(parts))):
        save_shard(part, shard_path(tmp_path, i), {"sampler": "ddim"})
    assert_equal(load_trajectories(tmp_path), concatenate(parts))
    assert_equal(load_trajectories(shard_path(tmp_path, 10)), parts[10])
    assert shard_provenance(shard_path(tmp_path, 3)) == {"sampler": "ddim"}


def test_conditioning_is_kept(tmp_path):
    cs = tuple(torch.full((2, 5, 8), float(s)) for s in range(3))
    save_shard(some(cs=cs), tmp_path / "shard_00000.safetensors", {})
    found = load_trajectories(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(found.extra["cs"], cs, strict=True))


@pytest.mark.parametrize("form", ["lists", "stacked"])
def test_the_originals_file_is_read_in_both_its_forms(tmp_path, form):
    expected = some()
    content = original_layout(expected) if form == "stacked" else {"xs": list(expected.xs), "ts": list(expected.ts)}
    torch.save(content, tmp_path / "data.pt")
    assert_equal(load_trajectories(tmp_path / "data.pt", (3, 4, 4)), expected)


def test_the_originals_layout_is_plain_stacked_tensors():
    layout = original_layout(some(cs=tuple(torch.zeros(2, 5, 8) for _ in range(3))))
    assert {k: tuple(v.shape) for k, v in layout.items()} == {"xs": (3, 2, 3, 4, 4), "ts": (3, 2), "cs": (3, 2, 5, 8)}


def test_a_network_that_takes_other_images_is_told(tmp_path):
    torch.save(original_layout(some()), tmp_path / "data.pt")
    with pytest.raises(ValueError, match=r"data.pt: expected .* shape \(3, 32, 32\), found \(3, 4, 4\)"):
        load_trajectories(tmp_path / "data.pt", (3, 32, 32))


def write_original(content):
    return lambda path: torch.save(content, path)


class Foreign:
    """Stands for any object a pickle may bring along."""


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pt", write_original({"xs": torch.zeros(2, 1, 3, 4, 4)}), r"expected calibration data with xs and ts"),
        ("a.pt", write_original([torch.zeros(2)]), "expected calibration data with xs and ts, found list"),
        ("a.pt", write_original({"xs": [], "ts": []}), "as many steps in every column"),
        ("a.pt", write_original({"xs": torch.zeros(2, 1, 3, 4, 4), "ts": torch.zeros(3, 1)}), "as many steps"),
        ("a.pt", write_original({"xs": torch.zeros(2, 1, 3, 4), "ts": torch.zeros(2, 1)}), r"xs \[N, C, H, W\]"),
        ("a.pt", write_original({"xs": torch.zeros(2, 1, 3, 4, 4), "ts": torch.zeros(2, 3)}), r"and ts \[N\]"),
        ("a.pt", write_original({"xs": [Foreign()], "ts": []}), r"it holds an object of .*Foreign"),
        ("a.pt", lambda path: path.write_bytes(b"PK\x03\x04 cut"), "truncated or not a PyTorch file"),
        ("a.safetensors", lambda path: path.write_bytes(b"cut"), "not a readable trajectory shard"),
        ("a.safetensors", lambda path: path.write_bytes(pickle.dumps(3)), "not a readable trajectory shard"),
        ("a.safetensors", lambda path: save_file({"xs": torch.zeros(1)}, path), "found another safetensors file"),
    ],
    ids=[
        "no-ts", "list", "empty", "lengths", "dimensions", "samples", "foreign", "cut", "cut-shard", "pickle", "float",
    ],
)  # fmt: skip
def test_other_files_are_refused_by_name(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        load_trajectories(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_data_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt: no such calibration data"):
        load_trajectories(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match="expected shard_.*found none"):
        load_trajectories(tmp_path)

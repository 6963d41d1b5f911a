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
from qdiff.utils.files import save_pickle


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
    for key, column in mine.extra.items():
        assert len(column) == len(theirs.extra[key])
        assert all(torch.equal(a, b) for a, b in zip(column, theirs.extra[key], strict=True)), key


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


# Conditioning


def varying(samples=2, steps=3, seed=0):
    """An embedding [5, 8] of each sample that differs from step to step, as the original stores them."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(samples, 5, 8, generator=generator) for _ in range(steps))


def constant(samples=2, steps=3, seed=0):
    """The same embedding at every step, as our own samplers record them."""
    return varying(samples, 1, seed) * steps


@pytest.mark.parametrize("make", [varying, constant])
@pytest.mark.parametrize("layout", ["shards", "stacked", "lists"])
def test_conditioning_comes_back_in_every_layout(tmp_path, make, layout):
    parts = [some(2, seed=i, cs=make(seed=i), ucs=make(seed=9)) for i in range(3)]
    expected = concatenate(parts)
    assert expected.samples == 6 and expected.extra["cs"][2].shape == (6, 5, 8)
    assert torch.equal(expected.extra["cs"][2][2:4], parts[1].extra["cs"][2])
    path = tmp_path
    if layout == "shards":
        for i, part in enumerate(parts):
            save_shard(part, shard_path(tmp_path, i), {})
    else:
        path = tmp_path / "data.pt"
        content = original_layout(expected)
        if layout == "lists":
            content = {key: list(column) for key, column in content.items()}
        torch.save(content, path)
    assert_equal(load_trajectories(path, (3, 4, 4)), expected)


def test_a_recorder_keeps_one_conditioning_for_all_steps_and_the_first_call_of_each(tmp_path):
    recorder = Recorder()
    for number, step in enumerate((0, 0, 1, 2)):  # PLMS asks twice in its first step
        recorder.add(Call(step, torch.full((2,), 900.0 - step), torch.full((2, 3, 4, 4), float(number))))
    cs = torch.randn(2, 5, 8).requires_grad_()
    found = recorder.trajectories(cs=cs, ucs=torch.zeros(2, 5, 8))
    assert [x.unique().item() for x in found.xs] == [0, 2, 3] and found.timesteps.tolist() == [900, 899, 898]
    assert list(found.extra) == ["cs", "ucs"] and [len(column) for column in found.extra.values()] == [3, 3]
    assert all(torch.equal(step, cs) and not step.requires_grad for step in found.extra["cs"])


@pytest.mark.parametrize("layout", ["shard", "original"])
def test_constant_conditioning_is_stored_once(tmp_path, layout):
    """Stored for each of 200 steps, these embeddings alone would take 6.4 MB."""
    data = some(2, 200, cs=(torch.randn(2, 50, 40),) * 200, ucs=(torch.zeros(2, 50, 40),) * 200)
    path = tmp_path / ("shard_00000.safetensors" if layout == "shard" else "data.pt")
    if layout == "shard":
        save_shard(data, path, {})
    else:
        save_pickle(original_layout(data), path)
    states = 200 * 2 * (3 * 4 * 4 + 1) * 4
    assert path.stat().st_size < states + 2 * 2 * 50 * 40 * 4 + 20_000
    assert_equal(load_trajectories(path), data)


def test_constant_conditioning_stays_small_in_memory():
    """Joined batches of seeds hold one tensor for all steps, in the original's layout as well."""
    joined = concatenate([some(2, 50, cs=constant(2, 50, seed)) for seed in range(3)])
    assert len({step.data_ptr() for step in joined.extra["cs"]}) == 1
    layout = original_layout(joined)
    assert layout["cs"].shape == (50, 6, 5, 8) and layout["cs"].untyped_storage().nbytes() == 6 * 5 * 8 * 4


def test_the_originals_file_is_indexed_by_step_then_sample(tmp_path):
    """formats §3: xs[S][N, ...], ts[S][N], cs[S][N, L, D], ucs[S][N, L, D]."""
    content = {
        "xs": torch.randn(3, 2, 3, 4, 4), "ts": torch.tensor([[900, 900], [600, 600], [300, 300]]),
        "cs": torch.randn(3, 2, 5, 8), "ucs": torch.randn(3, 2, 5, 8),
    }  # fmt: skip
    torch.save(content, tmp_path / "data.pt")
    found = load_trajectories(tmp_path / "data.pt", (3, 4, 4))
    assert (found.steps, found.samples) == (3, 2) and found.timesteps.tolist() == [900, 600, 300]
    for step in range(3):
        assert torch.equal(found.xs[step], content["xs"][step])
        assert all(torch.equal(found.extra[key][step], content[key][step]) for key in ("cs", "ucs"))


def wrong(**changes):
    columns = {"xs": torch.zeros(3, 2, 3, 4, 4), "ts": torch.zeros(3, 2), "cs": torch.zeros(3, 2, 5, 8)}
    return columns | {"ucs": torch.zeros(3, 2, 5, 8)} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (wrong(cs=torch.zeros(3, 4, 5, 8)), r"expected cs of 2 samples, found shape \(4, 5, 8\)"),
        (wrong(ucs=torch.zeros(3, 1, 5, 8)), r"expected ucs of 2 samples, found shape \(1, 5, 8\)"),
        (wrong(cs=torch.zeros(2, 2, 5, 8)), "as many steps in every column, found .*'cs': 2"),
        (wrong(cs=torch.zeros(3)), r"expected cs of 2 samples, found shape \(\)"),
        (wrong(cs="a cat"), "expected cs to be a list of tensors or one stacked tensor"),
        (wrong(ucs=None), "expected ucs to be a list of tensors or one stacked tensor"),
        (wrong(ucs=torch.zeros(3, 2, 4, 8)), r"expected ucs of shape \(2, 5, 8\), as cs, found \(2, 4, 8\)"),
        (
            wrong(cs=[torch.zeros(2, 5, 8), torch.zeros(2, 6, 8), torch.zeros(2, 5, 8)]),
            r"expected cs of shape \(2, 5, 8\) at every step, found \(2, 6, 8\)",
        ),
        (wrong(cs=torch.full((3, 2, 5, 8), float("nan"))), "expected finite cs"),
    ],
    ids=["samples", "ucs-samples", "steps", "scalars", "text", "none", "lengths", "lengths-of-steps", "nan"],
)
def test_conditioning_of_wrong_sizes_is_named(tmp_path, content, message):
    path = tmp_path / "data.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        load_trajectories(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("with_cs", [0, 1], ids=["first", "second"])
def test_shards_with_and_without_conditioning_are_not_joined(tmp_path, with_cs):
    for i in range(2):
        save_shard(some(cs=constant()) if i == with_cs else some(), shard_path(tmp_path, i), {})
    with pytest.raises(ValueError, match="conditioning") as error:
        load_trajectories(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_shards_of_other_lengths_are_named(tmp_path):
    for i in range(2):
        save_shard(some(steps=2 + i), shard_path(tmp_path, i), {})
    with pytest.raises(ValueError, match=r"different lengths: \[2, 3\] steps") as error:
        load_trajectories(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("layout", ["shard_00000.safetensors", "data.pt"])
def test_steps_in_another_order_are_sorted_with_a_warning(tmp_path, caplog, layout):
    """Selectors take the first step of every so many for the noisiest."""
    expected, order = some(steps=4, cs=varying(steps=4)), (2, 0, 3, 1)
    shuffled = Trajectories(
        *(tuple(column[i] for i in order) for column in (expected.xs, expected.ts)),
        {"cs": tuple(expected.extra["cs"][i] for i in order)},
    )
    path = tmp_path / layout
    if path.suffix == ".pt":
        save_pickle(original_layout(shuffled), path)
    else:
        save_shard(shuffled, path, {})
    assert_equal(load_trajectories(path), expected)
    warned = f"{path}: expected the noisiest step first, found t from 300.5 to 600.5; the steps are sorted by t"
    assert [record.getMessage() for record in caplog.records] == [warned]


def test_steps_that_share_a_time_keep_their_order(tmp_path, caplog):
    """A sampler may ask twice at one time."""
    twice = Trajectories(some().xs, tuple(torch.full((2,), t) for t in (900, 900, 300)), {})
    save_shard(twice, tmp_path / "shard_00000.safetensors", {})
    assert_equal(load_trajectories(tmp_path), twice)
    assert not caplog.records


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
        ("a.pt", write_original({"xs": torch.zeros(10**9, 0), "ts": []}), "at most 100000 steps in xs"),
        ("a.pt", write_original({"xs": [torch.zeros(9, 3, 9, 9)] * 9, "ts": torch.zeros(9, 9)}), "states of their own"),
        ("a.pt", write_original({"xs": torch.zeros(1).expand(2, 9, 3, 4, 4)}), "takes 1728 bytes, the file has 4"),
        ("a.pt", lambda path: path.write_bytes(b"PK\x03\x04 cut"), "truncated or not a PyTorch file"),
        ("a.safetensors", lambda path: path.write_bytes(b"cut"), "not a readable trajectory shard"),
        ("a.safetensors", lambda path: path.write_bytes(pickle.dumps(3)), "not a readable trajectory shard"),
        ("a.safetensors", lambda path: save_file({"xs": torch.zeros(1)}, path), "found another safetensors file"),
    ],
    ids=[
        "no-ts", "list", "empty", "lengths", "dimensions", "samples", "foreign",
        "steps", "one-state", "expanded", "cut", "cut-shard", "pickle", "float",
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

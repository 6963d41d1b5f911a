"""The record of an unfinished calibration: what a piece holds, damaged pieces, other plans, places that refuse."""

import copy
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file

from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.resume import PLAN, Record, differences, put_state, read_plan, state_of
from qdiff.nn.layers import act_quantizers, quant_layers
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.recipe import QuantSpec, Recipe, Rule, StepGroups
from qdiff.recipes.stages import ActivationRanges, CorrectBias, Learn, RangeSpec, Reconstruct, WeightRanges

ONE_LEVEL = {"ch_mult": [1], "attn_resolutions": [8]}
LEARNED = Reconstruct({"rounding": Learn(0.3), "bias": Learn(0.01)}, iterations=2, batch_size=8, keep="better")
PLAIN = Recipe(
    "plain",
    QuantSpec(4, axis="out_channel"),
    QuantSpec(8),
    split_shortcuts=True,
    stages=(WeightRanges(RangeSpec()), ActivationRanges(RangeSpec()), LEARNED, CorrectBias()),
)
FLOAT_LAYERS = (Rule("conv_in", 0, 0), Rule("*block_1*", 0), Rule("*block_2*", None, 0), Rule("*attn*", 8, 4))
RECIPES = {
    "split": PLAIN,
    "float-layers": replace(PLAIN, rules=FLOAT_LAYERS),
    "step-groups": replace(PLAIN, step_groups=StepGroups(3)),
    "input-channels": replace(PLAIN, activations=QuantSpec(6, "signed", "in_channel"), softmax=QuantSpec(8)),
    "one-scale": replace(PLAIN, weights=QuantSpec(6, "signed"), split_shortcuts=False),
    "float-activations": replace(PLAIN, activations=None, stages=(WeightRanges(RangeSpec()), LEARNED)),
}
PIECE = {"conv.codes": torch.arange(6, dtype=torch.int8), "conv.bias": torch.linspace(-1, 1, 3)}
NOTES = {"before": 0.1, "losses": [[0, 1.5], [1, 0.5]], "kept": True}


@pytest.fixture(scope="module")
def calibrated(make_network, adapter, states, timesteps):
    made = {}

    def make(name):
        if name not in made:
            made[name] = calibrate(make_network(32, **ONE_LEVEL), adapter, RECIPES[name], states, 0, timesteps).network
        return made[name]

    return make


@pytest.fixture
def fresh(make_network, adapter, timesteps):
    """name -> the network before its calibration."""
    return lambda name: insert_quantizers(make_network(32, **ONE_LEVEL), RECIPES[name], adapter, timesteps).eval()


def enabled(network):
    return [name for name, quantizer in act_quantizers(network).items() if quantizer.enabled]


# What a piece holds


@pytest.mark.parametrize("name", RECIPES)
def test_a_state_put_into_a_fresh_network_makes_the_same_one(calibrated, fresh, assert_same_numbers, name):
    source, network = calibrated(name), fresh(name)
    put_state(network, state_of(source, [""]))
    assert_same_numbers(network, source)
    assert enabled(network) == enabled(source)
    assert len(enabled(source)) == (0 if name == "float-activations" else len(act_quantizers(source)))


@pytest.mark.parametrize("name", ["split", "float-layers"])
def test_the_states_of_units_make_up_the_whole(calibrated, fresh, adapter, assert_same_numbers, name):
    source, network = calibrated(name), fresh(name)
    units = [segment.name for segment in adapter.chain(source)]
    pieces = [state_of(source, [unit]) for unit in units]
    whole = state_of(source, [""])
    assert sum(map(len, pieces)) == len(whole) and {key for piece in pieces for key in piece} == set(whole)
    for piece in reversed(pieces):
        put_state(network, piece)
    assert_same_numbers(network, source)


def test_a_piece_touches_its_modules_alone(calibrated, fresh, adapter):
    source, network = calibrated("split"), fresh("split")
    state = state_of(source, ["mid.block_1", "up.0.block.0.nin_shortcut"])
    assert all(key.startswith(("mid.block_1.", "up.0.block.0.nin_shortcut.")) for key in state)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    put_state(network, state)
    changed = {key for key, tensor in network.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed and all(key.startswith(("mid.block_1.", "up.0.block.0.nin_shortcut.")) for key in changed)
    assert not quant_layers(network)["conv_in"].frozen and quant_layers(network)["mid.block_1.conv1"].frozen


def test_a_state_is_a_copy(calibrated):
    network = copy.deepcopy(calibrated("split"))
    state = state_of(network, ["conv_in"])
    former = {key: tensor.clone() for key, tensor in state.items()}
    layer = network.conv_in
    layer.bias.add_(1)
    layer.act_quantizer.scale.mul_(2)
    layer.freeze(layer.codes * 0)
    assert not torch.equal(state_of(network, ["conv_in"])["conv_in.bias"], former["conv_in.bias"])
    assert state.keys() == {"conv_in.bias", "conv_in.weight_grids.0", "conv_in.codes", "conv_in.act_quantizer.act_grid"}
    assert all(torch.equal(state[key], tensor) for key, tensor in former.items())


def test_a_state_goes_through_a_file(calibrated, fresh, assert_same_numbers, tmp_path):
    source, network = calibrated("step-groups"), fresh("step-groups")
    Record(tmp_path).save(2, "", state_of(source, [""]), {})
    put_state(network, Record(tmp_path).load(2, "")[0])
    assert_same_numbers(network, source)


# Pieces


def assert_piece(found, tensors=PIECE, notes=NOTES):
    assert found[0].keys() == tensors.keys() and found[1] == notes
    assert all(torch.equal(found[0][key], tensor) for key, tensor in tensors.items())


def test_pieces_are_found_again(tmp_path):
    folder, plan = tmp_path / "new" / "record", {"seed": 3, "pair": (1, 2)}
    record = Record(folder, plan)
    assert len(record) == 0 and record.load(0, "") is None and not record.has(0, "")
    record.save(0, "", PIECE, NOTES)
    record.save(1, "mid.block_1", {}, {})
    record.save(2, "mid.block_1", {"a": torch.ones(2)}, {"kept": False})
    for again in (record, Record(folder, plan)):
        assert len(again) == 3
        assert_piece(again.load(0, ""))
        assert_piece(again.load(1, "mid.block_1"), {}, {})
        assert_piece(again.load(2, "mid.block_1"), {"a": torch.ones(2)}, {"kept": False})
        assert not again.has(1, "") and again.load(3, "mid.block_1") is None


def test_without_a_folder_nothing_is_kept():
    record = Record()
    record.save(0, "", PIECE, NOTES)
    record.remove()
    assert len(record) == 0 and record.load(0, "") is None


def test_who_does_not_lead_reads_and_writes_nothing(tmp_path):
    follower = Record(tmp_path, {"seed": 1}, is_main=False)
    follower.save(0, "", PIECE, NOTES)
    follower.remove()
    assert list(tmp_path.iterdir()) == []
    Record(tmp_path, {"seed": 1}).save(0, "", PIECE, NOTES)
    follower = Record(tmp_path, {"seed": 1}, is_main=False)
    follower.remove()
    assert_piece(follower.load(0, ""))


def test_removing_leaves_nothing_of_its_own(tmp_path):
    """Neither what a killed process left half-written; what others put there stays."""
    for other in (None, "states.safetensors"):
        folder = tmp_path / "record"
        record = Record(folder, {"seed": 1})
        record.save(0, "", PIECE, NOTES)
        (folder / ".00001.safetensors.x8fk2").write_bytes(b"half")
        if other:
            (folder / other).write_bytes(b"of somebody else")
        Record(folder, {"seed": 1}).remove()
        assert ([p.name for p in folder.iterdir()] == [other]) if other else not folder.exists()
    record.remove()  # again: nothing to do


# Damage


def test_half_written_files_are_no_pieces(tmp_path):
    Record(tmp_path).save(0, "", PIECE, NOTES)
    (tmp_path / ".00001.safetensors.x8fk2").write_bytes(b"half")
    (tmp_path / "states.safetensors").write_bytes(b"of somebody else")
    assert len(Record(tmp_path)) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.data())
def test_a_damaged_piece_is_named(tmp_path, data):
    folder = tmp_path / "record"
    record = Record(folder)
    record.save(0, "", PIECE, NOTES)
    record.save(1, "conv", PIECE, NOTES)
    path = folder / "00001.safetensors"
    whole, kind = path.read_bytes(), data.draw(st.sampled_from(["cut", "bytes", "longer", "foreign", "other notes"]))
    if kind == "cut":
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    elif kind == "bytes":
        path.write_bytes(data.draw(st.binary(max_size=60)))
    elif kind == "longer":
        path.write_bytes(whole + data.draw(st.binary(min_size=1, max_size=9)))
    elif kind == "foreign":
        save_file(PIECE, path)
    else:
        about = [1, "text", {}, {"stage": 1}, {"stage": "x", "unit": "conv", "notes": {}}, {"stage": 1, "unit": "conv"}]
        save_file(PIECE, path, {"qdiff": json.dumps(data.draw(st.sampled_from(about)))})
    with pytest.raises(ValueError, match="00001.safetensors: not a readable piece of a calibration"):
        Record(folder)
    record.remove()


def test_a_piece_that_was_deleted_is_made_anew_beside_the_others(tmp_path):
    """Its number may be free, or another piece's: none is overwritten."""
    record = Record(tmp_path)
    for unit in "abc":
        record.save(1, unit, {"x": torch.full((1,), ord(unit))}, {"unit": unit})
    (tmp_path / "00001.safetensors").unlink()
    record = Record(tmp_path)
    assert record.load(1, "b") is None
    for unit in "bde":
        record.save(1, unit, {"x": torch.full((1,), ord(unit))}, {"unit": unit})
    for again in (record, Record(tmp_path)):
        assert len(again) == 5
        for unit in "abcde":
            tensors, notes = again.load(1, unit)
            assert tensors["x"].item() == ord(unit) and notes == {"unit": unit}


# Plans


def test_the_plan_is_kept_beside_the_pieces(tmp_path):
    plan = {"seed": 1, "recipe": {"bits": (4, 8), "rate": 1e-3}, "none": None}
    assert read_plan(tmp_path) is None
    Record(tmp_path, plan)
    assert read_plan(tmp_path) == json.loads(json.dumps(plan))
    Record(tmp_path, plan)


def test_another_plan_is_refused_and_told_apart(tmp_path):
    plan = {"seed": 1, "recipe": {"stages": [{"rate": 0.1}, {"rate": 0.2}], "name": "quick"}}
    Record(tmp_path, plan).save(0, "", PIECE, NOTES)
    other = {"seed": 2, "recipe": {"stages": [{"rate": 0.1}, {"rate": 0.3}], "name": "quick"}}
    with pytest.raises(ValueError) as error:
        Record(tmp_path, other)
    assert str(error.value) == (
        f"{tmp_path}: holds an unfinished calibration of another plan: "
        "recipe.stages[1].rate: 0.2 there, 0.3 here; seed: 1 there, 2 here"
    )
    assert_piece(Record(tmp_path, plan).load(0, ""))  # untouched


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"not json"])
def test_a_damaged_plan_is_named(tmp_path, content):
    Record(tmp_path, {"seed": 1})
    (tmp_path / PLAN).write_bytes(content)
    with pytest.raises(ValueError, match=f"{PLAN}: not a readable plan"):
        Record(tmp_path, {"seed": 1})


@pytest.mark.parametrize(
    ("found", "wanted", "words"),
    [
        ({"a": 1}, {"a": 1}, ""),
        ({"a": 1}, {"a": 2}, "a: 1 there, 2 here"),
        ({"a": {"b": [1, {"c": "x"}]}}, {"a": {"b": [1, {"c": "y"}]}}, "a.b[1].c: 'x' there, 'y' here"),
        ({"a": [1]}, {"a": [1, 2]}, "a: [1] there, [1, 2] here"),
        ({"a": {"b": 1}}, {"a": None}, "a: {'b': 1} there, None here"),
        ({"a": None}, {}, "a: None there, nothing here"),
        ({}, {"b": None}, "b: nothing there, None here"),
        ({"a": 1, "b": 2}, {"a": 3, "b": 4}, "a: 1 there, 3 here; b: 2 there, 4 here"),
        (dict.fromkeys("abcdef", 0), dict.fromkeys("abcdef", 1), "d: 0 there, 1 here; and 2 more"),
    ],
)
def test_differences_in_words(found, wanted, words):
    assert differences(found, wanted).endswith(words) and bool(differences(found, wanted)) == bool(words)


def test_long_values_are_cut_short():
    assert len(differences({"a": "x" * 1000}, {"a": "y" * 1000})) < 200


# Places that refuse


@pytest.fixture
def nobody():
    """In the test's body this process has no more rights than anyone."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def closed():
    """A folder that may be read only, with a record of one piece."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "record"
        Record(folder, {"seed": 1}).save(0, "", PIECE, NOTES)
        os.chmod(name, 0o555)
        os.chmod(folder, 0o555)
        yield folder
        os.chmod(name, 0o755)
        os.chmod(folder, 0o755)


def test_a_read_only_folder_is_named_and_its_pieces_stay(closed, nobody):
    record = Record(closed, {"seed": 1})
    with pytest.raises(PermissionError) as error:
        record.save(1, "conv", PIECE, NOTES)
    assert str(closed) in str(error.value) and len(record) == 1
    with pytest.raises(PermissionError):
        Record(closed.parent / "new", {"seed": 1})
    assert_piece(Record(closed, {"seed": 1}).load(0, ""))


def test_a_disk_that_refuses_leaves_the_former_pieces_usable(tmp_path, smaller_files):
    """Where no disk can be filled: files of 16 KiB may be written and no larger ones."""
    record = Record(tmp_path, {"seed": 1})
    record.save(0, "", {"a": torch.ones(100)}, {})
    with smaller_files(2**14), pytest.raises(OSError, match="00001.safetensors: cannot be written") as error:
        record.save(1, "conv", {"a": torch.ones(2**14)}, {})
    assert "File too large" in str(error.value) and not record.has(1, "conv")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.safetensors", PLAN]
    record = Record(tmp_path, {"seed": 1})
    assert_piece(record.load(0, ""), {"a": torch.ones(100)}, {})
    record.save(1, "conv", PIECE, NOTES)
    assert_piece(Record(tmp_path, {"seed": 1}).load(1, "conv"))

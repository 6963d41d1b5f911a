"""Packed files that ask for more than they hold, or hold what makes no grid: refused in one line, at once."""

import json
import random
import resource
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qdiff.checkpoints.bounds import no_larger_than
from qdiff.checkpoints.native import load_checkpoint, read_about, save_checkpoint
from qdiff.recipes.recipe import QuantSpec, Recipe, StepGroups
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

W4A8 = Recipe(
    *("w4a8", QuantSpec(4, axis="out_channel"), QuantSpec(8)), stages=(WeightRanges(RangeSpec()), ActivationRanges())
)
SECONDS, KILOBYTES = 5, 2**18  # for what takes milliseconds; some memory for what PyTorch loads at first use


@pytest.fixture(scope="module")
def parts():
    """Of a checkpoint: its description and its tensors, once it has been written."""
    return {}


@pytest.fixture
def packed(parts, quantized, adapter, timesteps, tmp_path):
    """(description's changes, tensors' changes) -> the path of a checkpoint with them; None takes an entry out."""
    if not parts:
        path = tmp_path / "sound.safetensors"
        save_checkpoint(path, quantized(W4A8), adapter, W4A8, timesteps, {"seed": 0})
        parts.update(about=read_about(path), tensors=load_file(path))

    def write(about=None, tensors=None):
        path = tmp_path / "packed.safetensors"
        text = about if isinstance(about, str) else json.dumps(parts["about"] | {"digest": None} | (about or {}))
        save_file(parts["tensors"] | (tensors or {}), path, {"qdiff": text})
        return path

    write.parts = lambda: parts
    return write


def peak():
    """The most memory that the process had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def refused(path):
    """The one line that loading gives, soon and without much memory."""
    started, before = time.process_time(), peak()
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 1000
    assert time.process_time() - started < SECONDS and peak() - before < KILOBYTES
    return message


HUGE_CONFIGS = {
    "width": {"ch_mult": [1000000]},
    "levels": {"ch_mult": [1] * 10**6, "image_size": 2**62},
    "blocks": {"num_res_blocks": 10**9},
    "fewer-blocks": {"num_res_blocks": 10**5},
    "channels": {"in_channels": 2**40},
    "beyond-64-bits": {"ch": 32 * 10**30},
    "negative": {"in_channels": -3},
    "zero": {"ch": 0},
    "text": {"ch": "many"},
    "mapping": {"ch_mult": {"a": 1}},
    "fraction": {"num_res_blocks": 1.5},
    "timesteps": {"num_diffusion_timesteps": 10**9},
    "no-timesteps": {"num_diffusion_timesteps": -1},
    "half-a-timestep": {"num_diffusion_timesteps": 0.5},
}


@pytest.mark.parametrize("changes", HUGE_CONFIGS.values(), ids=HUGE_CONFIGS)
def test_a_network_larger_than_its_file_is_not_built(packed, changes):
    packed()
    config = packed.parts()["about"]["config"]
    message = refused(packed({"config": config | changes}))
    assert "its description does not make a network: " in message


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"timesteps": [0.0] * 10**5}, "timesteps: expected at most 33554, found 100000"),
        ({"timesteps": [[1.0], [2.0]]}, "timesteps: expected a list"),
        ({"timesteps": [1.0, float("nan")]}, "timesteps: expected a list of finite numbers"),
        ({"recipe": {"name": "x", "rules": [{"pattern": "conv_in"}] * 20000}}, "rules: expected at most 10000"),
        ({"recipe": {"name": ["x"] * 10**5}}, "recipe.name: expected str, found ['x', 'x', "),
    ],
    ids=["timesteps", "table", "not-finite", "rules", "name"],
)
def test_tables_larger_than_a_file_needs_are_not_made(packed, about, message):
    assert message in refused(packed(about))


def test_sets_of_scales_are_bounded_by_those_that_the_file_holds(packed):
    sets = 20000
    recipe = Recipe("many", activations=QuantSpec(8, axis="in_channel"), step_groups=StepGroups(sets))
    steps = [float(t % 1000) for t in range(sets)]
    message = refused(packed({"recipe": recipe.to_dict(), "timesteps": steps}))
    assert "step_groups: 20000 sets of" in message


@pytest.mark.parametrize("depth", [1000, 10**5])
def test_metadata_nested_too_deep_are_refused(packed, depth):
    assert "not a readable checkpoint" in refused(packed("[" * depth + "]" * depth))


VALUES = {
    "zero": (0.0, "expected scales above 0, found 0"),
    "negative": (-0.5, "expected scales above 0, found -0.5"),
    "nan": (float("nan"), "expected finite values, found nan"),
    "infinite": (float("inf"), "expected finite values, found inf"),
}


@pytest.mark.parametrize("key", ["conv_in.weight_quantizer.scale", "activation_scales"])
@pytest.mark.parametrize(("value", "message"), VALUES.values(), ids=VALUES)
def test_scales_that_make_no_grid_are_refused(packed, key, value, message):
    packed()
    tensor = packed.parts()["tensors"][key].clone()
    tensor.view(-1)[1] = value
    assert f"do not fit the network it describes: {key}: {message}" in refused(packed(tensors={key: tensor}))


def test_float_parts_that_are_not_finite_are_refused(packed):
    packed()
    tensor = packed.parts()["tensors"]["norm_out.weight"].clone()
    tensor[0] = float("nan")
    assert "norm_out.weight: expected finite values, found nan" in refused(packed(tensors={"norm_out.weight": tensor}))


@pytest.mark.parametrize(
    ("key", "dtype", "message"),
    [
        ("activation_zero_points", torch.float32, "expected activation_zero_points as I16 or I32, found F32"),
        ("weight_zero_points", torch.int64, "expected weight_zero_points as I16 or I32, found I64"),
        ("activation_scales", torch.int32, "expected activation_scales as F16 or BF16 or F32 or F64, found I32"),
        ("norm_out.weight", torch.int8, "expected norm_out.weight as F16 or BF16 or F32 or F64, found I8"),
        ("norm_out.weight", torch.float8_e4m3fn, "found F8_E4M3"),
        ("conv_in.codes", torch.int8, "expected conv_in.codes as U8, found I8"),
    ],
)
def test_numbers_of_another_type_are_refused(packed, key, dtype, message):
    packed()
    tensor = packed.parts()["tensors"][key].to(dtype)
    assert message in refused(packed(tensors={key: tensor}))


def test_a_network_that_would_be_refused_is_not_saved(quantized, adapter, tmp_path):
    network = quantized(W4A8)
    network.conv_in.weight_quantizer.scale[0] = 0.0
    with pytest.raises(ValueError, match=r"conv_in.weight_quantizer.scale: expected scales above 0, found 0"):
        save_checkpoint(tmp_path / "a.safetensors", network, adapter, W4A8, None, {})
    assert list(tmp_path.iterdir()) == []


def test_the_bound_ends_with_its_block():
    header = {"a": ("F32", [10])}
    with pytest.raises(ValueError, match="more parameters than its 1 tensors"), no_larger_than(header):
        torch.nn.Linear(10**4, 10**4, device="meta")
    torch.nn.Linear(10**4, 10**4, device="meta")


# Any change of the description or of the header

WRONG = (None, -1, 0, 10**9, 2**70, 1e300, float("nan"), "x" * 1000, [], {}, [[]], True, "\x1b[2J", [10**6] * 3)


def changed(value, chance):
    """A copy of plain data with one entry replaced, taken out or repeated."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        copy = {**value, key: changed(value[key], chance)}
        if chance.random() < 0.1:
            del copy[key]
        return copy
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        many = [value[place]] * chance.choice([0, 2, 1000])
        return value[:place] + chance.choice([many, [changed(value[place], chance)]]) + value[place + 1 :]
    return chance.choice(WRONG)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_any_change_of_the_description_is_refused_in_a_line_or_makes_a_network(packed):
    packed()
    parts, chance = packed.parts(), random.Random(0)
    structure = {key: parts["about"][key] for key in ("config", "recipe", "timesteps", "family")}
    longest, before = 0.0, peak()
    for _ in range(100):
        key = chance.choice(sorted(structure))
        path, started = packed({key: changed(structure[key], chance)}), time.process_time()
        try:
            load_checkpoint(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error) and len(str(error)) < 1000
        longest = max(longest, time.process_time() - started)
    assert longest < SECONDS and peak() - before < KILOBYTES


def test_any_change_of_the_header_is_refused_in_a_line(packed, tmp_path):
    content, chance, path = packed().read_bytes(), random.Random(1), tmp_path / "changed.safetensors"
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    names = sorted(header.keys() - {"__metadata__"})
    for _ in range(150):
        name = chance.choice(names)
        text = json.dumps(header | {name: changed(header[name], chance)}).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
        with pytest.raises(ValueError) as error:
            load_checkpoint(path)
        assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    with safe_open(packed(), "pt") as file:
        assert sorted(file.keys()) == names

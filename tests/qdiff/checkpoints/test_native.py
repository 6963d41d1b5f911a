"""The native checkpoint: what comes back is bit for bit what was saved, and whatever else is refused in one line."""

import json
import pickle
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qdiff.utils.files
from qdiff.checkpoints.native import load_checkpoint, read_about, save_checkpoint
from qdiff.deploy.convert import load_integer
from qdiff.nn.layers import act_quantizers, quant_layers
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.recipe import QuantSpec, Recipe, Rule, StepGroups
from qdiff.recipes.stages import GPTQ, ActivationRanges, RangeSpec, WeightRanges

ONE_LEVEL = {"ch_mult": [1], "attn_resolutions": [8]}
RANGES = (WeightRanges(RangeSpec()), ActivationRanges())
W4A8 = Recipe(
    "w4a8 signed split", QuantSpec(4, axis="out_channel"), QuantSpec(8, "signed"), split_shortcuts=True, stages=RANGES
)
RULES = (
    Rule("conv_*", 8, 8),
    Rule("mid.*", 2),
    Rule("temb.*", 0, 0),
    Rule("down.0.block.0.conv1", weight_bits=0),
    Rule("*.temb_proj", 5, 0),
)
RECIPES = [
    W4A8,
    Recipe("w3 affine", QuantSpec(3, axis="out_channel"), QuantSpec(6), stages=RANGES),
    Recipe("w8 only", QuantSpec(8, axis="out_channel"), stages=RANGES[:1]),
    replace(W4A8, name="mixed bits", rules=RULES),
    replace(W4A8, name="three groups", step_groups=StepGroups(3, "hold")),
    Recipe("signed per tensor", QuantSpec(5, "signed"), QuantSpec(4, axis="in_channel"), stages=RANGES),
    Recipe("eda-dm grids", QuantSpec(4, "unsigned_mid"), QuantSpec(8, "unsigned_mid"), stages=RANGES),
    replace(W4A8, name="16-bit softmax", softmax=QuantSpec(16, "unsigned")),
    replace(W4A8, name="symmetric softmax", compat=("symmetric_softmax",)),
    replace(W4A8, name="compensated", stages=(RANGES[0], GPTQ(rows=200), RANGES[1])),
]


@pytest.fixture
def saved(quantized, adapter, timesteps, tmp_path):
    """(recipe, ch) -> (network, path of its checkpoint)."""

    def save(recipe=W4A8, ch=32):
        network, path = quantized(recipe, ch, **ONE_LEVEL), tmp_path / "network.safetensors"
        save_checkpoint(path, network, adapter, recipe, timesteps, {"seed": 0, "source": "none"})
        return network, path

    return save


@pytest.fixture
def written(saved):
    """The bytes of a checkpoint."""
    return saved()[1].read_bytes()


def rewrite(path, about=None, tensors=lambda tensors: None):
    """Change a checkpoint's description and tensors."""
    changed = load_file(path)
    tensors(changed)
    save_file(changed, path, {"qdiff": json.dumps({**read_about(path), **(about or {})})})


# Round trips


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name.replace(" ", "-"))
def test_a_loaded_network_is_the_saved_one_bit_for_bit(saved, states, assert_same_numbers, recipe):
    network, path = saved(recipe)
    found = load_checkpoint(path)
    assert found.recipe == recipe
    assert_same_numbers(network, found.network)
    with torch.no_grad():
        assert torch.equal(found.network(states.x, states.t), network(states.x, states.t))


def test_sets_per_step_come_back_with_their_table(saved, assert_same_numbers, generator):
    network, path = saved(replace(W4A8, step_groups=StepGroups(3)), ch=64)
    found = load_checkpoint(path).network
    assert torch.equal(found.step_table.lookup, network.step_table.lookup)
    assert found.step_table.lookup.unique().tolist() == [0, 1, 2]
    x, t = torch.randn(5, 3, 8, 8, generator=generator), torch.tensor([999, 640, 333, 5, 700])
    with torch.no_grad():
        assert torch.equal(found(x, t), network(x, t))


def test_a_loaded_network_can_be_saved_again_to_the_same_bytes(saved, adapter, timesteps, tmp_path):
    network, path = saved()
    found = load_checkpoint(path)
    again = tmp_path / "again.safetensors"
    save_checkpoint(again, found.network, adapter, found.recipe, timesteps, {"seed": 0, "source": "none"})
    assert again.read_bytes() == path.read_bytes()


def test_a_loaded_network_is_ready_to_run(saved):
    network = load_checkpoint(saved()[1]).network
    assert not any(m.training for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    assert all(q.enabled for q in act_quantizers(network).values())
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_the_description_says_where_a_checkpoint_comes_from(saved, timesteps):
    from qdiff import __version__

    network, path = saved()
    about = read_about(path)
    assert about["seed"] == 0 and about["source"] == "none" and about["toolkit"] == __version__
    assert about["config"] == network.config and about["timesteps"] == timesteps.tolist()
    assert load_checkpoint(path).provenance["seed"] == 0


def test_quantized_weights_are_stored_as_packed_codes_and_never_as_floats(saved):
    network, path = saved(replace(W4A8, rules=RULES))
    with safe_open(path, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    for name, layer in quant_layers(network).items():
        if not layer.weight_quantizers:
            assert f"{name}.weight" in slices and f"{name}.codes" not in slices
            continue
        bits = layer.weight_quantizers[0].spec.bits
        assert f"{name}.weight" not in slices
        assert slices[f"{name}.codes"].get_shape() == [(layer.weight.numel() * bits + 7) // 8]
        assert slices[f"{name}.codes"].get_dtype() == "U8"
    zero_points = [s.get_dtype() for key, s in slices.items() if key.endswith("zero_points")]
    assert zero_points and all(dtype.startswith("I") for dtype in zero_points)


# Saving what cannot be saved


def test_an_uncalibrated_network_is_not_saved(network, adapter, tmp_path):
    insert_quantizers(network, W4A8, adapter)
    with pytest.raises(ValueError, match="temb.dense.0: its weight has no codes yet"):
        save_checkpoint(tmp_path / "a.safetensors", network, adapter, W4A8, None, {})
    for layer in quant_layers(network).values():
        layer.freeze(layer.nearest_codes(layer.weight))
    with pytest.raises(ValueError, match="temb.dense.0.act_quantizer: it has no range yet"):
        save_checkpoint(tmp_path / "a.safetensors", network, adapter, W4A8, None, {})
    assert list(tmp_path.iterdir()) == []


def test_zero_points_that_are_not_whole_are_not_rounded_away(quantized, adapter, tmp_path):
    network = quantized(W4A8, **ONE_LEVEL)
    network.conv_in.weight_quantizer.zero_point[0] += 0.5
    with pytest.raises(ValueError, match="conv_in.weight_quantizer.zero_point: expected whole numbers"):
        save_checkpoint(tmp_path / "a.safetensors", network, adapter, W4A8, None, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("former", [False, True], ids=["new", "overwriting"])
def test_a_save_that_is_cut_short_leaves_what_was_there(saved, quantized, adapter, monkeypatch, former, tmp_path):
    path = saved()[1] if former else tmp_path / "network.safetensors"
    before = path.read_bytes() if former else None

    def cut(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(qdiff.utils.files, "save_file", cut)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, quantized(W4A8, **ONE_LEVEL), adapter, W4A8, None, {})
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if former else [])


# Loading what is not a checkpoint


def refused(path):
    """The message of the one error that loading gives, checked to be one line that names the file."""
    with pytest.raises(ValueError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors: no such checkpoint"):
        load_checkpoint(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.9, 0.9999])
def test_a_truncated_file_is_refused(saved, share):
    path = saved()[1]
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "not a readable checkpoint (truncated, or of another kind)" in refused(path)


def test_a_float_safetensors_file_is_refused(tmp_path, network):
    path = tmp_path / "float.safetensors"
    save_file(dict(network.state_dict()), path)
    assert "found a safetensors file without our metadata" in refused(path)
    save_file(dict(network.state_dict()), path, {"format": "pt"})
    assert "found a safetensors file without our metadata" in refused(path)


def test_another_version_of_the_format_is_named(saved):
    path = saved()[1]
    rewrite(path, {"format": "qdiff-checkpoint-9"})
    expected = "expected a calibrated checkpoint (qdiff-checkpoint-1 or qdiff-checkpoint-2), found qdiff-checkpoint-9"
    assert expected in refused(path)


@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_is_refused_unread(tmp_path, write):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        write({"a": 1}, file)
    assert "not a readable checkpoint" in refused(path)


def test_tensors_of_another_architecture_are_refused(saved):
    path = saved()[1]
    config = read_about(path)["config"]
    rewrite(path, {"config": {**config, "ch": 64}})
    assert "do not fit the network it describes" in refused(path)
    rewrite(path, {"config": {**config, "num_res_blocks": 2}})
    message = refused(path)
    assert "for the network it describes" in message and "is missing" in message
    rewrite(path, {"config": {**config, "ch_mult": [1, 1], "image_size": 7}})
    assert "its description does not make a network" in refused(path)


DAMAGE = {
    "missing-tensor": (lambda tensors: tensors.pop("norm_out.weight"), "norm_out.weight is missing"),
    "missing-codes": (lambda tensors: tensors.pop("conv_in.codes"), "conv_in.codes is missing"),
    "foreign-tensor": (
        lambda tensors: tensors.update({"conv_in.alpha": torch.ones(1)}),
        "conv_in.alpha is not part of the network",
    ),
    "foreign-codes": (
        lambda tensors: tensors.update({"norm_out.codes": torch.ones(1)}),
        "norm_out.codes is not part of the network",
    ),
    "short-codes": (
        lambda tensors: tensors.update({"conv_in.codes": tensors["conv_in.codes"][:-1].clone()}),
        "expected 432 bytes, found 431",
    ),
    "scale-of-another-shape": (
        lambda tensors: tensors.update({"conv_in.weight_quantizer.scale": torch.ones(7, 1, 1, 1)}),
        "conv_in.weight_quantizer.scale",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_missing_and_foreign_tensors_are_named(saved, damage, message):
    path = saved()[1]
    rewrite(path, tensors=damage)
    assert message in refused(path)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"family": "gan"}, "model family: expected one of ddim"),
        ({"recipe": {"name": "x", "weights": {"bits": 40}}}, "bits: expected a value from"),
        ({"recipe": None}, "recipe: expected a mapping"),
        ({"config": {"ch": 32}}, "description does not make a network"),
        ({"config": None}, "description does not make a network"),
        ({"timesteps": "many"}, "description does not make a network"),
        ({"timesteps": {"a": 1}}, "description does not make a network"),
    ],
    ids=["family", "bits", "no-recipe", "little-config", "no-config", "timesteps", "timesteps-mapping"],
)
def test_a_description_that_makes_no_network_is_refused(saved, about, message):
    path = saved()[1]
    rewrite(path, about)
    assert message in refused(path)


@pytest.mark.parametrize("text", ["[]", "3", '"text"', "{", "null"])
def test_metadata_of_another_kind_are_refused(tmp_path, text):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1)}, path, {"qdiff": text})
    refused(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_a_damaged_header_never_gives_another_kind_of_error(written, tmp_path, data):
    """Flip a byte of the header, which holds names, shapes and the description as JSON."""
    path = tmp_path / "damaged.safetensors"
    content = bytearray(written)
    end = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, end - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        load_checkpoint(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)
@given(data=st.data())
def test_no_damaged_tensor_goes_unnoticed(written, tmp_path, data):
    """Flip a byte behind the header: it would be another weight, scale or bias."""
    path = tmp_path / "damaged.safetensors"
    content = bytearray(written)
    start = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(start, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    for load in (load_checkpoint, load_integer):
        with pytest.raises(ValueError, match="damaged: its tensors are not those that were written|do not fit"):
            load(path)


@pytest.mark.parametrize("recipe", [W4A8, replace(W4A8, step_groups=StepGroups(3)), RECIPES[5]], ids=lambda r: r.name)
def test_files_of_the_first_format_still_load(saved, states, recipe):
    """An entry for every scale and zero point, and no checksum."""
    network, path = saved(recipe)
    joined = ("activation_scales", "activation_zero_points", "weight_zero_points")

    def separate(tensors):
        for name in joined:
            del tensors[name]
        parts = {key: value for key, value in network.state_dict().items() if "_quantizer" in key}
        tensors |= {key: value.to(torch.int32) if "zero" in key else value.clone() for key, value in parts.items()}

    rewrite(path, {"digest": None, "format": "qdiff-checkpoint-1"}, separate)
    assert torch.equal(load_checkpoint(path).network(states.x, states.t), network(states.x, states.t))


def test_small_tensors_share_an_entry(saved):
    """Of another number of elements they do not fit."""
    network, path = saved()
    with safe_open(path, "pt") as file:
        assert not [key for key in file.keys() if "act_quantizer" in key or key.endswith("zero_point")]  # noqa: SIM118
    rewrite(path, tensors=lambda tensors: tensors.update(activation_scales=tensors["activation_scales"][:-1].clone()))
    assert "do not fit the network it describes" in refused(path)

"""ckpt.pth and the native file of latent networks: golden cases, key names, softmax grids, round trips."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qdiff.checkpoints.native import load_checkpoint, read_about, save_checkpoint
from qdiff.checkpoints.qdiffusion import (
    load_published,
    published_recipe,
    published_state,
    save_published,
)
from qdiff.cli.original import original_flags
from qdiff.families import adapter_for
from qdiff.nn.layers import act_quantizers, quant_layers, to_double
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.recipe import QuantSpec, Recipe, StepGroups
from qdiff.recipes.stages import GPTQ, ActivationRanges, RangeSpec, WeightRanges

FORMS = ["plain", "transformer"]
SMALL = {"model_channels": 32, "channel_mult": [1], "attention_resolutions": [1]}
CASES = ["ddim_split_w4a8_sym", "ldm_w4a8", "sd_split_w8a8_sm16"]
STAGES = (WeightRanges(RangeSpec()), ActivationRanges())
AFFINE = Recipe("affine", QuantSpec(4, axis="out_channel"), QuantSpec(8), stages=STAGES)
SIGNED = replace(AFFINE, name="signed", activations=QuantSpec(8, "signed"))
RECIPES = [
    AFFINE,
    SIGNED,
    replace(AFFINE, name="split", split_shortcuts=True),
    replace(SIGNED, name="split-signed", split_shortcuts=True),
    replace(AFFINE, name="softmax16", softmax=QuantSpec(16, "unsigned"), split_shortcuts=True),
    replace(SIGNED, name="signed-softmax16", softmax=QuantSpec(16, "unsigned")),
    replace(SIGNED, name="symmetric-softmax", compat=("symmetric_softmax",)),
    replace(AFFINE, name="weights-only", activations=None, stages=STAGES[:1]),
    replace(AFFINE, name="compensated", stages=(STAGES[0], GPTQ(rows=100), STAGES[1])),
]


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def predict(network, data):
    inputs = [data.x, data.t] + ([] if data.context is None else [data.context])
    with torch.no_grad():
        return network(*inputs)


def flags_of(recipe, adapter, network):
    """What a user says of a file written from the recipe."""
    activations = recipe.activations
    return published_recipe(
        recipe.weights.bits,
        None if activations is None else activations.bits,
        activations is not None and activations.kind == "signed",
        8,
        recipe.split_shortcuts,
        adapter,
        network,
    )


# The golden cases (formats §5)


@pytest.fixture(params=CASES)
def golden(request, case_folder):
    """(folder, description, adapter) of a case."""
    folder = case_folder.parent / request.param
    case = json.loads((folder / "case.json").read_text())
    return folder, case, adapter_for(case["model"])


def loaded(golden, activations=True, path=None):
    folder, case, adapter = golden
    network = adapter.build(case["config"]).double()
    flags = (case["act_bits"] if activations else None, case["act_symmetric"], case["softmax_bits"])
    recipe = published_recipe(case["weight_bits"], *flags, case["split_shortcut"], adapter, network)
    return to_double(load_published(path or folder / "qdiff_wa.pth", network, adapter, recipe)[0])


def error(golden, network, key):
    io = load_file(golden[0] / "io.safetensors")
    inputs = [io["x"].double(), io["t"].double()] + ([io["context"].double()] if "context" in io else [])
    with torch.no_grad():
        found = network(*inputs)
    return float((found - io[key]).abs().max() / io[key].abs().max())


def test_golden_predictions(golden):
    folder, case, adapter = golden
    plain = adapter.build(case["config"])
    plain.load_state_dict(load_file(folder / "fp.safetensors"))
    assert error(golden, plain.double(), "eps_fp") < 1e-9
    assert error(golden, loaded(golden, activations=False), "eps_w") < 1e-9
    assert error(golden, loaded(golden), "eps_wa") < 1e-9


@pytest.mark.parametrize("part", ["softmax", "split", "operand", "alpha"])
@pytest.mark.cases("ddim_split_w4a8_sym-*", "ldm_w4a8-alpha", "sd_split_w8a8_sm16-softmax")
def test_a_perturbed_golden_file_fails(golden, tmp_path, part):
    """Every kind of entry of a file matters to the outputs."""
    state = torch.load(golden[0] / "qdiff_wa.pth", weights_only=True)
    key = {
        "softmax": "act_quantizer_w.delta",
        "split": "weight_quantizer_0.delta",
        "operand": "act_quantizer_k.delta",
        "alpha": "weight_quantizer.alpha",
    }[part]
    keys = [name for name in state if name.endswith(key)]
    if part == "split" and not golden[1]["split_shortcut"]:
        assert not keys
        return
    key = keys[-1]  # the first ones are of the time embedding, which norm groups of one channel take out again
    state[key] = -state[key] if part == "alpha" else 1.01 * state[key]
    torch.save(state, tmp_path / "ckpt.pth")
    assert error(golden, loaded(golden, path=tmp_path / "ckpt.pth"), "eps_wa") > 1e-6
    changes_weights = part in ("split", "alpha")
    weights = loaded(golden, activations=False, path=tmp_path / "ckpt.pth")
    assert (error(golden, weights, "eps_w") > 1e-6) == changes_weights


def test_shortcuts_of_the_stable_diffusion_case_have_two_quantizers(case_folder):
    folder = case_folder.parent / "sd_split_w8a8_sm16"
    golden = (folder, json.loads((folder / "case.json").read_text()), adapter_for("ldm"))
    network = loaded(golden)
    boundaries = golden[2].split_boundaries(golden[2].build(golden[1]["config"]))
    split = {name: layer for name, layer in quant_layers(network).items() if layer.boundary is not None}
    assert split.keys() == boundaries.keys() and len(split) == 4
    state = torch.load(folder / "qdiff_wa.pth", weights_only=True)
    for name, layer in split.items():
        features = boundaries[name]  # both levels are 32 wide, and so is every skip
        assert layer.boundary == features == state[f"model.{name}.weight_quantizer.alpha"].shape[1] == 32
        assert layer.weight.shape[1] == 64 == layer.boundary + state[f"model.{name}.weight_quantizer_0.alpha"].shape[1]
        (first, second), (act, act_0) = layer.weight_quantizers, layer.act_quantizers
        assert not torch.equal(first.scale, second.scale) and act.scale != act_0.scale
        for suffix, weight, act in (("", first, layer.act_quantizers[0]), ("_0", second, layer.act_quantizers[1])):
            assert torch.equal(weight.scale.float(), state[f"model.{name}.weight_quantizer{suffix}.delta"])
            assert act.scale.float() == state[f"model.{name}.act_quantizer{suffix}.delta"]
    softmax = {q.spec for name, q in act_quantizers(network).items() if name.endswith("_w")}
    assert softmax == {QuantSpec(16, "unsigned")}


@pytest.mark.parametrize("name", CASES[1:])
def test_keys_are_those_of_the_golden_file(case_folder, name):
    folder = case_folder.parent / name
    golden = (folder, json.loads((folder / "case.json").read_text()), adapter_for("ldm"))
    network = loaded(golden).float()
    flags = (8, golden[1]["act_symmetric"], golden[1]["softmax_bits"], golden[1]["split_shortcut"])
    recipe = published_recipe(golden[1]["weight_bits"], *flags, golden[2], network)
    mine = published_state(network, golden[2], recipe)
    theirs = torch.load(folder / "qdiff_wa.pth", weights_only=True)
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (mine[key].shape, mine[key].dtype) == (tensor.shape, tensor.dtype), key


# Grids and names (formats §2)


@pytest.mark.parametrize(
    ("form", "symmetric", "kind"),
    [
        ("plain", False, "unsigned"),
        ("plain", True, "unsigned"),
        ("transformer", False, "unsigned"),
        ("transformer", True, "signed"),
    ],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_the_originals_softmax_grids(make_latent, latent_adapter, form, symmetric, kind, bits):
    network = make_latent(form, **SMALL)
    recipe = published_recipe(4, 8, symmetric, bits, False, latent_adapter, network)
    quantizers = act_quantizers(insert_quantizers(network, recipe, latent_adapter))
    softmax = {q.spec for name, q in quantizers.items() if name.endswith("act_quantizer_w")}
    assert softmax == {QuantSpec(bits, kind)}
    others = {q.spec for name, q in quantizers.items() if not name.endswith("act_quantizer_w")}
    assert others == {QuantSpec(8, "signed" if symmetric else "affine")}


EXPECTED_KEYS = {
    "plain": [
        "model.middle_block.1.attention.qkv_matmul.act_quantizer_q",
        "model.middle_block.1.attention.qkv_matmul.act_quantizer_k",
        "model.middle_block.1.attention.smv_matmul.act_quantizer_v",
        "model.middle_block.1.attention.smv_matmul.act_quantizer_w",
        "model.middle_block.1.qkv.act_quantizer",
    ],
    "transformer": [
        *(
            f"model.middle_block.1.transformer_blocks.0.{attn}.act_quantizer_{operand}"
            for attn in ("attn1", "attn2")
            for operand in "qkvw"
        ),
        "model.middle_block.1.transformer_blocks.0.attn2.to_k.act_quantizer",
        "model.middle_block.1.transformer_blocks.0.ff.net.0.proj.act_quantizer",
        "model.middle_block.1.proj_in.act_quantizer",
    ],
}


def test_keys_of_attention_operands(quantized_latent, latent_adapter, form):
    state = published_state(quantized_latent(AFFINE, form, **SMALL), latent_adapter, AFFINE)
    for key in EXPECTED_KEYS[form]:
        assert state[f"{key}.delta"].shape == () == state[f"{key}.zero_point"].shape
    assert not any(".attention.act_quantizer" in key or ".attn1.attention" in key for key in state)
    operands = [key for key in state if key.endswith(("_q.delta", "_k.delta", "_v.delta", "_w.delta"))]
    assert len(operands) == 4 * (4 if form == "plain" else 8)
    if form == "plain":
        assert state["model.middle_block.1.qkv.weight_quantizer.delta"].shape == (96, 1, 1)


# Round trips


@pytest.mark.parametrize("float_base", [False, True], ids=["folded", "float-weights"])
@pytest.mark.parametrize("recipe", RECIPES[2:], ids=lambda recipe: recipe.name)
@pytest.mark.cases(
    "plain-split*-folded",
    "transformer-softmax16-*",
    "transformer-signed-softmax16-folded",
    "transformer-compensated-float-weights",
    "plain-split-signed-float-weights",
)
def test_a_written_file_comes_back_bit_for_bit(
    quantized_latent,
    make_latent,
    latent_adapter,
    latent_states,
    assert_same_numbers,
    tmp_path,
    recipe,
    float_base,
    form,
):
    network, path, data = quantized_latent(recipe, form, **SMALL), tmp_path / "ckpt.pth", latent_states(form)
    plain = make_latent(form, **SMALL)
    weights = {name: plain.get_submodule(name).weight for name in quant_layers(network)} if float_base else None
    save_published(path, network, latent_adapter, recipe, weights)
    other = make_latent(form, seed=5, **SMALL)
    found, own = load_published(path, other, latent_adapter, flags_of(recipe, latent_adapter, other))
    assert own == recipe
    assert_same_numbers(network, found)
    assert torch.equal(predict(found, data), predict(network, data))


@pytest.mark.parametrize("recipe", RECIPES[:7], ids=lambda recipe: recipe.name)
@pytest.mark.cases("plain-*", "transformer-split-signed", "transformer-softmax16", "transformer-signed-softmax16")
def test_the_original_code_computes_the_same_with_the_flags_we_name(
    quantized_latent, make_latent, latent_adapter, latent_states, tmp_path, recipe, form
):
    """A file without our recipe, read with `original_flags`: same outputs, whatever softmax grids were used."""
    network, data = quantized_latent(recipe, form, **SMALL), latent_states(form)
    torch.save(dict(published_state(network, latent_adapter, recipe)), tmp_path / "ckpt.pth")
    named = original_flags(recipe, latent_adapter, network).split()
    value = {flag: number for flag, number in zip(named, [*named[1:], ""], strict=True) if number.isdigit()}
    if recipe.name == "signed-softmax16" and form == "transformer":
        assert value["--sm_abit"] == "17"  # the upper half of a signed grid that ours does not have
        return
    bits, other = int(value["--sm_abit"]), make_latent(form, seed=5, **SMALL)
    flags = (int(value["--weight_bit"]), int(value["--act_bit"]), "--a_sym" in named, bits, "--split" in named)
    flags = published_recipe(*flags, latent_adapter, other)
    read, _ = load_published(tmp_path / "ckpt.pth", other, latent_adapter, flags)
    assert torch.equal(predict(read, data), predict(network, data))


@pytest.mark.parametrize("form", ["plain", "transformer", "deep", "labels"])
@pytest.mark.parametrize("recipe", [RECIPES[3], RECIPES[4]], ids=lambda recipe: recipe.name)
@pytest.mark.cases("split-signed-plain", "split-signed-labels", "softmax16-transformer")
def test_the_native_file_comes_back_bit_for_bit(
    quantized_latent, latent_adapter, latent_states, timesteps, assert_same_numbers, tmp_path, recipe, form
):
    network, path = quantized_latent(recipe, form, **SMALL), tmp_path / "ckpt.safetensors"
    save_checkpoint(path, network, latent_adapter, recipe, timesteps, {"seed": 0})
    found, data = load_checkpoint(path), latent_states(form)
    assert found.recipe == recipe and found.adapter.family == "ldm" == read_about(path)["family"]
    assert latent_adapter.config_of(found.network) == latent_adapter.config_of(network)
    assert_same_numbers(network, found.network)
    assert torch.equal(predict(found.network, data), predict(network, data))
    again = tmp_path / "again.safetensors"
    save_checkpoint(again, found.network, latent_adapter, recipe, timesteps, {"seed": 0})
    assert again.read_bytes() == path.read_bytes()


def test_sets_per_step_come_back_with_their_table(
    quantized_latent, latent_adapter, latent_states, timesteps, tmp_path, form
):
    recipe = replace(AFFINE, step_groups=StepGroups(3))
    network, path, data = quantized_latent(recipe, form), tmp_path / "ckpt.safetensors", latent_states(form)
    save_checkpoint(path, network, latent_adapter, recipe, timesteps, {})
    found = load_checkpoint(path).network
    assert torch.equal(predict(found, data), predict(network, data))
    moved = replace(data, t=data.t.roll(3))
    assert not torch.equal(predict(found, moved), predict(network, data))


@pytest.mark.parametrize(("bits", "least", "most"), [(4, 7.0, 8.0), (8, 3.7, 4.0)])
def test_the_native_file_is_small(quantized_latent, latent_adapter, tmp_path, form, bits, least, most):
    """Weights alone shrink 8 and 4 times; scales, biases and norms are the rest."""
    recipe = replace(AFFINE, weights=QuantSpec(bits, axis="out_channel"))
    network, path = quantized_latent(recipe, form), tmp_path / "ckpt.safetensors"
    save_checkpoint(path, network, latent_adapter, recipe, None, {})
    with safe_open(path, "pt") as file:
        codes = sum(file.get_slice(key).get_shape()[0] for key in file.keys() if key.endswith(".codes"))  # noqa: SIM118
    weights = 4 * sum(layer.weight.numel() for layer in quant_layers(network).values())
    assert codes == weights * bits // 32
    plain = 4 * sum(p.numel() for name, p in network.named_parameters() if "quantizer" not in name)
    assert least * 0.85 < plain / path.stat().st_size < most
    assert path.stat().st_size < 1.3 * codes + 50_000


def test_a_pixel_file_and_a_latent_one_are_told_apart(case_folder, latent_adapter, make_latent):
    flags = published_recipe(4, 8, True, 8, True, latent_adapter, make_latent("plain"))
    with pytest.raises(ValueError, match="expected a checkpoint of this architecture: time_embed.0.weight is missing"):
        load_published(case_folder / "qdiff_wa.pth", make_latent("plain"), latent_adapter, flags)

"""Q-Diffusion's ckpt.pth: the golden case, flags that contradict a file, and files that the original code can read."""

from dataclasses import replace

import pytest
import torch
from published_file import one_line, recipe_of

import qdiff.checkpoints.qdiffusion
from ddim.network import DDPMUNet
from qdiff.checkpoints.qdiffusion import (
    Published,
    load_published,
    published_state,
    save_published,
)
from qdiff.cli.original import original_flags
from qdiff.nn.layers import act_quantizers, quant_layers, to_double
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.recipe import QuantSpec, Recipe, Rule, StepGroups
from qdiff.recipes.stages import GPTQ, ActivationRanges, RangeSpec, WeightRanges

ONE_LEVEL = {"ch_mult": [1], "attn_resolutions": [8]}
RANGES = (WeightRanges(RangeSpec()), ActivationRanges())
W4A8 = Recipe("w4a8", QuantSpec(4, axis="out_channel"), QuantSpec(8, "signed"), split_shortcuts=True, stages=RANGES)
COMPENSATED = replace(W4A8, name="compensated", stages=(RANGES[0], GPTQ(rows=200), RANGES[1]))
EXPRESSIBLE = [
    W4A8,
    COMPENSATED,
    Recipe("w3-affine", QuantSpec(3, axis="out_channel"), QuantSpec(6), stages=RANGES),
    Recipe("w8-only", QuantSpec(8, axis="out_channel"), split_shortcuts=True, stages=RANGES[:1]),
    Recipe("per-tensor-weights", QuantSpec(5), QuantSpec(8), stages=RANGES),
    Recipe("signed-weights", QuantSpec(4, "signed", "out_channel"), QuantSpec(8), stages=RANGES),
    Recipe("mid-weights", QuantSpec(4, "unsigned_mid", "out_channel"), QuantSpec(8), stages=RANGES),
    replace(W4A8, name="16-bit-softmax", softmax=QuantSpec(16, "unsigned")),
    replace(W4A8, name="symmetric-softmax", compat=("symmetric_softmax",)),
]


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def name_of(recipe):
    return recipe.name


@pytest.fixture
def case_layers(case_network):
    """The golden case's float weights by layer name."""
    types = (torch.nn.Conv2d, torch.nn.Linear)
    return {name: m.weight.clone() for name, m in case_network.named_modules() if type(m) in types}


# The golden case (formats §5)


@pytest.mark.parametrize(
    ("act_bits", "expected"), [(None, "eps_w"), (8, "eps_wa")], ids=["weights", "weights-and-acts"]
)
@pytest.mark.parametrize("start", ["float weights", "random weights"])
def test_golden_predictions_in_float64(case, case_network, case_io, golden, adapter, act_bits, expected, start):
    """The file holds all it needs, so what the network held before does not matter."""
    if start == "random weights":
        case_network = DDPMUNet(**case["config"]).eval()
    recipe = recipe_of(adapter, act_bits=act_bits)
    network, _ = load_published(golden, case_network, adapter, recipe)
    with torch.no_grad():
        found = to_double(network)(case_io["x"].double(), case_io["t"])
    assert found.dtype == torch.float64 and relative(found, case_io[expected]) < 1e-9


def with_zero_alphas(golden, path):
    """An alpha of exactly 0 rounds up."""
    state = torch.load(golden, weights_only=True)
    for key in [key for key in state if key.endswith(".alpha")]:
        state[key] = torch.where(state[key].abs() < state[key].abs().median(), 0.0, state[key])
    torch.save(state, path)
    return path


@pytest.mark.parametrize("change", [None, with_zero_alphas], ids=["golden", "zero-alphas"])
def test_codes_are_those_of_the_format(golden, case_network, adapter, tmp_path, change):
    """Decoded here by the formula of formats §2, clip(floor(w / delta) + (alpha >= 0) + z, 0, 15)."""
    golden = golden if change is None else change(golden, tmp_path / "ckpt.pth")
    network, _ = load_published(golden, case_network, adapter, recipe_of(adapter))
    layers, decoded = quant_layers(network), decode(golden, 4)
    assert layers.keys() == decoded.keys()
    for name, codes in decoded.items():
        assert torch.equal(layers[name].codes.float(), codes), name


def decode(path, bits):
    """{layer: codes} of a ckpt.pth, by the formula alone."""
    state = torch.load(path, weights_only=True)
    found = {}
    for name in [k.removesuffix(".weight_quantizer.delta") for k in state if k.endswith(".weight_quantizer.delta")]:
        start, parts = 0, []
        for suffix in ("", "_0"):
            if (key := f"{name}.weight_quantizer{suffix}") + ".delta" not in state:
                continue
            alpha = state[f"{key}.alpha"]
            weight = state[f"{name}.weight"][:, start : start + alpha.shape[1]]
            start += alpha.shape[1]
            codes = torch.floor(weight / state[f"{key}.delta"]) + (alpha >= 0) + state[f"{key}.zero_point"]
            parts.append(codes.clamp(0, 2**bits - 1))
        assert start == state[f"{name}.weight"].shape[1]
        found[name.removeprefix("model.")] = torch.cat(parts, 1)
    return found


def test_a_file_of_the_original_has_no_recipe_of_its_own(golden):
    published = Published(golden)
    assert published.recipe is None
    assert published.split and published.has_activations and published.symmetric
    assert 4 in published.weight_bits()


# Flags that contradict the file


def without_activations(golden, path):
    state = torch.load(golden, weights_only=True)
    torch.save({k: v for k, v in state.items() if "act_quantizer" not in k}, path)
    return path


def with_zero_points(golden, path):
    state = torch.load(golden, weights_only=True)
    state["model.conv_in.act_quantizer.zero_point"] += 3
    torch.save(state, path)
    return path


def unsplit(golden, path):
    state = torch.load(golden, weights_only=True)
    torch.save({k: v for k, v in state.items() if "quantizer_0" not in k}, path)
    return path


@pytest.mark.parametrize(
    ("change", "flags", "flag", "found"),
    [
        (None, {"weight_bits": 8}, "weight_bits 8", "4 bits"),
        (None, {"weight_bits": 2}, "weight_bits 2", "4 bits"),
        (None, {"split": False}, "split left out", "split shortcuts"),
        (unsplit, {}, "split", "none"),
        (None, {"symmetric": False}, "act_symmetric left out", "symmetric activations"),
        (with_zero_points, {}, "act_symmetric", "non-zero zero points"),
        (without_activations, {}, "act_bits", "no activation quantizers"),
    ],
    ids=["more-bits", "fewer-bits", "no-split", "split", "no-a_sym", "a_sym", "quant_act"],
)
def test_an_option_that_contradicts_the_file_names_both(
    golden, case_network, adapter, tmp_path, change, flags, flag, found
):
    path = golden if change is None else change(golden, tmp_path / "ckpt.pth")
    with pytest.raises(ValueError) as error:
        load_published(path, case_network, adapter, recipe_of(adapter, **flags))
    one_line(error, f"{flag}: contradicts {path}", found)


def test_a_weights_only_file_loads_without_activations(golden, case_network, case_io, adapter, tmp_path):
    path = without_activations(golden, tmp_path / "ckpt.pth")
    recipe = recipe_of(adapter, act_bits=None)
    network, _ = load_published(path, case_network, adapter, recipe)
    with torch.no_grad():
        assert relative(to_double(network)(case_io["x"].double(), case_io["t"]), case_io["eps_w"]) < 1e-9


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8], ids=lambda b: f"w{b}")
@pytest.mark.parametrize("finder", ["minmax", "shrink"])
@pytest.mark.cases("minmax-*", "shrink-w2", "shrink-w4", "shrink-w8")
def test_the_width_of_weights_can_be_told_from_the_codes(quantized, adapter, tmp_path, bits, finder):
    """So that the right flag is never refused, and one that is far off always is."""
    stage = WeightRanges(RangeSpec(finder, candidates=None if finder == "minmax" else 80))
    recipe = Recipe("w", QuantSpec(bits, axis="out_channel"), stages=(stage,))
    state = published_state(quantized(recipe, **ONE_LEVEL), adapter, recipe)
    torch.save(dict(state), tmp_path / "ckpt.pth")  # without our recipe, as the original writes it
    found = Published(tmp_path / "ckpt.pth").weight_bits()
    assert bits in found
    assert len(found) == 1 if finder == "minmax" else bits + 2 not in found


def crafted(path, weight, deltas):
    """A file of one split layer with 4-bit codes 0 ... 15 wherever weight / delta runs from -7 to 8."""
    width = weight.shape[1] // 2
    state = {"model.l.weight": weight}
    for part, delta in zip(("weight_quantizer", "weight_quantizer_0"), deltas, strict=True):
        grid = torch.full((len(weight), 1, 1, 1), delta)
        state[f"model.l.{part}.delta"], state[f"model.l.{part}.zero_point"] = grid, torch.full_like(grid, 7)
        state[f"model.l.{part}.alpha"] = torch.full_like(weight[:, :width], -1)
    torch.save(state, path)
    return Published(path)


def test_the_halves_of_a_split_weight_are_measured_on_their_own_grids(tmp_path):
    weight = torch.linspace(-7, 8, 16).view(1, 16, 1, 1)
    published = crafted(tmp_path / "ckpt.pth", torch.cat([weight / 64, weight], 1), (1 / 64, 1.0))
    assert list(published.weight_bits()) == [3, 4]


def test_a_channel_that_its_search_has_narrowed_much_does_not_widen_all(tmp_path):
    weight = torch.linspace(-7, 8, 16).view(1, 16, 1, 1) * torch.tensor([1.0, 1, 9, 1, 1]).view(5, 1, 1, 1)
    published = crafted(tmp_path / "ckpt.pth", torch.cat([weight, weight], 1), (1.0, 1.0))
    assert list(published.weight_bits()) == [3, 4]


# Writing (formats §4)


@pytest.mark.parametrize("float_base", [False, True], ids=["folded", "float-weights"])
@pytest.mark.parametrize("recipe", EXPRESSIBLE, ids=name_of)
@pytest.mark.cases("*-folded", "w4a8-float-weights", "compensated-float-weights")
def test_a_written_file_comes_back_bit_for_bit(
    quantized, make_network, adapter, states, float_weights, assert_same_numbers, tmp_path, recipe, float_base
):
    network, path = quantized(recipe, **ONE_LEVEL), tmp_path / "ckpt.pth"
    save_published(path, network, adapter, recipe, float_weights(32, **ONE_LEVEL) if float_base else None)
    flags = replace(recipe_of(adapter), weights=recipe.weights, split_shortcuts=recipe.split_shortcuts)
    flags = replace(flags, activations=recipe.activations)
    found, own = load_published(path, make_network(32, seed=5, **ONE_LEVEL), adapter, flags)
    assert own == recipe
    assert_same_numbers(network, found)
    with torch.no_grad():
        assert torch.equal(found(states.x, states.t), network(states.x, states.t))


@pytest.mark.parametrize("float_base", [False, True], ids=["folded", "float-weights"])
@pytest.mark.parametrize("recipe", EXPRESSIBLE, ids=name_of)
@pytest.mark.cases("*-folded", "w4a8-float-weights")
def test_the_formula_of_the_format_gives_the_codes(quantized, adapter, float_weights, tmp_path, recipe, float_base):
    """As the original code reads a file, without any of ours; its codes start at 0."""
    network, path = quantized(recipe, **ONE_LEVEL), tmp_path / "ckpt.pth"
    save_published(path, network, adapter, recipe, float_weights(32, **ONE_LEVEL) if float_base else None)
    state, decoded = torch.load(path, weights_only=True), decode(path, recipe.weights.bits)
    for name, layer in quant_layers(network).items():
        assert torch.equal(layer.codes.float() - recipe.weights.qmin, decoded[name]), name
        for suffix, part in zip(("", "_0"), layer.slices, strict=False):
            key = f"model.{name}.weight_quantizer{suffix}"
            rows = (layer.weight.shape[0], *[1] * (layer.weight.dim() - 1))
            assert state[f"{key}.delta"].shape == state[f"{key}.zero_point"].shape == rows
            values = (decoded[name][:, part] - state[f"{key}.zero_point"]) * state[f"{key}.delta"]
            assert torch.equal(values, layer.weight[:, part])


def test_keys_are_those_of_the_golden_file(golden, case_network, adapter, tmp_path):
    recipe = recipe_of(adapter)
    network, _ = load_published(golden, case_network, adapter, recipe)
    mine, theirs = published_state(network, adapter, recipe), torch.load(golden, weights_only=True)
    assert mine.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (mine[key].shape, mine[key].dtype) == (tensor.shape, tensor.dtype), key


def test_float_weights_are_written_unchanged_wherever_alpha_can_say_the_code(quantized, adapter, float_weights):
    """Error compensation moves some codes further than one step: only those become dequantized values."""
    weights = float_weights(32, **ONE_LEVEL)
    state = published_state(quantized(W4A8, **ONE_LEVEL), adapter, W4A8, weights)
    assert all(torch.equal(state[f"model.{name}.weight"], weight) for name, weight in weights.items())
    network = quantized(COMPENSATED, **ONE_LEVEL)
    state = published_state(network, adapter, COMPENSATED, weights)
    changed = torch.cat([(state[f"model.{n}.weight"] != w).flatten() for n, w in weights.items()])
    assert 0 < changed.float().mean() < 0.5
    for name, weight in weights.items():
        written, layer = state[f"model.{name}.weight"], quant_layers(network)[name]
        assert torch.equal(written, torch.where(written == weight, weight, layer.weight)), name


def test_a_golden_file_written_again_gives_the_same_codes_and_outputs(
    case, case_network, case_layers, case_io, golden, adapter, assert_same_numbers, tmp_path
):
    flags, path = recipe_of(adapter), tmp_path / "again.pth"
    network, recipe = load_published(golden, case_network, adapter, flags)
    save_published(path, network, adapter, recipe, case_layers)
    again, own = load_published(path, DDPMUNet(**case["config"]), adapter, flags)
    assert own == recipe
    assert_same_numbers(network, again)
    mine, theirs = torch.load(path, weights_only=True), torch.load(golden, weights_only=True)
    for key, tensor in theirs.items():
        if not key.endswith(".alpha"):
            assert torch.equal(mine[key], tensor), key
    with torch.no_grad():
        found = to_double(again)(case_io["x"].double(), case_io["t"])
    assert relative(found, case_io["eps_wa"]) < 1e-9


def test_an_unsigned_softmax_survives_beside_signed_activations(quantized, make_network, adapter, tmp_path):
    path = tmp_path / "ckpt.pth"
    save_published(path, quantized(W4A8, **ONE_LEVEL), adapter, W4A8)
    network, _ = load_published(path, make_network(32, **ONE_LEVEL), adapter, recipe_of(adapter))
    kinds = {q.spec.kind for n, q in act_quantizers(network).items() if n.endswith("act_quantizer_w")}
    assert kinds == {"unsigned"}


def test_the_activations_of_a_file_of_ours_can_be_left_out(quantized, make_network, adapter, states, tmp_path):
    path = tmp_path / "ckpt.pth"
    network = quantized(W4A8, **ONE_LEVEL)
    save_published(path, network, adapter, W4A8)
    flags = recipe_of(adapter, act_bits=None)
    found, own = load_published(path, make_network(32, **ONE_LEVEL), adapter, flags)
    assert own == replace(W4A8, activations=None) and not act_quantizers(found)
    for quantizer in act_quantizers(network).values():
        quantizer.enabled = False
    with torch.no_grad():
        torch.testing.assert_close(found(states.x, states.t), network(states.x, states.t))


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        (W4A8, "--weight_bit 4 --split --quant_act --act_bit 8 --a_sym --sm_abit 9"),
        (
            replace(W4A8, compat=("symmetric_softmax",)),
            "--weight_bit 4 --split --quant_act --act_bit 8 --a_sym --sm_abit 8",
        ),
        (EXPRESSIBLE[2], "--weight_bit 3 --quant_act --act_bit 6 --sm_abit 6"),
        (EXPRESSIBLE[3], "--weight_bit 8 --split"),
    ],
    ids=["signed", "symmetric-softmax", "affine", "weights-only"],
)
def test_the_flags_for_the_original_code(adapter, recipe, flags):
    """With --a_sym its softmax is signed: an unsigned grid of 8 bits is the upper half of a signed one of 9."""
    assert original_flags(recipe, adapter, None) == flags


# What the format cannot express

INEXPRESSIBLE = [
    (replace(W4A8, name="mixed-weights", rules=(Rule("conv_*", 8),)), "one weight width .* conv_in has 8 bits"),
    (replace(W4A8, name="other-weights", rules=(Rule("*", 8),)), "one weight width .* temb.dense.0 has 8 bits"),
    (replace(W4A8, name="float-layer", rules=(Rule("conv_in", 0),)), "one weight width .* conv_in has float"),
    (replace(W4A8, name="mixed-acts", rules=(Rule("conv_*", act_bits=6),)), "one activation .* conv_in has 6 bits"),
    (replace(W4A8, name="float-input", rules=(Rule("conv_out", act_bits=0),)), "one activation .* conv_out has float"),
    (replace(W4A8, name="groups", step_groups=StepGroups(3)), "one activation scale per tensor"),
    (replace(W4A8, name="group size", step_groups=StepGroups(size=4)), "one activation scale per tensor"),
    (replace(W4A8, name="channels", activations=QuantSpec(8, axis="in_channel")), "one activation scale per tensor"),
    (replace(W4A8, name="mid", activations=QuantSpec(8, "unsigned_mid")), "signed or affine.*unsigned_mid"),
]


@pytest.mark.parametrize(("recipe", "message"), INEXPRESSIBLE, ids=lambda v: getattr(v, "name", None))
def test_what_the_format_cannot_express_is_refused(quantized, adapter, tmp_path, recipe, message):
    with pytest.raises(ValueError, match=f"^ckpt.pth holds {message}") as error:
        save_published(tmp_path / "ckpt.pth", quantized(recipe, **ONE_LEVEL), adapter, recipe)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_an_uncalibrated_network_is_not_saved(network, adapter, tmp_path):
    insert_quantizers(network, W4A8, adapter)
    with pytest.raises(ValueError, match="no codes yet"):
        save_published(tmp_path / "ckpt.pth", network, adapter, W4A8)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_is_cut_short_leaves_nothing(quantized, adapter, monkeypatch, tmp_path):
    def cut(content, path):
        path.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(qdiff.utils.files.torch, "save", cut)
    with pytest.raises(OSError, match="No space left"):
        save_published(tmp_path / "ckpt.pth", quantized(W4A8, **ONE_LEVEL), adapter, W4A8)
    assert list(tmp_path.iterdir()) == []

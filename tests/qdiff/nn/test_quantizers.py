"""Quantizer modules: identity of their parameters, grids per tensor and channel, and AdaRound's start."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from qdiff.nn.functional import soft_round
from qdiff.nn.grid import Grid
from qdiff.nn.quantizers import ActQuantizer, FloorRounding, SoftRounding, WeightQuantizer
from qdiff.nn.ranges import grid_from_range
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import QuantSpec, StepGroups

ONE_SET = StepTable(1000, StepGroups())
SIGNED8 = QuantSpec(8, "signed")


def fitted(weight, spec):
    """A weight quantizer whose grid spans the weight."""
    quantizer = WeightQuantizer(spec, weight)
    rows = weight.reshape(quantizer.scale.shape[0], -1)
    quantizer.set_grid(grid_from_range(rows.amin(1), rows.amax(1), spec))
    return quantizer


def test_an_activation_quantizer_passes_everything_through_until_it_has_a_range(generator):
    quantizer, x = ActQuantizer(SIGNED8, ONE_SET), torch.randn(2, 3, generator=generator)
    assert quantizer(x) is x
    quantizer.set_grid(Grid(torch.tensor(0.5), torch.tensor(0.0), quantizer.spec))
    assert torch.equal(quantizer(x), (2 * x).round() / 2)


@pytest.mark.parametrize("axis", ["tensor", "in_channel"])
def test_grids_are_copied_into_parameters_that_keep_their_identity(axis):
    quantizer = ActQuantizer(QuantSpec(8, axis=axis), StepTable(9, StepGroups(2), torch.tensor([8, 0])), 3)
    scale, zero_point = quantizer.scale, quantizer.zero_point
    quantizer.set_grid(Grid(torch.tensor(0.5), torch.tensor(7.0), quantizer.spec))
    quantizer.set_grid(Grid(torch.tensor(0.25), torch.tensor(9.0), quantizer.spec), group=1)
    assert quantizer.scale is scale and quantizer.zero_point is zero_point
    assert scale[0].unique().tolist() == [0.5] and scale[1].unique().tolist() == [0.25]
    assert zero_point[0].unique().tolist() == [7] and zero_point[1].unique().tolist() == [9]
    assert not scale.requires_grad


def test_state_dict_is_complete_before_the_first_forward():
    assert ActQuantizer(SIGNED8, ONE_SET).state_dict().keys() == {"scale", "zero_point"}
    assert WeightQuantizer(SIGNED8, torch.ones(2, 3)).state_dict().keys() == {"scale", "zero_point"}


@pytest.mark.parametrize(
    ("shape", "view", "axis"),
    [((2, 3), (1, 3), -1), ((2, 3, 3), (1, 1, 3), -1), ((2, 3, 3), (1, 3, 1), 1), ((2, 3, 4, 4), (1, 3, 1, 1), 1)],
    ids=["features", "tokens", "sequences", "images"],
)
def test_a_grid_per_input_channel_lies_along_the_channel_axis(shape, view, axis, generator):
    spec = QuantSpec(8, "signed", "in_channel")
    quantizer = ActQuantizer(spec, ONE_SET, 3, axis)
    scale, x = torch.tensor([0.1, 0.2, 0.4]), torch.randn(shape, generator=generator)
    quantizer.set_grid(Grid(scale, torch.zeros(3), quantizer.spec))
    assert torch.equal(quantizer(x), Grid(scale.view(view), torch.zeros(()), spec).snap(x))


def test_a_grid_per_input_channel_needs_to_know_how_many():
    with pytest.raises(ValueError, match="number of channels"):
        ActQuantizer(QuantSpec(8, axis="in_channel"), ONE_SET)


def test_an_observer_sees_inputs_before_they_are_quantized(generator):
    quantizer, seen = ActQuantizer(SIGNED8, ONE_SET), []
    quantizer.set_grid(Grid(torch.tensor(0.5), torch.tensor(0.0), quantizer.spec))
    quantizer.observer = lambda which, x: seen.append((which, x))
    x = torch.randn(2, 3, generator=generator)
    quantizer(x)
    assert len(seen) == 1 and seen[0][0] is quantizer and seen[0][1] is x


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 3, 3)], ids=["linear", "conv1d", "conv2d"])
@pytest.mark.parametrize("axis", ["tensor", "out_channel"])
def test_weight_grids_have_the_shapes_of_published_checkpoints(shape, axis):
    quantizer = WeightQuantizer(QuantSpec(4, axis=axis), torch.ones(shape))
    rows = 6 if axis == "out_channel" else 1
    assert quantizer.scale.shape == quantizer.zero_point.shape == (rows, *[1] * (len(shape) - 1))


@pytest.mark.parametrize("kind", ["affine", "signed", "unsigned_mid"])
def test_the_values_of_nearest_codes_are_the_fake_quantized_weight(kind, generator):
    weight, spec = torch.randn(6, 4, 3, 3, generator=generator), QuantSpec(4, kind, "out_channel")
    quantizer = fitted(weight, spec)
    expected = quantizer.grid.snap(weight)
    assert torch.equal(quantizer.grid.values(quantizer.grid.codes(weight)), expected)


# AdaRound (methods §1.3, §7.1 item 2)

WEIGHTS = st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6)


@given(WEIGHTS, st.sampled_from([2, 3, 4, 8]), st.sampled_from(["affine", "signed"]))
def test_adaround_starts_at_the_fraction_and_so_at_the_float_weight(values, bits, kind):
    weight = torch.tensor(values, dtype=torch.float64).view(2, 3)
    quantizer = fitted(weight, QuantSpec(bits, kind, "out_channel"))
    rounding = SoftRounding(weight, quantizer)
    ratio = weight / quantizer.scale
    torch.testing.assert_close(soft_round(rounding.alpha.detach()), ratio - ratio.floor(), rtol=0, atol=1e-6)
    spec = quantizer.spec
    inside = (ratio + quantizer.zero_point >= spec.qmin) & (ratio + quantizer.zero_point <= spec.qmax)
    start = rounding().detach()
    assert ((start - weight).abs() <= 1e-6 * quantizer.scale)[inside].all()
    assert ((start - weight).abs() <= (0.5 + 1e-6) * quantizer.scale).all()


def test_adaround_starts_at_the_fraction_in_float32_too(generator):
    weight = torch.randn(8, 30, generator=generator)
    quantizer = fitted(weight, QuantSpec(4, "affine", "out_channel"))
    ratio = weight / quantizer.scale
    h = soft_round(SoftRounding(weight, quantizer).alpha.detach())
    assert (h - (ratio - ratio.floor())).abs().max() < 1e-6


def test_adaround_hardens_to_the_nearest_code_at_its_start(generator):
    weight = torch.randn(8, 30, generator=generator)
    quantizer = fitted(weight, QuantSpec(4, "affine", "out_channel"))
    assert torch.equal(SoftRounding(weight, quantizer).codes(), quantizer.grid.codes(weight))


def test_a_sharpened_start_hardens_to_the_same_codes_and_is_nearer_to_them(generator):
    weight = torch.randn(8, 30, generator=generator)
    quantizer = fitted(weight, QuantSpec(4, "affine", "out_channel"))
    plain, sharpened = SoftRounding(weight, quantizer), SoftRounding(weight, quantizer, 3.0)
    assert torch.equal(sharpened.codes(), plain.codes())
    final = quantizer.grid.values(plain.codes())
    assert ((sharpened() - final).abs() <= (plain() - final).abs() + 1e-6).all()
    assert (sharpened() - final).abs().mean() < 0.6 * (plain() - final).abs().mean()


def test_adaround_hardens_to_floor_or_ceiling_whatever_it_has_learned(generator):
    weight, spec = torch.randn(8, 30, generator=generator), QuantSpec(4, "signed", "out_channel")
    quantizer = fitted(weight, spec)
    rounding = SoftRounding(weight, quantizer)
    with torch.no_grad():
        rounding.alpha.copy_(3 * torch.randn(weight.shape, generator=generator))
    floor = (weight / quantizer.scale).floor()
    expected = torch.where(rounding.alpha >= 0, floor + 1, floor).clamp(spec.qmin, spec.qmax)
    assert torch.equal(rounding.codes(), expected)
    assert (expected != quantizer.grid.codes(weight)).float().mean() > 0.2


def test_gradients_reach_alpha_alone(generator):
    weight = torch.randn(4, 5, generator=generator, requires_grad=True)
    quantizer = fitted(weight.detach(), QuantSpec(4, axis="out_channel"))
    rounding = SoftRounding(weight, quantizer)
    rounding().square().sum().backward()
    assert rounding.alpha.grad.abs().max() > 0
    assert weight.grad is None and quantizer.scale.grad is None


# Finetuning under a frozen grid and rounding (methods §3.3)

KINDS = ["affine", "signed", "unsigned_mid"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", ["tensor", "out_channel"])
def test_finetuning_starts_exactly_at_the_codes_there_are_however_far_off(kind, axis, generator):
    weight, spec = torch.randn(8, 30, generator=generator), QuantSpec(4, kind, axis)
    quantizer = fitted(weight, spec)
    nearest = quantizer.grid.codes(weight)
    away = torch.randint(-5, 6, weight.shape, generator=generator)  # as compensated rounding may leave them
    for codes in (nearest, (nearest + away).clamp(spec.qmin, spec.qmax), torch.full_like(nearest, spec.qmax)):
        rounding = FloorRounding(weight, codes.to(torch.int8), quantizer)
        assert torch.equal(rounding.codes(), codes)
        torch.testing.assert_close(rounding(), quantizer.grid.values(codes), rtol=1e-6, atol=1e-6)
        assert torch.equal(rounding.weight, weight)


def test_a_finetuned_weight_has_the_codes_that_floor_and_its_offset_give(generator):
    weight, spec = torch.randn(8, 30, generator=generator), QuantSpec(4, "affine", "out_channel")
    quantizer = fitted(weight, spec)
    codes = quantizer.grid.codes(weight)
    rounding = FloorRounding(weight, codes, quantizer)
    moved = weight + 0.5 * torch.randn(weight.shape, generator=generator)
    with torch.no_grad():
        rounding.weight.copy_(moved)
    steps = (moved / quantizer.scale).floor() - (weight / quantizer.scale).floor()
    expected = (codes + steps).clamp(spec.qmin, spec.qmax)
    assert torch.equal(rounding.codes(), expected) and (expected != codes).float().mean() > 0.3
    torch.testing.assert_close(rounding(), quantizer.grid.values(expected), rtol=1e-6, atol=1e-6)


def test_after_adaround_the_offset_is_0_or_1(generator):
    weight = torch.randn(8, 30, generator=generator)
    quantizer = fitted(weight, QuantSpec(4, "affine", "out_channel"))
    rounding = FloorRounding(weight, SoftRounding(weight, quantizer).codes(), quantizer)
    assert rounding.offset.unique().tolist() == [0, 1] and "offset" not in rounding.state_dict()


def test_gradients_of_finetuning_reach_the_weight_and_not_its_source(generator):
    weight = torch.randn(4, 5, generator=generator, requires_grad=True)
    quantizer = fitted(weight.detach(), QuantSpec(4, axis="out_channel"))
    rounding = FloorRounding(weight, quantizer.grid.codes(weight.detach()), quantizer)
    assert not rounding.weight.requires_grad  # until the stage says so
    rounding.weight.requires_grad_()
    rounding().square().sum().backward()
    assert rounding.weight.grad.abs().max() > 0
    assert weight.grad is None and quantizer.scale.grad is None

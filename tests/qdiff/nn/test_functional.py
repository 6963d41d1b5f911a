"""Grids, straight-through gradients and soft rounding, against their definitions written out anew."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

from qdiff.nn.functional import (
    dequantize,
    fake_quantize,
    fused_fake_quantize,
    hard_codes,
    offset_codes,
    offset_quantize,
    quantize,
    sharpen,
    soft_quantize,
    soft_round,
    soft_round_inverse,
)
from qdiff.nn.ranges import grid_from_range
from qdiff.recipes.recipe import KINDS, QuantSpec

S8 = QuantSpec(8, "signed")
SPECS = [QuantSpec(bits, kind) for kind in KINDS for bits in (2, 3, 4, 8, 16)]
VALUES = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30)


def spec_id(spec):
    return f"{spec.kind}{spec.bits}"


def grid_over(x, spec):
    return grid_from_range(x.amin().view(1), x.amax().view(1), spec)


def straight_through(x, scale, zero_point, spec):
    """The quantizer as autograd sees it when rounding passes gradients unchanged (methods §0).

    Clipping is spelled out: whether the end codes pass gradients through torch.clamp depends on the release.
    """
    ratio = x / scale
    rounded = ratio.round().detach() + (ratio - ratio.detach())  # the bracket is exactly 0
    codes = rounded + zero_point
    codes = torch.where(codes < spec.qmin, spec.qmin, torch.where(codes > spec.qmax, spec.qmax, codes))
    return (codes - zero_point) * scale


def test_eight_bit_signed_codes_end_at_minus_128_and_127():
    codes = quantize(torch.tensor([-1e6, -1.28, -1.0, 0.0, 1.0, 1.27, 1e6]), torch.tensor(0.01), torch.tensor(0.0), S8)
    assert codes.tolist() == [-128, -128, -100, 0, 100, 127, 127]


@given(st.sampled_from(SPECS), VALUES)
def test_codes_are_whole_and_within_their_bits_even_far_outside_the_range(spec, values):
    x = torch.tensor(values, dtype=torch.float64)
    codes = quantize(100 * x, *grid_over(x, spec), spec)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= spec.qmin and codes.max() <= spec.qmax
    assert spec.qmax - spec.qmin == 2**spec.bits - 1


@given(st.sampled_from(SPECS), VALUES)
def test_error_is_at_most_half_a_step_inside_the_range(spec, values):
    x = torch.tensor(values, dtype=torch.float64)
    if spec.kind == "unsigned":  # a grid for non-negative data
        x = x.abs()
    scale, zero_point = grid_over(x, spec)
    assert ((fake_quantize(x, scale, zero_point, spec) - x).abs() <= 0.5 * scale * (1 + 1e-9)).all()


@given(st.sampled_from(SPECS), VALUES)
def test_zero_is_exact(spec, values):
    x = torch.tensor(values, dtype=torch.float64)
    assert fake_quantize(torch.zeros(1, dtype=x.dtype), *grid_over(x, spec), spec).item() == 0


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_values_outside_the_range_become_its_ends(spec, generator):
    scale, zero_point = grid_over(torch.randn(50, generator=generator), spec)
    ends = fake_quantize(torch.tensor([-1e9, 1e9]), scale, zero_point, spec)
    assert torch.equal(ends, (torch.tensor([spec.qmin, spec.qmax]) - zero_point) * scale)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "learning"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_fake_quantize_gives_the_values_of_its_codes(spec, gradients, generator):
    x = torch.randn(200, generator=generator)
    scale, zero_point = grid_over(0.7 * x, spec)  # some are clipped
    expected = dequantize(quantize(x, scale, zero_point, spec), scale, zero_point)
    snapped = fake_quantize(x.requires_grad_(gradients), scale, zero_point, spec)
    assert snapped.requires_grad == gradients and torch.equal(snapped, expected)


@pytest.mark.parametrize("spec", [QuantSpec(bits, kind) for kind in KINDS for bits in (2, 4, 8)], ids=spec_id)
def test_the_fused_kernel_agrees_away_from_ties(spec, generator):
    x = torch.randn(5000, generator=generator)
    scale, zero_point = grid_over(0.7 * x, spec)
    ratio = x / scale
    away = ((ratio - ratio.floor()) - 0.5).abs() > 1e-3
    assert away.float().mean() > 0.95
    expected = fake_quantize(x, scale, zero_point, spec)
    torch.testing.assert_close(fused_fake_quantize(x, scale, zero_point, spec)[away], expected[away])


SHAPES = {
    "one-scale": ((5, 4, 3, 3), (1,)),
    "scalar-scale": ((5, 4, 3, 3), ()),
    "per-sample": ((5, 4, 3, 3), (5, 1, 1, 1)),
    "per-channel": ((5, 4, 3, 3), (1, 4, 1, 1)),
    "per-sample-and-channel": ((5, 4, 3, 3), (5, 4, 1, 1)),
    "per-channel-of-tokens": ((5, 7, 4), (1, 1, 4)),
    "weight-rows": ((6, 9), (6, 1)),
    "short-scale": ((5, 4), (4,)),
}


@pytest.mark.parametrize("learned", ["x", "scale", "both"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spec", [QuantSpec(3, kind) for kind in KINDS], ids=spec_id)
def test_gradients_are_those_of_the_composite_definition(spec, shapes, learned, generator):
    (shape, scale_shape), double = shapes, torch.float64
    x = torch.randn(shape, dtype=double, generator=generator)
    scale = 0.2 + 0.3 * torch.rand(scale_shape, dtype=double, generator=generator)
    zero_point = torch.full(scale_shape, 0.0 if spec.kind in ("signed", "unsigned") else 3.0, dtype=double)
    weights = torch.randn(shape, dtype=double, generator=generator)
    unclipped = (x / scale).round() + zero_point
    clipped = (unclipped < spec.qmin) | (unclipped > spec.qmax)
    assert 0.02 < clipped.double().mean() < 0.98  # both regions are seen

    def gradients(function):
        inputs = [x.clone().requires_grad_(learned != "scale"), scale.clone().requires_grad_(learned != "x")]
        (function(*inputs, zero_point, spec) * weights).sum().backward()
        return [i.grad for i in inputs]

    for mine, expected in zip(gradients(fake_quantize), gradients(straight_through), strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_no_gradient_reaches_clipped_inputs_and_all_of_it_the_others():
    x = torch.tensor([-50.0, -0.6, 0.2, 50.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize(x, scale, torch.tensor(0.0), S8).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1]  # -100 ... 100 are codes
    x.grad = scale.grad = None
    fake_quantize(x, scale, torch.tensor(0.0), QuantSpec(4, "signed")).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert scale.grad.item() == pytest.approx(-8 + (-1 + 1.2) + (0 - 0.4) + 7, abs=1e-5)


@given(st.floats(0, 1))
def test_soft_round_undoes_its_inverse(h):
    assume(h < 1)
    value = torch.tensor(h, dtype=torch.float64)
    assert soft_round(soft_round_inverse(value)).item() == pytest.approx(h, abs=1e-12)


def test_soft_round_reaches_0_and_1_exactly_and_is_a_half_at_0():
    assert soft_round(torch.tensor([-10.0, 0.0, 10.0])).tolist() == pytest.approx([0, 0.5, 1], abs=1e-7)
    assert soft_round(torch.tensor([-10.0, 10.0])).tolist() == [0, 1]


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, "signed")], ids=spec_id)
def test_a_saturated_soft_rounding_is_the_hard_one(spec, generator):
    base = torch.randn(8, 20, generator=generator)
    scale, zero_point = grid_over(0.7 * base, spec)
    alpha = torch.where(torch.rand(base.shape, generator=generator) < 0.5, -20.0, 20.0)
    codes = hard_codes(base, scale, zero_point, alpha, spec)
    assert codes.unique().tolist() == list(range(spec.qmin, spec.qmax + 1))
    assert torch.equal(soft_quantize(base, scale, zero_point, alpha, spec), dequantize(codes, scale, zero_point))


def test_gradients_of_soft_rounding_are_those_of_finite_differences(generator):
    spec = QuantSpec(4, "signed")
    base = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    scale, zero_point = grid_over(1.5 * base, spec)
    alpha = torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: soft_quantize(base, scale, zero_point, a, spec), (alpha,))


@given(st.floats(0, 1), st.floats(1, 100))
def test_sharpening_moves_towards_the_nearer_end_and_never_past_it(h, exponent):
    value = torch.tensor(h, dtype=torch.float64)
    sharpened = sharpen(value, exponent).item()
    assert 0 <= sharpened <= 1 and sharpen(value, 1.0).item() == pytest.approx(h, abs=1e-15)
    assert abs(sharpened - round(h)) <= abs(h - round(h)) + 1e-12
    assert sharpen(1 - value, exponent).item() == pytest.approx(1 - sharpened, abs=1e-9)


def test_sharpening_by_hand():
    h = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert sharpen(h, 2.0).tolist() == pytest.approx([0, 0.1, 0.5, 0.9, 1])
    assert sharpen(h, 100.0).isfinite().all()


# Floor with an offset


def test_floor_with_an_offset_by_hand():
    spec, scale, zero_point = QuantSpec(3, "affine"), torch.tensor(0.5), torch.tensor(3.0)  # codes 0 to 7
    weight, offset = torch.tensor([0.2, 0.7, -0.1, -0.6, 9.0, -9.0, 0.2]), torch.tensor([0.0, 1, 1, 0, 0, 0, -2])
    # floor(w / s): 0, 1, -1, -2, 18, -18, 0
    assert offset_codes(weight, scale, zero_point, offset, spec).tolist() == [3, 5, 3, 1, 7, 0, 1]
    values = offset_quantize(weight, scale, zero_point, offset, spec)
    assert values.tolist() == pytest.approx([0.0, 1.0, 0.0, -1.0, 2.0, -1.5, -1.0])


@given(st.sampled_from([spec for spec in SPECS if spec.kind != "unsigned"]), VALUES, st.integers(-6, 6))
def test_values_of_floor_with_an_offset_are_those_of_its_codes(spec, values, offset):
    weight = torch.tensor(values, dtype=torch.float64)
    scale, zero_point = grid_over(0.7 * weight, spec)
    arguments = (weight, scale, zero_point, torch.tensor(float(offset)), spec)
    codes = offset_codes(*arguments)
    assert torch.equal(codes, codes.round()) and codes.min() >= spec.qmin and codes.max() <= spec.qmax
    expected = dequantize(codes, scale, zero_point)
    torch.testing.assert_close(offset_quantize(*arguments), expected, rtol=1e-9, atol=1e-9 * scale.item())


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, "signed"), QuantSpec(4, "unsigned_mid")], ids=spec_id)
def test_gradients_of_floor_with_an_offset_pass_inside_the_range_alone(spec, generator):
    weight = torch.randn(400, dtype=torch.float64, generator=generator)
    scale, zero_point = grid_over(0.5 * weight, spec)
    offset = torch.randint(-2, 3, weight.shape, generator=generator).double()
    unclipped = (weight / scale).floor() + offset + zero_point
    inside, outside = (
        (spec.qmin < unclipped) & (unclipped < spec.qmax),
        (unclipped < spec.qmin) | (unclipped > spec.qmax),
    )
    assert 0.05 < outside.double().mean() < 0.95 and inside.double().mean() > 0.05
    factors = torch.randn(400, dtype=torch.float64, generator=generator)
    weight.requires_grad_()
    (offset_quantize(weight, scale, zero_point, offset, spec) * factors).sum().backward()
    torch.testing.assert_close(weight.grad[inside], factors[inside])
    assert not weight.grad[outside].any()

"""Soft rounding and rounding by offsets, against their definitions written out anew."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

from qdiff.nn.functional import (
    hard_codes,
    offset_codes,
    offset_quantize,
    sharpen,
    soft_quantize,
    soft_round,
    soft_round_inverse,
)
from qdiff.nn.grid import Grid
from qdiff.nn.ranges import grid_from_range
from qdiff.recipes.recipe import KINDS, QuantSpec

SPECS = [QuantSpec(bits, kind) for kind in KINDS for bits in (2, 3, 4, 8, 16)]
VALUES = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30)


def spec_id(spec):
    return f"{spec.kind}{spec.bits}"


def grid_over(x, spec):
    return grid_from_range(x.amin().view(1), x.amax().view(1), spec)


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
    grid = grid_over(0.7 * base, spec)
    alpha = torch.where(torch.rand(base.shape, generator=generator) < 0.5, -20.0, 20.0)
    codes = hard_codes(base, alpha, grid)
    assert codes.unique().tolist() == list(range(spec.qmin, spec.qmax + 1))
    assert torch.equal(soft_quantize(base, alpha, grid), grid.values(codes))


def test_gradients_of_soft_rounding_are_those_of_finite_differences(generator):
    spec = QuantSpec(4, "signed")
    base = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    grid = grid_over(1.5 * base, spec)
    alpha = torch.randn(3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: soft_quantize(base, a, grid), (alpha,))


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
    grid = Grid(torch.tensor(0.5), torch.tensor(3.0), QuantSpec(3, "affine"))  # codes 0 to 7
    weight, offset = torch.tensor([0.2, 0.7, -0.1, -0.6, 9.0, -9.0, 0.2]), torch.tensor([0.0, 1, 1, 0, 0, 0, -2])
    # floor(w / s): 0, 1, -1, -2, 18, -18, 0
    assert offset_codes(weight, offset, grid).tolist() == [3, 5, 3, 1, 7, 0, 1]
    values = offset_quantize(weight, offset, grid)
    assert values.tolist() == pytest.approx([0.0, 1.0, 0.0, -1.0, 2.0, -1.5, -1.0])


@given(st.sampled_from([spec for spec in SPECS if spec.kind != "unsigned"]), VALUES, st.integers(-6, 6))
def test_values_of_floor_with_an_offset_are_those_of_its_codes(spec, values, offset):
    weight = torch.tensor(values, dtype=torch.float64)
    grid = grid_over(0.7 * weight, spec)
    arguments = (weight, torch.tensor(float(offset)), grid)
    codes = offset_codes(*arguments)
    assert torch.equal(codes, codes.round()) and codes.min() >= spec.qmin and codes.max() <= spec.qmax
    expected = grid.values(codes)
    torch.testing.assert_close(offset_quantize(*arguments), expected, rtol=1e-9, atol=1e-9 * grid.scale.item())


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, "signed"), QuantSpec(4, "unsigned_mid")], ids=spec_id)
def test_gradients_of_floor_with_an_offset_pass_inside_the_range_alone(spec, generator):
    weight = torch.randn(400, dtype=torch.float64, generator=generator)
    grid = grid_over(0.5 * weight, spec)
    offset = torch.randint(-2, 3, weight.shape, generator=generator).double()
    unclipped = (weight / grid.scale).floor() + offset + grid.zero_point
    inside, outside = (
        (spec.qmin < unclipped) & (unclipped < spec.qmax),
        (unclipped < spec.qmin) | (unclipped > spec.qmax),
    )
    assert 0.05 < outside.double().mean() < 0.95 and inside.double().mean() > 0.05
    factors = torch.randn(400, dtype=torch.float64, generator=generator)
    weight.requires_grad_()
    (offset_quantize(weight, offset, grid) * factors).sum().backward()
    torch.testing.assert_close(weight.grad[inside], factors[inside])
    assert not weight.grad[outside].any()

"""Grids and straight-through gradients, against their definitions written out anew."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from qdiff.nn.grid import Grid
from qdiff.nn.ranges import grid_from_range
from qdiff.recipes.recipe import KINDS, QuantSpec

S8 = QuantSpec(8, "signed")
SPECS = [QuantSpec(bits, kind) for kind in KINDS for bits in (2, 3, 4, 8, 16)]
VALUES = st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30)


def spec_id(spec):
    return f"{spec.kind}{spec.bits}"


def grid_over(x, spec):
    return grid_from_range(x.amin().view(1), x.amax().view(1), spec)


def straight_through(x, grid):
    """The quantizer as autograd sees it when rounding passes gradients unchanged (methods §0).

    Clipping is spelled out: whether the end codes pass gradients through torch.clamp depends on the release.
    """
    scale, zero_point, spec = grid.scale, grid.zero_point, grid.spec
    ratio = x / scale
    rounded = ratio.round().detach() + (ratio - ratio.detach())  # the bracket is exactly 0
    codes = rounded + zero_point
    codes = torch.where(codes < spec.qmin, spec.qmin, torch.where(codes > spec.qmax, spec.qmax, codes))
    return (codes - zero_point) * scale


def test_eight_bit_signed_codes_end_at_minus_128_and_127():
    grid = Grid(torch.tensor(0.01), torch.tensor(0.0), S8)
    codes = grid.codes(torch.tensor([-1e6, -1.28, -1.0, 0.0, 1.0, 1.27, 1e6]))
    assert codes.tolist() == [-128, -128, -100, 0, 100, 127, 127]


@given(st.sampled_from(SPECS), VALUES)
def test_codes_are_whole_and_within_their_bits_even_far_outside_the_range(spec, values):
    x = torch.tensor(values, dtype=torch.float64)
    codes = grid_over(x, spec).codes(100 * x)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= spec.qmin and codes.max() <= spec.qmax
    assert spec.qmax - spec.qmin == 2**spec.bits - 1


@given(st.sampled_from(SPECS), VALUES)
def test_error_is_at_most_half_a_step_inside_the_range(spec, values):
    x = torch.tensor(values, dtype=torch.float64)
    if spec.kind == "unsigned":  # a grid for non-negative data
        x = x.abs()
    grid = grid_over(x, spec)
    assert ((grid.snap(x) - x).abs() <= 0.5 * grid.scale * (1 + 1e-9)).all()


@given(st.sampled_from(SPECS), VALUES)
def test_zero_is_exact(spec, values):
    x = torch.tensor(values, dtype=torch.float64)
    assert grid_over(x, spec).snap(torch.zeros(1, dtype=x.dtype)).item() == 0


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_values_outside_the_range_become_its_ends(spec, generator):
    grid = grid_over(torch.randn(50, generator=generator), spec)
    ends = grid.snap(torch.tensor([-1e9, 1e9]))
    assert torch.equal(ends, (torch.tensor([spec.qmin, spec.qmax]) - grid.zero_point) * grid.scale)


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "learning"])
@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_snapping_gives_the_values_of_its_codes(spec, gradients, generator):
    x = torch.randn(200, generator=generator)
    grid = grid_over(0.7 * x, spec)  # some are clipped
    expected = grid.values(grid.codes(x))
    assert torch.equal(grid.centred(x), grid.codes(x) - grid.zero_point)
    snapped = grid.snap(x.requires_grad_(gradients))
    assert snapped.requires_grad == gradients and torch.equal(snapped, expected)


@pytest.mark.parametrize("spec", [QuantSpec(bits, kind) for kind in KINDS for bits in (2, 4, 8)], ids=spec_id)
def test_the_fused_kernel_agrees_away_from_ties(spec, generator):
    x = torch.randn(5000, generator=generator)
    grid = grid_over(0.7 * x, spec)
    ratio = x / grid.scale
    away = ((ratio - ratio.floor()) - 0.5).abs() > 1e-3
    assert away.float().mean() > 0.95
    torch.testing.assert_close(grid.snap_in_one_kernel(x)[away], grid.snap(x)[away])


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
        (function(inputs[0], Grid(inputs[1], zero_point, spec)) * weights).sum().backward()
        return [i.grad for i in inputs]

    for mine, expected in zip(gradients(lambda x, grid: grid.snap(x)), gradients(straight_through), strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_no_gradient_reaches_clipped_inputs_and_all_of_it_the_others():
    x = torch.tensor([-50.0, -0.6, 0.2, 50.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    Grid(scale, torch.tensor(0.0), S8).snap(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1]  # -100 ... 100 are codes
    x.grad = scale.grad = None
    Grid(scale, torch.tensor(0.0), QuantSpec(4, "signed")).snap(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert scale.grad.item() == pytest.approx(-8 + (-1 + 1.2) + (0 - 0.4) + 7, abs=1e-5)

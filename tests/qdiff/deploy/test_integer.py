"""The integer reference: exact sums, and layers that give what the simulation gives."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

from ddim.attention import DotProductAttention
from qdiff.checkpoints.packing import pack_codes
from qdiff.deploy.integer import accumulate
from qdiff.deploy.layers import IntegerAttention, integer_layer
from qdiff.nn.layers import QUANT_LAYERS, QuantAttention
from qdiff.nn.ranges import grid_from_range
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import QuantSpec, StepGroups

KINDS = st.sampled_from(["affine", "signed", "unsigned_mid"])
TIMESTEPS = torch.arange(950, 0, -100)


def whole(generator, shape, largest):
    return torch.randint(-largest, largest + 1, shape, generator=generator)


def packed(layer):
    spec = layer.weight_quantizers[0].spec
    return pack_codes(layer.codes, spec.bits, spec.qmin)


@pytest.mark.parametrize("largest", [1, 15, 255])
def test_sums_are_those_of_whole_numbers(generator, largest):
    """As int64 arithmetic has them, whichever float type carried them."""
    a, w = whole(generator, (2, 40, 9, 9), largest), whole(generator, (5, 40, 3, 3), largest)
    found = accumulate(a.float(), w, 360, lambda a, w: F.conv2d(a, w, padding=1, stride=2))
    patches = F.unfold(a.double(), 3, padding=1, stride=2).long()  # [N, C * 9, L]
    expected = torch.einsum("ok,nkl->nol", w.flatten(1).long(), patches).view(2, 5, 5, 5)
    assert found.dtype == torch.int64 and torch.equal(found, expected)


def test_the_largest_sums_that_float32_holds_are_exact():
    a, w = torch.full((1, 258), 255.0), torch.full((1, 258), 255.0)
    w[0, 0] = 254  # just below 2^24
    assert accumulate(a, w, 258, F.linear).item() == 257 * 255 * 255 + 255 * 254


def test_sums_beyond_int32_are_exact():
    """Softmax outputs of 16 bits times affine values, whatever their values are."""
    terms = 2**17
    a, w = torch.full((1, terms), 65535.0), torch.full((1, terms), 255.0)
    assert accumulate(a, w, terms, F.linear).item() == terms * 65535 * 255 > 2**31


def test_sums_that_float64_does_not_hold_are_refused():
    a = torch.full((1, 1), 2.0**27)
    with pytest.raises(ValueError, match="sums of 1 products may reach .*, which float64 does not hold"):
        accumulate(a, a, 1, F.linear)


@given(st.integers(2, 8), KINDS, st.integers(0, 10**6))
def test_codes_are_those_of_the_simulation(bits, kind, seed):
    """Centred code times scale is the simulation's value, bit for bit."""
    generator, spec = torch.Generator().manual_seed(seed), QuantSpec(bits, kind)
    x = 3 * torch.randn(64, generator=generator) + torch.randn(1, generator=generator)
    grid = grid_from_range(0.7 * x.min().view(1), 0.7 * x.max().view(1), spec)
    scale, zero, codes = grid.scale, grid.zero_point, grid.centred(x)
    snapped = torch.round(x / scale).add(zero).clamp(spec.qmin, spec.qmax).sub(zero).mul(scale)
    assert torch.equal(codes * scale, snapped)
    assert torch.equal(codes, codes.round()) and (codes + zero).min() >= spec.qmin and (codes + zero).max() <= spec.qmax


def random_layer(kind, generator):
    """(float layer, an input of it)"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        if kind == "linear":
            return nn.Linear(12, 5), torch.randn(4, 7, 12)
        if kind == "conv1d":
            return nn.Conv1d(12, 5, 1), torch.randn(4, 12, 9)
        stride, size = (2, 3) if kind == "stride" else (1, 1) if kind == "1x1" else (1, 3)
        return nn.Conv2d(12, 5, size, padding=size // 2, stride=stride), 2 * torch.randn(4, 12, 9, 9) + 0.3


def quantized(layer, x, weights, activations, groups=1, boundary=None):
    """The layer as the simulation has it, codes and grids taken from weight and input; every set has another grid."""
    steps = StepTable(1000, StepGroups(groups), TIMESTEPS)
    quant = QUANT_LAYERS[type(layer)](layer, weights, activations, steps, boundary)
    for part, quantizer in zip(quant.slices, quant.weight_quantizers, strict=True):
        rows = layer.weight.detach()[:, part].flatten(1)
        rows = rows if quantizer.spec.axis == "out_channel" else rows.reshape(1, -1)
        quantizer.set_grid(grid_from_range(0.9 * rows.amin(1), 0.8 * rows.amax(1), quantizer.spec))
    quant.freeze(quant.nearest_codes(layer.weight.detach()))
    for part, quantizer in zip(quant.slices, quant.act_quantizers, strict=False):
        values = x.movedim(quantizer.channel_axis, 0)[part].flatten(1)
        values = values if quantizer.spec.axis == "in_channel" else values.reshape(1, -1)
        for group in range(steps.count):
            shrink = 1 - 0.2 * group
            grid = grid_from_range(shrink * values.amin(1), 0.8 * shrink * values.amax(1), quantizer.spec)
            quantizer.set_grid(grid, group)
    return quant.requires_grad_(False), steps


def relative(a, b):
    return float((a - b).norm() / b.norm())


@given(
    st.sampled_from(["3x3", "1x1", "stride", "conv1d", "linear"]),
    st.integers(2, 8),
    st.integers(2, 8),
    KINDS,
    KINDS,
    st.sampled_from(["tensor", "out_channel"]),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_layers_give_what_the_simulation_gives(kind, w_bits, a_bits, w_kind, a_kind, axis, split, seed):
    """In float32 to rounding, in float64 to 1e-12: any width, kind, stride and zero point, split or not."""
    layer, x = random_layer(kind, torch.Generator().manual_seed(seed))
    specs = QuantSpec(w_bits, w_kind, axis), QuantSpec(a_bits, a_kind)
    quant, steps = quantized(layer, x, *specs, boundary=5 if split else None)
    integer = integer_layer(quant, packed(quant), steps)
    assert "weight" not in dict(integer.named_parameters())
    assert relative(integer(x), quant(x)) < 1e-5
    quant.double(), quant.fold()
    assert relative(integer.double()(x.double()), quant(x.double())) < 1e-12


@pytest.mark.parametrize("t", [[900, 10, 450, 899], [10, 10, 10, 10]])
@pytest.mark.parametrize("kind", ["3x3", "linear", "conv1d"])
def test_every_sample_takes_its_parameter_set(kind, t, generator):
    layer, x = random_layer(kind, generator)
    quant, steps = quantized(layer, x, QuantSpec(4, axis="out_channel"), QuantSpec(6), groups=3)
    integer = integer_layer(quant, packed(quant), steps)
    with steps.at(torch.tensor(t)):
        assert relative(integer(x), quant(x)) < 1e-5
        first = integer(x)
    with steps.at(torch.full((4,), 10)):
        assert (relative(integer(x), first) > 1e-3) == (t[0] != 10)


@pytest.mark.parametrize("activations", [None, QuantSpec(4, axis="in_channel")])
@pytest.mark.parametrize("kind", ["3x3", "linear"])
def test_inputs_without_a_grid_and_with_one_per_channel_meet_dequantized_weights(kind, activations, generator):
    layer, x = random_layer(kind, generator)
    quant, steps = quantized(layer, x, QuantSpec(4, axis="out_channel"), activations)
    integer = integer_layer(quant, packed(quant), steps)
    assert not integer.parts[0].integer
    assert relative(integer(x), quant(x)) < 1e-6


def test_memory_is_that_of_the_codes(generator):
    layer, x = random_layer("3x3", generator)
    quant, steps = quantized(layer, x, QuantSpec(4, axis="out_channel"), QuantSpec(8))
    part = integer_layer(quant, packed(quant), steps).parts[0]
    assert part.packed.numel() == layer.weight.numel() / 2 and torch.equal(part.codes(), quant.codes.short())


@given(st.sampled_from([8, 16]), st.sampled_from(["unsigned", "signed", "affine"]), st.booleans(), st.integers(0, 99))
def test_attention_gives_what_the_simulation_gives(bits, kind, operand_scaled, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, length, 8, generator=generator) for length in (6, 5, 5))
    product = DotProductAttention(8**-0.25, 1.0) if operand_scaled else DotProductAttention(score_scale=8**-0.5)
    steps = StepTable(1000, StepGroups(2), TIMESTEPS)
    simulated = QuantAttention(product, QuantSpec(8), QuantSpec(bits, kind), steps)
    for operand, values in zip("qkvw", (q, k, v, torch.tensor([0.0, 0.7])), strict=True):
        quantizer = getattr(simulated, f"act_quantizer_{operand}")
        for group in range(2):
            low, high = (0.5 + 0.5 * group) * values.min(), (0.5 + 0.5 * group) * values.max()
            quantizer.set_grid(grid_from_range(low.view(1), high.view(1), quantizer.spec), group)
    exact = IntegerAttention(simulated, steps)
    with steps.at(torch.tensor([900, 10])):
        # A probability at a tie may take another code: double precision tells arithmetic from rounding.
        arguments = [each.double() for each in (q, k, v)]
        assert relative(exact.double()(*arguments), simulated.double()(*arguments)) < 1e-12
        unsnapped = IntegerAttention(simulated, steps, "float").double()(*arguments)
        assert 0 < relative(unsnapped, exact(*arguments)) < 0.5


def test_an_unknown_policy_is_refused():
    steps = StepTable(1000, StepGroups())
    layer = QuantAttention(DotProductAttention(), QuantSpec(8), QuantSpec(8, "unsigned"), steps)
    with pytest.raises(ValueError, match="attention policy: expected integer or float, found 'half'"):
        IntegerAttention(layer, steps, "half")

"""Quantized layers against explicit fake quantization and the float layer's own product."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddim.attention import DotProductAttention
from qdiff.nn.grid import Grid
from qdiff.nn.layers import QUANT_LAYERS, QuantAttention, learnable_scales, quant_layers, to_double
from qdiff.nn.quantizers import ActQuantizer
from qdiff.nn.ranges import grid_from_range
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import QuantSpec, StepGroups

STEPS = StepTable(1000, StepGroups())
W4, A8 = QuantSpec(4, "affine", "out_channel"), QuantSpec(8)
SPLIT = 4  # the first input channel of a split layer's second part

LAYERS = {
    "conv2d": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 7, 7)),
    "dilated": (lambda: nn.Conv2d(6, 5, 3, dilation=2, padding=(2, 0), bias=False), (2, 6, 7, 7)),
    "conv1d": (lambda: nn.Conv1d(6, 5, 3, padding=1), (2, 6, 9)),
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear-of-tokens": (lambda: nn.Linear(6, 5, bias=False), (2, 4, 6)),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer_and_input(request, generator):
    build, shape = request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = build().requires_grad_(False)
    return layer, torch.randn(shape, generator=generator)


def channels(x, part):
    return x[..., part] if x.dim() in (2, 3) and x.shape[-1] == 6 else x[:, part]


def quantize(layer, x, weight_spec=W4, act_spec=A8, boundary=None, freeze=True):
    """The layer with min-max grids from its weight and x, codes nearest."""
    quantized = QUANT_LAYERS[type(layer)](copy.deepcopy(layer), weight_spec, act_spec, STEPS, boundary)
    for part, quantizer in zip(quantized.slices, quantized.weight_quantizers, strict=True):
        rows = layer.weight[:, part].reshape(quantizer.scale.shape[0], -1)
        quantizer.set_grid(grid_from_range(rows.amin(1), rows.amax(1), weight_spec))
    for part, quantizer in zip(quantized.slices, quantized.act_quantizers, strict=False):
        values = channels(x, part)
        quantizer.set_grid(grid_from_range(values.min().view(1), values.max().view(1), act_spec))
    if freeze:
        quantized.freeze(quantized.nearest_codes(layer.weight))
    return quantized


def explicit(layer, quantized, x):
    """(input, weight) as fake quantization of each part gives them."""
    inputs = [
        q.grid.snap(channels(x, part)) for part, q in zip(quantized.slices, quantized.act_quantizers, strict=True)
    ]
    weights = [
        q.grid.snap(layer.weight[:, part])
        for part, q in zip(quantized.slices, quantized.weight_quantizers, strict=True)
    ]
    return inputs, weights


def product(layer, x, weight, bias=None):
    """The float layer's product with another weight."""
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(weight.clone(), requires_grad=False)
    other.bias = bias
    return other(x)


@pytest.mark.parametrize("kind", ["affine", "signed", "unsigned_mid"])
@pytest.mark.parametrize("axis", ["out_channel", "tensor"])
def test_folding_changes_nothing(layer_and_input, kind, axis):
    layer, x = layer_and_input
    quantized = quantize(layer, x, QuantSpec(4, kind, axis))
    (snapped,), (weight,) = explicit(layer, quantized, x)
    assert torch.equal(quantized(x), product(layer, snapped, weight, layer.bias))
    assert not torch.equal(weight, layer.weight)


def test_codes_fold_to_the_weight_that_is_used(layer_and_input):
    layer, x = layer_and_input
    quantized = quantize(layer, x)
    q = quantized.weight_quantizers[0]
    assert quantized.codes.dtype == torch.uint8 and int(quantized.codes.max()) == 15
    assert torch.equal(quantized.weight, (quantized.codes.float() - q.zero_point) * q.scale)
    assert quantize(layer, x, QuantSpec(4, "signed", "out_channel")).codes.dtype == torch.int8


def test_parameters_keep_their_identity_through_freezing_and_folding(layer_and_input):
    layer, x = layer_and_input
    quantized = QUANT_LAYERS[type(layer)](layer, W4, A8, STEPS)
    assert quantized.weight is layer.weight and quantized.bias is layer.bias
    former = [id(p) for p in quantized.parameters()] + [id(b) for b in quantized.buffers()]
    quantized.freeze(quantized.nearest_codes(layer.weight))
    quantized.fold()
    assert [id(p) for p in quantized.parameters()] + [id(b) for b in quantized.buffers()] == former


def test_a_layer_with_nothing_set_is_the_float_layer(layer_and_input):
    layer, x = layer_and_input
    for weight_spec, act_spec in ((W4, A8), (None, A8), (W4, None), (None, None)):
        quantized = QUANT_LAYERS[type(layer)](copy.deepcopy(layer), weight_spec, act_spec, STEPS)
        assert len(quantized.weight_quantizers) == (weight_spec is not None)
        assert len(quantized.act_quantizers) == (act_spec is not None)
        assert torch.equal(quantized(x), layer(x))


# Split layers


def test_a_split_layer_is_the_sum_of_two_products(layer_and_input):
    layer, x = layer_and_input
    quantized = quantize(layer, x, boundary=SPLIT).double()
    assert [q.scale.shape[0] for q in quantized.weight_quantizers] == [5, 5]
    for layer_part in (layer, quantized):
        layer_part.double()
    quantized.fold()
    inputs, weights = explicit(layer, quantized, x.double())
    halves = [product(layer, i, w) for i, w in zip(inputs, weights, strict=True)]
    bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (layer.weight.dim() - 2))
    torch.testing.assert_close(quantized(x.double()), halves[0] + halves[1] + bias, rtol=1e-12, atol=1e-12)


def test_the_parts_of_a_split_layer_have_grids_of_their_own(layer_and_input):
    layer, x = layer_and_input
    layer.weight[:, SPLIT:] *= 0.01
    part = slice(SPLIT, None)
    channels(x, part).mul_(0.01)
    quantized = quantize(layer, x, boundary=SPLIT)
    (first, second), (act, act_0) = quantized.weight_quantizers, quantized.act_quantizers
    assert quantized.weight_quantizer_0 is second and quantized.act_quantizer_0 is act_0
    assert (second.scale < 0.2 * first.scale).all() and act_0.scale < 0.2 * act.scale
    with torch.no_grad():
        small = channels(x, part)
        assert (channels(quantized.quantize_input(x), part) - small).abs().max() <= 0.51 * act_0.scale


@pytest.mark.parametrize("boundary", [0, 6, 9, -1])
def test_a_split_outside_the_input_channels_is_refused(boundary):
    with pytest.raises(ValueError, match=f"split at channel {boundary}: expected 1 to 5"):
        QUANT_LAYERS[nn.Linear](nn.Linear(6, 5), W4, A8, STEPS, boundary)


# Learned rounding


@pytest.mark.parametrize("boundary", [None, SPLIT], ids=["whole", "split"])
def test_learned_rounding_starts_at_the_float_layer_and_hardens_to_frozen_codes(layer_and_input, boundary):
    layer, x = layer_and_input
    quantized = quantize(layer, x, act_spec=None, boundary=boundary)
    alphas = quantized.start_rounding(layer.weight)
    assert [a.shape[1] for a in alphas] == ([6] if boundary is None else [SPLIT, 6 - SPLIT])
    for part, quantizer, rounding in zip(
        quantized.slices, quantized.weight_quantizers, quantized.rounding, strict=True
    ):
        weight, spec = layer.weight[:, part], quantizer.spec
        codes = weight / quantizer.scale + quantizer.zero_point
        held = weight.clamp(*((end - quantizer.zero_point) * quantizer.scale for end in (spec.qmin, spec.qmax)))
        assert ((codes >= spec.qmin) & (codes <= spec.qmax)).any()
        torch.testing.assert_close(rounding(), held, rtol=0, atol=1e-5)
    soft = torch.cat([r() for r in quantized.rounding], 1)
    assert torch.equal(quantized(x), product(layer, x, soft.detach(), layer.bias))
    with torch.no_grad():
        for alpha in alphas:
            alpha.neg_()  # the other neighbour everywhere
    expected = torch.cat([r.codes() for r in quantized.rounding], 1)
    quantized.finish_rounding()
    assert quantized.rounding is None and torch.equal(quantized.codes.float(), expected)
    assert not torch.equal(expected, quantized.nearest_codes(layer.weight))
    parts = zip(quantized.slices, quantized.weight_quantizers, strict=True)
    folded = torch.cat([(expected[:, part] - q.zero_point) * q.scale for part, q in parts], 1)
    assert torch.equal(quantized(x), product(layer, x, folded, layer.bias))


def test_finishing_where_nothing_was_learned_changes_nothing(layer_and_input):
    layer, x = layer_and_input
    quantized = quantize(layer, x)
    former = quantized.codes.clone()
    quantized.finish_rounding()
    assert quantized.frozen and torch.equal(quantized.codes, former)


# Convolutions without a quantized form


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 4, 3, groups=2), nn.Conv1d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, padding_mode="reflect")],
    ids=["groups", "depthwise", "reflect"],
)
def test_other_convolutions_are_refused(layer):
    with pytest.raises(ValueError, match="no quantized form"):
        QUANT_LAYERS[type(layer)](layer, W4, A8, STEPS)


# Attention products


def attention(product, act=A8):
    return QuantAttention(product, act, QuantSpec(8, "unsigned"), STEPS)


@pytest.mark.parametrize("scales", [(1.0, 0.3), (0.6, 1.0)], ids=["scaled-scores", "scaled-operands"])
def test_attention_without_ranges_is_the_float_product(scales, generator):
    product = DotProductAttention(*scales)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))
    torch.testing.assert_close(attention(product)(q, k, v), product(q, k, v), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scales", [(1.0, 0.3), (0.6, 1.0)], ids=["scaled-scores", "scaled-operands"])
def test_attention_quantizes_all_four_operands_each_on_its_grid(scales, generator):
    """q and k are scaled by operand_scale before they are quantized (LDM), the scores by score_scale afterwards."""
    quantized = attention(DotProductAttention(*scales), act=QuantSpec(8, "signed"))
    steps = {"q": 0.11, "k": 0.07, "v": 0.05}
    for name, step in steps.items():
        quantizer = getattr(quantized, f"act_quantizer_{name}")
        quantizer.set_grid(Grid(torch.tensor(step), torch.tensor(0.0), quantizer.spec))
    quantized.act_quantizer_w.set_grid(Grid(torch.tensor(1 / 255), torch.tensor(0.0), quantized.act_quantizer_w.spec))
    q, k, v = (torch.randn(2, 1, 5, 8, generator=generator) for _ in range(3))

    def snap(x, step):
        return (x / step).round() * step

    scores = (snap(scales[0] * q, 0.11) @ snap(scales[0] * k, 0.07).transpose(-1, -2)) * scales[1]
    expected = snap(F.softmax(scores, -1), 1 / 255) @ snap(v, 0.05)
    torch.testing.assert_close(quantized(q, k, v), expected, rtol=1e-5, atol=1e-6)


# Helpers


def test_double_precision_folds_anew_from_the_codes(layer_and_input):
    layer, x = layer_and_input
    quantized = to_double(nn.Sequential(quantize(layer, x)))[0]
    q = quantized.weight_quantizers[0]
    exact = (quantized.codes.double() - q.zero_point) * q.scale
    assert quantized.weight.dtype == torch.float64 and torch.equal(quantized.weight, exact)
    assert not torch.equal(quantized.weight, quantize(layer, x).weight.double())


def test_layers_are_listed_by_name_in_the_order_of_definition():
    inner = nn.Sequential(quantize(nn.Linear(6, 6), torch.ones(1, 6)), nn.ReLU())
    outer = nn.Sequential(inner, quantize(nn.Linear(6, 6), torch.ones(1, 6)))
    assert list(quant_layers(outer)) == ["0.0", "1"]
    assert list(quant_layers(outer[1])) == [""]


def test_sixteen_bit_and_idle_quantizers_have_no_learnable_scale():
    eight, sixteen, idle = (ActQuantizer(QuantSpec(bits), STEPS) for bits in (8, 16, 8))
    for quantizer in (eight, sixteen):
        quantizer.set_grid(Grid(torch.tensor(0.1), torch.tensor(0.0), quantizer.spec))
    assert [p is eight.scale for p in learnable_scales([eight, sixteen, idle])] == [True]

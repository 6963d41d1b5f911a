"""Single quantized layers: exact where no input lies on the edge between two codes."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ddim.attention import DotProductAttention
from qdiff.deploy.convert import integer_network
from qdiff.deploy.onnx.export import make_model, weights_with_zero_points
from qdiff.nn.grid import Grid
from qdiff.nn.layers import QuantAttention, QuantConv, QuantLinear
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import QuantSpec, StepGroups

TABLE = StepTable(1000, StepGroups())
SIZE = (8, 6, 6)


@dataclass(frozen=True)
class Case:
    """A layer's grids; `zero` is an affine activation grid's zero point, `weight_zero` a weight grid's."""

    weights: QuantSpec | None
    acts: QuantSpec | None
    zero: int = 90
    weight_zero: int = 120
    boundary: int | None = None


W8, A8 = QuantSpec(8, axis="out_channel"), QuantSpec(8)
CASES = {
    "affine": Case(W8, A8),
    "symmetric": Case(QuantSpec(8, "signed", "out_channel"), QuantSpec(8, "signed")),
    "per tensor": Case(QuantSpec(8, "signed"), QuantSpec(8, "unsigned_mid"), zero=128),
    "W4A8": Case(QuantSpec(4, axis="out_channel"), A8, weight_zero=7),
    "W4A8 signed": Case(QuantSpec(4, "signed", "out_channel"), A8),
    "W3A6": Case(QuantSpec(3, axis="out_channel"), QuantSpec(6), zero=20, weight_zero=3),
    "A5 signed": Case(W8, QuantSpec(5, "signed")),
    "one-sided": Case(W8, A8, zero=0, weight_zero=0),
    "zero point of neither sign": Case(W8, A8, zero=-40, weight_zero=300),
    "per input channel": Case(QuantSpec(4, axis="out_channel"), QuantSpec(4, axis="in_channel"), 5, 8),
    "weights only": Case(W8, None),
    "inputs only": Case(None, A8),
    "split": Case(W8, A8, boundary=3),
}


def whole(spec, zero):
    return 0 if spec.kind in ("signed", "unsigned") else zero


def quantized(layer, case, generator):
    """The layer on grids of random scales, its weight far from the edges between codes."""
    layer = type(layer)(*layer_arguments(layer))
    nn.init.normal_(layer.bias, std=0.1, generator=generator)
    kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv
    found = kind(layer, case.weights, case.acts, TABLE, case.boundary)
    for part, quantizer in zip(found.slices, found.weight_quantizers, strict=False):
        scale = 0.01 + 0.02 * torch.rand(quantizer.scale.shape, generator=generator)
        quantizer.set_grid(Grid(scale, torch.full_like(scale, whole(case.weights, case.weight_zero)), quantizer.spec))
        codes = torch.randint(
            case.weights.qmin, case.weights.qmax + 1, layer.weight[:, part].shape, generator=generator
        )
        found.codes[:, part] = codes
    if found.weight_quantizers:
        found.freeze(found.codes.clone())
    for i, quantizer in enumerate(found.act_quantizers):
        scale = torch.full_like(quantizer.scale, 0.05) * (1 + i)
        if scale.dim() > 1:
            scale = scale * torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(2)
        quantizer.set_grid(Grid(scale, torch.full_like(scale, whole(case.acts, case.zero)), quantizer.spec))
    return found


def layer_arguments(layer):
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding


def inputs(case, generator, count=3):
    """x whose elements are near the middle of a code's interval, some beyond the ends of the grid."""
    spec = case.acts or A8
    shape = (count, *SIZE)
    codes = torch.randint(spec.qmin - 3, spec.qmax + 4, shape, generator=generator) - whole(spec, case.zero)
    # Scales are 0.05 times a power of two, so that this is a middle on all of them.
    return (codes + 0.2 * torch.rand(shape, generator=generator)) * 0.05 + 0.001


LAYERS = {
    "3x3": (nn.Conv2d(8, 5, 3, padding=1), lambda n, x, t: n.layer(x)),
    "1x1": (nn.Conv2d(8, 5, 1), lambda n, x, t: n.layer(x)),
    "stride": (nn.Conv2d(8, 5, 3, stride=2, padding=1), lambda n, x, t: n.layer(x)),
    "conv1d": (nn.Conv1d(8, 5, 1), lambda n, x, t: n.layer(x.flatten(2))),
    "linear": (nn.Linear(8, 5), lambda n, x, t: n.layer(x.permute(0, 2, 3, 1))),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_the_simulated_one(case, layer, make, plain_adapter, exported, in_double, dialect, generator):
    if layer == "linear" and CASES[case].boundary:
        pytest.skip("only shortcuts are split")
    module, compute = LAYERS[layer]
    network = make(compute, layer=quantized(module, CASES[case], generator))
    x, t = inputs(CASES[case], generator), torch.zeros(3)
    found, expected = exported(network, plain_adapter, x, dialect=dialect)(x, t), in_double(network, x, t)
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()


def test_a_split_shortcut_reads_the_parts_of_a_concatenation(make, plain_adapter, exported, in_double, dialect):
    generator = torch.Generator().manual_seed(0)
    case = CASES["split"]
    network = make(
        lambda n, x, t: n.layer(torch.cat([n.first(x), x], 1)),
        first=nn.Conv2d(8, 3, 1),
        layer=quantized(nn.Conv2d(11, 5, 1), case, generator),
    )
    x, t = inputs(case, generator), torch.zeros(3)
    exported_network, expected = exported(network, plain_adapter, x, dialect=dialect), in_double(network, x, t)
    assert (exported_network(x, t) - expected).norm() < 2e-3 * expected.norm()  # `first` is float: codes may differ
    if dialect == "runtime":  # two products of codes; the concatenation is never made
        kinds = [n.op_type for n in make_model(network, plain_adapter, SIZE).graph.node]
        assert kinds.count("MatMulIntegerToFloat") == 2 and "Concat" not in kinds


def attention(softmax, acts=A8, operand_scale=0.8):
    module = QuantAttention(DotProductAttention(operand_scale, 0.5), acts, softmax, TABLE)
    for operand in "qkvw":
        quantizer = getattr(module, f"act_quantizer_{operand}")
        spec = quantizer.spec
        scale = torch.full_like(quantizer.scale, 1 / (spec.qmax - spec.qmin) if operand == "w" else 4.0 / 2**spec.bits)
        zero_point = torch.full_like(scale, 0 if operand == "w" else whole(spec, 2 ** (spec.bits - 1) - 9))
        quantizer.set_grid(Grid(scale, zero_point, spec))
    return module


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("softmax", "acts"),
    [
        (QuantSpec(8, "unsigned"), A8),
        (QuantSpec(8, "signed"), QuantSpec(8, "signed")),
        (QuantSpec(16, "unsigned"), A8),
        (QuantSpec(12, "unsigned"), QuantSpec(6)),
    ],
    ids=["8", "signed", "16", "12"],
)
def test_attention_is_the_simulated_one(softmax, acts, heads, make, plain_adapter, exported, in_double, dialect):
    def compute(n, x, t):
        q, k, v = (p.unflatten(1, (heads, -1)).transpose(2, 3) for p in x.flatten(2).chunk(3, dim=1))
        return n.attention(q, k, v).transpose(2, 3).flatten(1, 2)

    network = make(compute, attention=attention(softmax, acts))
    x = torch.randn(4, 24, 4, 5, generator=torch.Generator().manual_seed(2))
    found, expected = (
        exported(network, plain_adapter, x, dialect=dialect)(x, torch.zeros(4)),
        in_double(network, x, None),
    )
    single = network(x, None)
    wrong = (found - expected).norm() / expected.norm()
    assert wrong < max(1.5 * (single - expected).norm() / expected.norm(), 2e-4)


def attended_heads(make, side, generator):
    """Two heads over side * side tokens, their queries, keys and values layers."""

    def compute(n, x, t):
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (layer(tokens).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (n.to_q, n.to_k, n.to_v))
        return n.attention(q, k, v).transpose(1, 2).flatten(2)

    names = ("to_q", "to_k", "to_v")
    layers = {name: quantized(nn.Linear(8, 8), CASES["affine"], generator) for name in names}
    return make(compute, attention=attention(QuantSpec(8, "unsigned")), **layers)


@pytest.mark.parametrize(
    ("side", "sorted_", "softmaxes"),
    [(5, "qkvo", 1), (8, "ko", 1), (16, "kk", 2)],
    ids=["few tokens", "many", "one head at a time"],
)
def test_heads_may_be_products_of_their_own(side, sorted_, softmaxes, make, plain_adapter, exported, in_double):
    """Of many tokens: then only keys, for their product, and the output are sorted. Or heads attend one by one: then
    only keys are."""
    generator = torch.Generator().manual_seed(3)
    network = attended_heads(make, side, generator)
    x, t = torch.randn(4, 8, side, side, generator=generator), torch.zeros(4)
    found, expected = exported(network, plain_adapter, x, dialect="runtime")(x, t), in_double(network, x, t)
    assert (found - expected).norm() < 2e-3 * expected.norm()  # a code of an operand may differ
    kinds = [n.op_type for n in make_model(network, plain_adapter, (8, side, side)).graph.node]
    assert kinds.count("Transpose") == 1 + len(sorted_)  # one more for the input
    assert kinds.count("Softmax") == softmaxes


def test_one_head_at_a_time_or_all_at_once_is_the_same(make, plain_adapter, exported, monkeypatch):
    generator = torch.Generator().manual_seed(4)
    network = attended_heads(make, 9, generator)
    x, t = torch.randn(3, 8, 9, 9, generator=generator), torch.zeros(3)
    at_once = exported(network, plain_adapter, x)(x, t)
    monkeypatch.setattr("qdiff.deploy.onnx.attention.MANY_SCORES", 81 * 81)
    assert torch.equal(exported(network, plain_adapter, x)(x, t), at_once)


@pytest.mark.parametrize("policy", ["integer", "float"])
def test_integer_modules_are_exported_like_simulated_ones(
    policy, make, plain_adapter, exported, in_double, dialect, generator
):
    def compute(n, x, t):
        tokens = n.layer(x).flatten(2).transpose(1, 2)
        return n.attention(tokens, tokens, tokens)

    case = CASES["affine"]
    layer = quantized(nn.Conv2d(8, 6, 3, padding=1), case, generator)
    network = make(compute, layer=layer, attention=attention(QuantSpec(8, "unsigned"), operand_scale=1.0))
    network.step_table = TABLE
    x, t = 0.05 * inputs(case, generator), torch.zeros(3)
    integer = integer_network(network, policy)
    found = exported(integer, plain_adapter, x, dialect=dialect)(x, t)
    assert (found - integer(x, t)).norm() < 2e-3 * found.norm()


def test_products_are_of_codes_and_weights_of_bytes(make, plain_adapter, generator):
    layer = quantized(nn.Conv2d(8, 5, 3, padding=1), CASES["affine"], generator)
    model = make_model(make(lambda n, x, t: n.layer(x), layer=layer), plain_adapter, SIZE)
    kinds = {node.op_type for node in model.graph.node}
    assert "MatMulIntegerToFloat" in kinds and not kinds & {"MatMul", "Conv", "DequantizeLinear"}
    codes = [t for t in model.graph.initializer if list(t.dims) == [72, 5]]
    assert len(codes) == 1 and len(codes[0].raw_data) == 360


@pytest.mark.parametrize("case", ["W4A8", "affine", "symmetric"])
@pytest.mark.parametrize("layer", ["3x3", "linear"])
def test_weights_of_portable_graphs(case, layer, make, plain_adapter, exported, generator):
    """In eight bits without zero points where they fit, as engines need them; or narrow ones in four."""
    float_layer, compute = LAYERS[layer]
    network = make(compute, layer=quantized(float_layer, CASES[case], generator))
    x, t = inputs(CASES[case], generator), torch.zeros(3)
    names = ["portable", "portable-4bit"]
    found = [exported(network, plain_adapter, x, dialect=name)(x, t) for name in names]
    assert torch.equal(*found)
    models = [make_model(network, plain_adapter, SIZE, dialect=name) for name in names]
    count = float_layer.weight.numel()
    stored = [next(t for t in m.graph.initializer if t.name == weight_codes(m)) for m in models]
    assert [len(tensor.raw_data) for tensor in stored] == [count, -(-count // 2) if case == "W4A8" else count]
    zeros = {"W4A8": [0, 1], "affine": [1, 1], "symmetric": [0, 0]}  # affine: all 8 bits, not about their middle
    assert [weights_with_zero_points(model) for model in models] == [(zero, 1) for zero in zeros[case]]


def weight_codes(model):
    """The name of the codes in a graph with one layer."""
    constants = {tensor.name for tensor in model.graph.initializer}
    (name,) = (n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants)
    return name


def test_a_layer_without_codes_is_named(make, plain_adapter):
    network = make(lambda n, x, t: n.layer(x), layer=QuantConv(nn.Conv2d(8, 5, 1), W8, A8, TABLE))
    with pytest.raises(ValueError, match="^layer: expected a calibrated layer, found one whose weight has no codes$"):
        make_model(network, plain_adapter, SIZE)

"""What stands between layers, in both dialects, against torch; and what has no counterpart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddim.attention import DotProductAttention
from ddim.layers import GroupNormSiLU, timestep_embedding
from qdiff.deploy.onnx.export import make_model
from qdiff.deploy.onnx.tracer import trace


def attended(n, x, t):
    """Four heads, queries and keys of one projection."""
    tokens = n.qkv(x.flatten(2)).transpose(1, 2)
    q, k, v = (part.unflatten(2, (4, -1)).transpose(1, 2) for part in tokens.chunk(3, dim=-1))
    return n.attention(q, k, v).transpose(2, 3).flatten(1, 2).view_as(x)


def scaled_and_shifted(n, x, t):
    scale, shift = n.embed(timestep_embedding(t, 32, x.dtype))[:, :, None, None].chunk(2, dim=1)
    return n.conv(F.silu(n.norm(n.first(x)) * (1 + scale) + shift))


def through_norm(n, x, t):
    """A norm over a concatenation whose group of channels straddles the joint."""
    joined = torch.cat([x, n.first(x)], dim=1)
    return n.conv(F.silu(n.norm(joined))) + n.conv(joined)


def transformed(n, x, t):
    tokens = x.flatten(2).transpose(1, 2)
    value, gate = n.linear(n.norm(tokens)).chunk(2, dim=-1)
    tokens = tokens + value * F.gelu(gate)
    return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def embedded(n, x, t):
    features = n.embed(timestep_embedding(t, 32, x.dtype))
    return n.last(n.norm(n.conv(x) + features[:, :, None, None]))


CASES = {
    "conv": (lambda n, x, t: n.conv(x), {"conv": nn.Conv2d(8, 6, 3, padding=1)}),
    "stride": (lambda n, x, t: n.conv(x), {"conv": nn.Conv2d(8, 6, 3, stride=2, padding=1, dilation=2)}),
    "pad": (lambda n, x, t: n.conv(F.pad(x, (0, 1, 0, 1))), {"conv": nn.Conv2d(8, 6, 3, stride=2)}),
    "pad alone": (lambda n, x, t: F.pad(x, (1, 2, 0, 1)) * 2.0, {}),
    "upsample": (lambda n, x, t: n.conv(F.interpolate(x, scale_factor=2.0)), {"conv": nn.Conv2d(8, 6, 3, padding=1)}),
    "upsample alone": (lambda n, x, t: F.interpolate(x, scale_factor=2.0) - 1, {}),
    "pool": (lambda n, x, t: F.avg_pool2d(n.conv(x), 2), {"conv": nn.Conv2d(8, 6, 1)}),
    "silu": (lambda n, x, t: F.silu(x) / 2, {}),
    "norm": (lambda n, x, t: n.norm(x), {"norm": GroupNormSiLU(4, 8)}),
    "joined norm": (
        through_norm,
        {"first": nn.Conv2d(8, 4, 1), "norm": nn.GroupNorm(2, 12), "conv": nn.Conv2d(12, 5, 3, padding=1)},
    ),
    "embedding": (
        embedded,
        {
            "embed": nn.Linear(32, 8),
            "conv": nn.Conv2d(8, 8, 3, padding=1),
            "norm": GroupNormSiLU(2, 8),
            "last": nn.Conv2d(8, 3, 1),
        },
    ),
    "scale and shift": (
        scaled_and_shifted,
        {
            "embed": nn.Linear(32, 8),
            "first": nn.Conv2d(8, 4, 1),
            "norm": nn.GroupNorm(2, 4),
            "conv": nn.Conv2d(4, 3, 1),
        },
    ),
    "tokens": (transformed, {"norm": nn.LayerNorm(8), "linear": nn.Linear(8, 16)}),
    "heads": (attended, {"qkv": nn.Conv1d(8, 24, 1), "attention": DotProductAttention(operand_scale=0.7)}),
    "concat of outputs": (lambda n, x, t: torch.cat([n.conv(x), x], 1), {"conv": nn.Conv2d(8, 6, 1)}),
    "one minus": (lambda n, x, t: 1 - x, {}),
    "slices": (lambda n, x, t: torch.cat(x.split([3, 5], dim=1)[::-1], 1), {}),
    "row sums": (lambda n, x, t: x.permute(0, 2, 3, 1).reshape(len(x), 4, 12, 8).permute(0, 3, 1, 2), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_operator_is_torchs(case, make, plain_adapter, exported, dialect, generator):
    compute, layers = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in nn.ModuleList(layers.values()).parameters():
            nn.init.normal_(parameter, 0.5, 0.5)
    network = make(compute, **layers)
    x, t = torch.randn(3, 8, 6, 8, generator=generator) + 0.5, torch.tensor([999.0, 3.0, 500.5])
    found, expected = exported(network, plain_adapter, x, dialect=dialect)(x, t), network(x, t)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_norms_hold_where_the_mean_is_far_from_zero_and_where_nothing_varies(make, plain_adapter, exported, dialect):
    network = make(lambda n, x, t: n.norm(x), norm=nn.GroupNorm(2, 8, eps=1e-6))
    x = torch.randn(2, 8, 8, 8) + 30
    x[1] = 10.0
    found = exported(network, plain_adapter, x, dialect=dialect)(x, torch.zeros(2))
    expected = network.double()(x.double(), None)
    assert (found[0] - expected[0]).abs().max() < 3e-3
    assert found[1].isfinite().all() and found[1].abs().max() < 0.2


def test_labels_are_looked_up(make, plain_adapter, exported, dialect):
    network = make(lambda n, x, t, y: x * n.table(y)[:, :, None, None], table=nn.Embedding(5, 8))
    x, t, y = torch.randn(3, 8, 4, 4), torch.zeros(3), torch.tensor([4, 0, 2])
    assert torch.equal(exported(network, plain_adapter, x, y, dialect)(x, t, y), network(x, t, y))


REFUSED = {
    "cumsum": lambda n, x, t: n.conv(x).cumsum(1),
    "indexing": lambda n, x, t: n.conv(x)[:, 0],
    "add_, which changes its input": lambda n, x, t: n.conv(x).add_(1),
    "interpolate": lambda n, x, t: F.interpolate(n.conv(x), scale_factor=2.0, mode="bilinear"),
    "pad other than with zeros": lambda n, x, t: F.pad(n.conv(x), (1, 1), value=3.0),
    "gelu with approximate=tanh": lambda n, x, t: F.gelu(n.conv(x), approximate="tanh"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_operator_without_counterpart_is_named(name, make, plain_adapter):
    network = make(REFUSED[name], conv=nn.Conv2d(8, 6, 1))
    with pytest.raises(ValueError, match=f"the network: expected operators .*, found {name}"):
        trace(network, plain_adapter, (8, 4, 4))


def test_the_module_of_an_unknown_operator_is_named(make, plain_adapter):
    network = make(lambda n, x, t: n.inner(x, t), inner=make(lambda n, x, t: torch.erfinv(x)))
    with pytest.raises(ValueError, match="^inner: expected operators that the ONNX export knows, found erfinv$"):
        make_model(network, plain_adapter, (8, 4, 4))
    assert "forward" not in network.inner.__dict__


def test_what_nobody_reads_is_not_written(make, plain_adapter):
    network = make(lambda n, x, t: (x.sin() * 0 + x, x)[1] * 2)
    kinds = [node.op_type for node in make_model(network, plain_adapter, (8, 4, 4)).graph.node]
    assert "Sin" not in kinds


def test_a_layer_that_is_read_in_parts_is_not_written_whole(make, plain_adapter):
    """Each part is a layer of its own, as of GEGLU's projection."""

    def compute(n, x, t):
        value, gate = n.layer(x.flatten(2).transpose(1, 2)).chunk(2, -1)
        return value * F.gelu(gate)

    network = make(compute, layer=nn.Linear(8, 12))
    graph = make_model(network, plain_adapter, (8, 4, 4)).graph
    assert sorted(list(each.dims) for each in graph.initializer if len(each.dims) == 2) == [[8, 6], [8, 6]]
    assert [node.op_type for node in graph.node].count("MatMul") == 2

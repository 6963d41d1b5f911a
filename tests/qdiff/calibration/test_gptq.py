"""Error-compensated rounding against a plain unblocked reference, and the moments it works on."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.frontier import Frontier
from qdiff.calibration.gptq import InputMoment, compensate, compensate_unit, execution_order, input_rows
from qdiff.calibration.hooks import recording_inputs
from qdiff.nn.grid import Grid
from qdiff.nn.layers import QUANT_LAYERS, quant_layers
from qdiff.nn.ranges import grid_from_range
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import QuantSpec, Recipe, Rule, StepGroups
from qdiff.recipes.stages import GPTQ, RangeSpec, WeightRanges

STEPS = StepTable(1000, StepGroups())
W3 = QuantSpec(3, axis="out_channel")


def quantized(layer, spec=W3, boundary=None, act_spec=None):
    """The layer in float64 with min-max weight grids."""
    layer = QUANT_LAYERS[type(layer)](layer.double().requires_grad_(False), spec, act_spec, STEPS, boundary).double()
    for part, quantizer in zip(layer.slices, layer.weight_quantizers, strict=True):
        rows = layer.weight[:, part].reshape(quantizer.scale.shape[0], -1)
        quantizer.set_grid(grid_from_range(rows.amin(1), rows.amax(1), spec))
    return layer


@pytest.fixture
def make_layer():
    def make(build, seed=0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return make


def correlated(width, generator, rows=400):
    """A moment of inputs that depend on one another and differ in size."""
    mix = torch.randn(width, width, dtype=torch.float64, generator=generator) / width**0.5
    x = torch.randn(rows, width, dtype=torch.float64, generator=generator) @ (mix + 0.5 * torch.eye(width))
    x = x * torch.linspace(0.2, 2, width)[torch.randperm(width, generator=generator)]
    return x.T @ x


def plain(layer, base, moment, damping):
    """Methods §8 column by column, with the inverse updated by elimination instead of a Cholesky factor."""
    weight, moment = base.flatten(1).clone(), moment.clone()
    width = weight.shape[1]
    dead = moment.diagonal() == 0
    weight[:, dead] = 0
    moment[dead, dead] = 1
    moment += damping * moment.diagonal().mean() * torch.eye(width)
    order = moment.diagonal().argsort(descending=True).tolist()
    starts = [layer.weight[0, part].numel() for part in layer.slices]
    inverse = torch.linalg.inv(moment)
    codes = torch.zeros_like(weight)
    for n, i in enumerate(order):
        q = layer.weight_quantizers[0 if i < starts[0] else 1]
        scale, zero = q.scale.flatten(), q.zero_point.flatten()
        codes[:, i] = (torch.round(weight[:, i] / scale) + zero).clamp(q.spec.qmin, q.spec.qmax)
        error = (weight[:, i] - (codes[:, i] - zero) * scale) / inverse[i, i]
        rest = order[n + 1 :]
        weight[:, rest] -= error[:, None] * inverse[i, rest]
        inverse -= inverse[:, i : i + 1] * inverse[i : i + 1] / inverse[i, i]
    return codes.view_as(base), weight.view_as(base)


def error_of(layer, codes, base, moment):
    """sum over output channels of e^T H e, the squared error of the layer's output."""
    parts = zip(layer.slices, layer.weight_quantizers, strict=True)
    error = (torch.cat([q.grid.values(codes[:, part]) for part, q in parts], 1) - base).flatten(1)
    return torch.einsum("ok,kl,ol->", error, moment, error).item()


LAYERS = {
    "linear": (lambda: nn.Linear(30, 7), None),
    "split-linear": (lambda: nn.Linear(30, 7), 11),
    "conv": (lambda: nn.Conv2d(6, 7, 3), None),
    "split-conv": (lambda: nn.Conv2d(6, 7, 3), 2),
    "conv1d": (lambda: nn.Conv1d(6, 7, 5), None),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request, make_layer):
    build, boundary = request.param
    return quantized(make_layer(build), boundary=boundary)


@pytest.mark.parametrize("block", [1, 7, 128], ids=lambda b: f"block{b}")
@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_it_is_the_plain_column_by_column_algorithm_whatever_the_block(layer, generator, block, damping):
    base, moment = layer.weight.clone(), correlated(layer.weight[0].numel(), generator)
    codes, compensated = compensate(layer, base, moment, GPTQ(damping=damping, block=block))
    expected_codes, expected = plain(layer, base, moment, damping)
    assert torch.equal(codes, expected_codes)
    torch.testing.assert_close(compensated, expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(codes, layer.nearest_codes(base))


def test_the_codes_are_nearest_to_the_compensated_weight(layer, generator):
    """That is what a learned rounding behind it takes as its base."""
    base = layer.weight.clone()
    codes, compensated = compensate(layer, base, correlated(layer.weight[0].numel(), generator), GPTQ())
    assert torch.equal(layer.nearest_codes(compensated), codes)


def test_uncorrelated_inputs_leave_nearest_rounding(layer):
    base = layer.weight.clone()
    codes, compensated = compensate(layer, base, torch.eye(layer.weight[0].numel()).double(), GPTQ())
    assert torch.equal(codes, layer.nearest_codes(base)) and torch.equal(compensated, base)


def test_the_error_of_the_output_falls(layer, generator):
    base, moment = layer.weight.clone(), correlated(layer.weight[0].numel(), generator)
    codes, _ = compensate(layer, base, moment, GPTQ())
    assert error_of(layer, codes, base, moment) < 0.7 * error_of(layer, layer.nearest_codes(base), base, moment)


def test_columns_of_dead_inputs_become_zero_and_disturb_nothing(make_layer, generator):
    layer = quantized(make_layer(lambda: nn.Linear(30, 7)))
    dead = torch.tensor([0, 4, 29])
    moment = correlated(30, generator)
    moment[dead] = 0
    moment[:, dead] = 0
    base = layer.weight.clone()
    codes, compensated = compensate(layer, base, moment, GPTQ())
    zero = layer.weight_quantizers[0].zero_point
    assert torch.equal(codes[:, dead], zero.expand(7, 3)) and (compensated[:, dead] == 0).all()
    expected, _ = plain(layer, base, moment, 0.01)
    assert torch.equal(codes, expected)


def test_nothing_it_is_given_is_changed(layer, generator):
    base, moment = layer.weight.clone(), correlated(layer.weight[0].numel(), generator)
    given = base.clone(), moment.clone(), copy.deepcopy(layer.state_dict())
    compensate(layer, base, moment, GPTQ())
    assert torch.equal(base, given[0]) and torch.equal(moment, given[1])
    assert all(torch.equal(value, given[2][key]) for key, value in layer.state_dict().items())


# Input rows and moments

INPUTS = {
    "conv-stride-padding": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1), (3, 4, 8, 8)),
    "conv-dilated": (lambda: nn.Conv2d(4, 5, (3, 2), dilation=(1, 2), padding=(2, 0)), (3, 4, 8, 8)),
    "pointwise": (lambda: nn.Conv2d(4, 5, 1), (3, 4, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 5, 3, stride=2, padding=1), (3, 4, 9)),
    "linear": (lambda: nn.Linear(4, 5), (6, 4)),
    "linear-of-tokens": (lambda: nn.Linear(4, 5), (3, 7, 4)),
}


@pytest.fixture(params=INPUTS.values(), ids=INPUTS)
def layer_and_input(request, make_layer, generator):
    build, shape = request.param
    return make_layer(build), torch.randn(shape, dtype=torch.float64, generator=generator)


def test_rows_times_weights_are_the_layers_outputs(layer_and_input):
    layer, x = quantized(layer_and_input[0]), layer_and_input[1]
    rows = input_rows(layer, x)
    products = rows @ layer.weight.flatten(1).T + layer.bias
    expected = layer(x)
    if expected.dim() > 2 and not isinstance(layer, QUANT_LAYERS[nn.Linear]):
        expected = expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(products, expected.reshape(-1, 5))


def test_a_moment_is_that_of_the_rows_of_the_quantized_input_over_all_batches(layer_and_input, generator):
    layer, x = quantized(layer_and_input[0], act_spec=QuantSpec(3, "signed")), layer_and_input[1]
    layer.act_quantizers[0].set_grid(Grid(torch.tensor(0.5), torch.tensor(0.0), layer.act_quantizers[0].spec))
    moment = InputMoment(layer, 10**6, generator)
    for batch in x.split(2):
        moment.add(batch)
    rows = input_rows(layer, (2 * x).round().clamp(-4, 3) / 2)
    torch.testing.assert_close(moment.total, rows.T @ rows)


def test_a_moment_of_a_sample_of_rows(make_layer, generator):
    """Rows are one-hot, so the moment counts how often each was taken."""
    layer = quantized(make_layer(lambda: nn.Linear(50, 5)))
    x = torch.eye(50, dtype=torch.float64)

    def counts(seed):
        moment = InputMoment(layer, 20, torch.Generator().manual_seed(seed))
        for _ in range(2):
            moment.add(x)
        assert torch.equal(moment.total, moment.total.diagonal().diag())
        return moment.total.diagonal()

    first = counts(0)
    assert first.sum() == 40 and first.max() == 2 and first.min() == 0
    assert torch.equal(first, counts(0)) and not torch.equal(first, counts(1))


# Whole units


@dataclass
class OneUnit:
    """A frontier of a single module, as far as `execution_order` looks."""

    module: nn.Module
    x: torch.Tensor

    def seek(self, name):
        return self

    def batches(self, segment):
        yield (self.x,), torch.zeros(len(self.x))

    def run(self, module, args, t):
        return module(*args)


class Backwards(nn.Module):
    """Runs its layers from last to first, one of them twice, one never."""

    def __init__(self):
        super().__init__()
        make = QUANT_LAYERS[nn.Linear]
        self.a, self.b, self.c, self.unused = (make(nn.Linear(3, 3), W3, None, STEPS) for _ in range(4))
        self.plain = make(nn.Linear(3, 3), None, None, STEPS)

    def forward(self, x):
        return self.a(self.c(self.plain(self.b(self.c(x)))))


def test_layers_are_taken_in_the_order_in_which_the_unit_calls_them():
    unit = OneUnit(Backwards(), torch.ones(4, 3))
    assert [name for name, _ in execution_order(unit, "mid.unit")] == [
        f"mid.unit.{n}" for n in ("c", "b", "plain", "a")
    ]
    assert [name for name, _ in execution_order(OneUnit(unit.module.a, unit.x), "conv_in")] == ["conv_in"]


def test_each_layer_of_a_unit_is_rounded_on_what_the_rounded_ones_before_it_produce(
    quantized_base, adapter, states, generator
):
    network, unrounded_weights = quantized_base
    options, name = GPTQ(rows=10**6), "up.1.block.0"
    frontier = Frontier(network, adapter, states, 20)
    former = {n: base.clone() for n, base in unrounded_weights.items()}
    compensate_unit(frontier, name, unrounded_weights, options, generator)
    unit = network.get_submodule(name)
    args = frontier.inputs(name)
    assert list(quant_layers(unit)) == ["conv1", "temb_proj", "conv2", "nin_shortcut"]
    for n, layer in quant_layers(unit).items():
        moment = InputMoment(layer, 10**6, generator)
        with torch.no_grad(), recording_inputs(layer, moment.add):
            unit(*args)
        codes, compensated = compensate(layer, former[f"{name}.{n}"], moment.total, options)
        assert torch.equal(layer.codes.float(), codes.float()), n
        assert torch.equal(unrounded_weights[f"{name}.{n}"], compensated), n
        assert not torch.equal(codes, layer.nearest_codes(former[f"{name}.{n}"]))
    untouched = {n for n in unrounded_weights if not n.startswith(name)}
    assert all(torch.equal(unrounded_weights[n], former[n]) for n in untouched)


@pytest.fixture
def quantized_base(make_network, adapter, states):
    """A network in float64 with nearest codes, one layer left float, and the float weights by layer name."""
    recipe = Recipe("w3", W3, rules=(Rule("conv_in", 0),), split_shortcuts=True, stages=(WeightRanges(RangeSpec()),))
    run = calibrate(make_network(32).double(), adapter, recipe, states, 0)
    return run.network, run.unrounded_weights

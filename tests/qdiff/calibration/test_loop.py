"""The one optimisation loop, against hand-written steps, and what it must leave as it found it."""

import copy
import math

import pytest
import torch
from torch import nn

from qdiff.calibration.batch_noise import BatchNoise
from qdiff.calibration.loop import UnitData, UnitTask, minibatches, optimise, parameter_groups
from qdiff.nn.functional import soft_quantize, soft_round
from qdiff.nn.grid import MIN_SCALE, Grid
from qdiff.nn.layers import QUANT_LAYERS, act_quantizers, quant_layers
from qdiff.nn.quantizers import ActQuantizer
from qdiff.nn.ranges import grid_from_range
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import QuantSpec, StepGroups
from qdiff.recipes.stages import Learn, Loss, Reconstruct, RoundingPenalty

STEPS = StepTable(1000, StepGroups())
N, IN, HIDDEN, OUT = 12, 6, 10, 4
FLOAT32 = 1e-7  # precision of the losses noted, whatever the unit's


class Toy(nn.Module):
    """Two layers with dropout between; in eval mode no dropout."""

    def __init__(self, layers):
        super().__init__()
        self.first, self.second = layers
        self.norm, self.dropout = nn.LayerNorm(HIDDEN, dtype=torch.float64), nn.Dropout(0.5)

    def forward(self, x):
        return self.second(self.dropout(self.norm(self.first(x)).relu()))


def quantize(layer, weight_bits=3, act_bits=4):
    spec, act = QuantSpec(weight_bits, axis="out_channel"), QuantSpec(act_bits, "signed")
    quantized = QUANT_LAYERS[nn.Linear](copy.deepcopy(layer), spec, act, STEPS).double()
    grid = grid_from_range(layer.weight.amin(1), layer.weight.amax(1), spec)
    quantized.weight_quantizers[0].set_grid(grid)
    quantized.act_quantizers[0].set_grid(Grid(torch.tensor(0.3), torch.tensor(0.0), quantized.act_quantizers[0].spec))
    quantized.freeze(quantized.nearest_codes(layer.weight))
    return quantized


@pytest.fixture
def float_unit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unit = Toy([nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)]).double().eval()
    return unit.requires_grad_(False)


@pytest.fixture
def unit(float_unit):
    unit = copy.deepcopy(float_unit)
    unit.first, unit.second = quantize(float_unit.first), quantize(float_unit.second)
    return unit.eval().requires_grad_(False)


@pytest.fixture
def data(float_unit):
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(N, IN, dtype=torch.float64, generator=generator)
    other = plain + 0.1 * torch.randn(N, IN, dtype=torch.float64, generator=generator)
    return UnitData((other,), (plain,), float_unit(plain), torch.full((N,), 500.0))


def learn(unit, float_unit, data, stage, seed=0, team=None, tick=lambda loss: None, **options):
    """One unit learned; rounding is left soft."""
    unrounded_weights = {layer: float_unit.get_submodule(name).weight for name, layer in quant_layers(unit).items()}
    groups = parameter_groups(unit, stage, unrounded_weights)
    task = UnitTask(unit, data, stage, groups, STEPS, float_unit, **options)
    return optimise(task, torch.Generator().manual_seed(seed), tick, team)


def everything(unit):
    return {name: tensor.clone() for name, tensor in (*unit.named_parameters(), *unit.named_buffers())}


def whole(group, rate, **changes):
    """One iteration on all the data."""
    return Reconstruct({group: Learn(rate)}, **{"iterations": 1, "batch_size": N, "loss": Loss(2.0), **changes})


# Steps


def reference(unit, float_unit, stage):
    """(parameters, function from inputs to outputs) of the toy unit, written out for one learned group."""
    layers = list(quant_layers(unit).values())
    weights = [layer.weight.clone() for layer in layers]
    scales = [layer.act_quantizers[0].scale.clone() for layer in layers]
    biases = [layer.bias.clone() for layer in layers]
    alphas = []
    for layer, name in zip(layers, quant_layers(unit), strict=True):
        ratio = float_unit.get_submodule(name).weight / layer.weight_quantizers[0].scale
        alphas.append(-torch.log(1.2 / (ratio - ratio.floor() + 0.1) - 1))
    groups = {"rounding": alphas, "scale": scales, "bias": biases}
    learned = [p.detach().requires_grad_() for name in stage.learn for p in groups[name]]
    iterator = iter(learned)
    for name in stage.learn:
        groups[name][:] = [next(iterator) for _ in groups[name]]

    def forward(x):
        for i, layer in enumerate(layers):
            weight = weights[i]
            if "rounding" in stage.learn:
                q = layer.weight_quantizers[0]
                base = float_unit.get_submodule(("first", "second")[i]).weight
                weight = soft_quantize(base, alphas[i], q.grid)
            act = layer.act_quantizers[0]
            x = Grid(scales[i], act.zero_point, act.spec).snap(x) @ weight.T + biases[i]
            if i == 0:
                x = float_unit.norm(x).relu()
        return x

    return learned, forward


def current(unit, group):
    layers = quant_layers(unit).values()
    if group == "rounding":
        return [layer.rounding[0].alpha for layer in layers]
    return [layer.bias if group == "bias" else layer.act_quantizers[0].scale for layer in layers]


@pytest.mark.parametrize("p", [2.0, 2.4], ids=lambda p: f"l{p}")
@pytest.mark.parametrize("group", ["rounding", "scale", "bias"])
def test_one_iteration_is_one_step_of_adam(unit, float_unit, data, group, p):
    """After one step Adam's moments are the gradient and its square: every parameter moves by rate * g / |g|."""
    stage = whole(group, 0.01, loss=Loss(p))
    learned, forward = reference(unit, float_unit, stage)
    loss = (forward(data.quantized[0]) - data.target).abs().pow(p).sum(1).mean()
    loss.backward()
    expected = [x.detach() - 0.01 * x.grad / (x.grad.abs() + 1e-8) for x in learned]
    losses = learn(unit, float_unit, data, stage)
    for mine, theirs in zip(current(unit, group), expected, strict=True):
        torch.testing.assert_close(mine.data, theirs, rtol=1e-9, atol=1e-9)
    assert losses == [(0, pytest.approx(loss.item()))]


def test_several_groups_learn_at_their_own_rates_and_schedules(unit, float_unit, data):
    """Random batches without repeats, Adam per group, cosine rate 0.5 (1 + cos(pi i / iterations))."""
    rates = {"rounding": Learn(0.05, "cosine"), "scale": Learn(0.003), "bias": Learn(0.01, "cosine")}
    stage = Reconstruct(rates, iterations=7, batch_size=5, inputs="quantized", loss=Loss(2.0))
    learned, forward = reference(unit, float_unit, stage)
    optimizers = [torch.optim.Adam(learned[2 * i : 2 * i + 2]) for i in range(3)]
    generator = torch.Generator().manual_seed(0)
    for i in range(7):
        index = torch.randperm(N, generator=generator)[:5]
        loss = (forward(data.quantized[0][index]) - data.target[index]).square().sum(1).mean()
        for optimizer, rate in zip(optimizers, rates.values(), strict=True):
            factor = 1 if rate.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * i / 7))
            optimizer.param_groups[0]["lr"] = rate.rate * factor
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    learn(unit, float_unit, data, stage)
    found = [x for group in rates for x in current(unit, group)]
    for mine, theirs in zip(found, learned, strict=True):
        torch.testing.assert_close(mine.data, theirs.data, rtol=1e-8, atol=1e-8)


def test_the_penalty_is_added_from_the_end_of_its_warm_up(unit, float_unit, data):
    """With a weight that drowns the loss, the second of two steps goes where the penalty pushes."""
    stage = whole("rounding", 0.01, iterations=2, penalty=RoundingPenalty(1e6, warmup=0.5, beta_start=2.0))
    with_penalty = copy.deepcopy(unit)
    learn(with_penalty, float_unit, data, stage)
    learn(unit, float_unit, data, whole("rounding", 0.01))
    for mine, plain in zip(current(with_penalty, "rounding"), current(unit, "rounding"), strict=True):
        h = soft_round(plain)
        inner = ((h - 0.5).abs() > 0.1) & (h > 0.05) & (h < 0.95)
        assert torch.equal((mine - plain).sign()[inner], (h - 0.5).sign()[inner])


def test_only_the_variables_named_are_penalized(unit, float_unit, data):
    stage = whole("rounding", 0.01, penalty=RoundingPenalty(1e6, warmup=0.0, beta_start=2.0))
    plain, none = copy.deepcopy(unit), copy.deepcopy(unit)
    learn(plain, float_unit, data, whole("rounding", 0.01))
    learn(none, float_unit, data, stage, penalized=[])
    for mine, theirs in zip(current(none, "rounding"), current(plain, "rounding"), strict=True):
        assert torch.equal(mine, theirs)
    learn(unit, float_unit, data, stage)
    assert not torch.equal(current(unit, "rounding")[1], current(plain, "rounding")[1])


def test_scales_stay_positive(unit, float_unit, data):
    """Too wide a step, so that learning narrows it, at a rate that would take it below zero."""
    for scale in current(unit, "scale"):
        scale.fill_(2.0)
    learn(unit, float_unit, data, whole("scale", 5.0))
    assert [scale.item() for scale in current(unit, "scale")] == [MIN_SCALE, MIN_SCALE]


def test_each_sample_learns_the_scales_of_its_timestep(unit, float_unit, data):
    """Two sets, and timesteps of the second alone: the loss is that set's, and the other does not move."""
    table = StepTable(1000, StepGroups(2), torch.tensor([900, 100]))
    for layer in quant_layers(unit).values():
        layer.act_quantizer = ActQuantizer(QuantSpec(4, "signed"), table).double()
        for group, scale in enumerate((0.9, 0.3)):
            layer.act_quantizer.set_grid(
                Grid(torch.tensor(scale, dtype=torch.float64), torch.tensor(0.0), layer.act_quantizer.spec), group
            )
    fresh, groups = copy.deepcopy(unit), {"scale": [q.scale for q in act_quantizers(unit).values()]}
    data.t.fill_(120.0)
    losses = optimise(UnitTask(unit, data, whole("scale", 0.01), groups, table), torch.Generator())
    for quantizer in act_quantizers(fresh).values():
        quantizer.scale.fill_(0.3)
    with next(iter(act_quantizers(fresh).values())).steps.at(data.t):
        expected = (fresh(data.quantized[0]) - data.target).square().sum(1).mean()
    assert losses[0][1] == pytest.approx(expected.item(), rel=1e-6)
    assert all(scale[0] == 0.9 and abs(scale[1] - 0.3) > 0.005 for scale in groups["scale"])
    assert table.index is None


def test_minibatches_are_random_and_without_repeats(generator):
    batches = list(minibatches(10, 4, 50, generator))
    assert all(len(batch) == 4 and len(set(batch.tolist())) == 4 for batch in batches)
    assert set(torch.cat(batches).tolist()) == set(range(10))
    assert [len(batch) for batch in minibatches(3, 4, 2, generator)] == [3, 3]


# What learning may touch


@pytest.mark.parametrize("names", [("rounding",), ("scale",), ("bias",), ("scale", "bias")], ids="+".join)
def test_only_the_learned_groups_change(unit, float_unit, data, names):
    before = everything(unit)
    stage = Reconstruct(dict.fromkeys(names, Learn(0.05)), iterations=3, batch_size=N)
    learn(unit, float_unit, data, stage)
    changed = {
        name for name, tensor in everything(unit).items() if name in before and not torch.equal(tensor, before[name])
    }
    suffixes = {"scale": "act_quantizer.scale", "bias": "bias"}
    expected = {f"{layer}.{suffixes[n]}" for layer in ("first", "second") for n in names if n in suffixes}
    assert changed == expected
    new = everything(unit).keys() - before.keys()
    assert all(".rounding." in name for name in new) and bool(new) == ("rounding" in names)


def test_sixteen_bit_activations_keep_their_scale(unit, float_unit, data):
    unit.second.act_quantizer.spec = QuantSpec(16, "signed")
    former = unit.second.act_quantizer.scale.clone()
    learn(unit, float_unit, data, whole("scale", 0.05))
    assert torch.equal(unit.second.act_quantizer.scale, former)
    assert unit.first.act_quantizer.scale.item() != pytest.approx(0.3)


def test_groups_without_parameters_are_left_out(unit):
    stage = Reconstruct({"scale": Learn(1e-3), "bias": Learn(1e-3)})
    for quantizer in act_quantizers(unit).values():
        quantizer.enabled = False
    assert parameter_groups(unit, stage, {}).keys() == {"bias"}
    assert parameter_groups(nn.ReLU(), stage, {}) == {}


class Stop(Exception):
    """Ends learning early."""


@pytest.mark.parametrize("train_mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("stopped", [False, True], ids=["to-the-end", "stopped"])
def test_flags_are_put_back(unit, float_unit, data, stopped, train_mode):
    unit.second.bias.requires_grad_(True)
    unit.norm.train()
    former = {name: p.requires_grad for name, p in unit.named_parameters()}
    modes = {name: m.training for name, m in unit.named_modules()}
    stage = Reconstruct({"scale": Learn(1e-3), "bias": Learn(1e-3)}, iterations=2, drop=0.5, loss=Loss(taps=1.0))

    def tick(loss):
        assert {m.training for m in unit.modules()} == {train_mode}
        assert unit.first.bias.requires_grad and not unit.norm.weight.requires_grad
        if stopped:
            raise Stop

    try:
        learn(unit, float_unit, data, stage, train_mode=train_mode, tick=tick)
        assert not stopped
    except Stop:
        assert stopped
    assert {name: p.requires_grad for name, p in unit.named_parameters()} == former
    assert {name: m.training for name, m in unit.named_modules()} == modes
    assert all(p.grad is None for p in unit.parameters())
    assert all(q.drop is None for q in act_quantizers(unit).values())
    assert not any(m._forward_hooks for m in (*unit.modules(), *float_unit.modules()))


# Inputs, drop, taps


@pytest.mark.parametrize("inputs", ["float", "quantized"])
def test_inputs_come_from_the_prefix_that_the_stage_names(data, generator, inputs):
    index = torch.tensor([3, 1])
    (found,) = data.arguments(Reconstruct(inputs=inputs), index, BatchNoise(generator))
    assert torch.equal(found, (data.float_ if inputs == "float" else data.quantized)[0][index])


def test_mixed_inputs_take_each_element_of_the_first_argument_from_either_prefix(generator):
    """The second argument, time embedding or context, is always the quantized prefix's (methods §2.3)."""
    zeros, ones = torch.zeros(50, 200), torch.ones(50, 200)
    data = UnitData((ones, ones), (zeros, zeros), zeros, torch.zeros(50))
    first, second = data.arguments(Reconstruct(inputs="mixed", mix=0.3), torch.arange(50), BatchNoise(generator))
    assert set(first.unique().tolist()) == {0, 1}
    assert first.mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(second, ones)
    again, _ = data.arguments(Reconstruct(inputs="mixed", mix=0.3), torch.arange(50), BatchNoise(generator))
    assert not torch.equal(first, again)


def test_with_everything_dropped_activations_are_float(unit, float_unit, data):
    """Weights on the grid, activations as they come: the loss of a unit without activation quantizers."""
    losses = learn(unit, float_unit, data, whole("scale", 1e-3, drop=1.0))
    for quantizer in act_quantizers(unit).values():
        quantizer.enabled = False
    expected = (unit(data.quantized[0]) - data.target).square().sum(1).mean()
    assert losses[0][1] == pytest.approx(expected.item(), rel=FLOAT32)


def test_taps_add_the_errors_of_all_layers_but_the_last_called(unit, float_unit, data):
    """Layer targets are the float unit's on float-prefix inputs (methods §2.3)."""
    fresh = copy.deepcopy(unit)
    losses = learn(unit, float_unit, data, whole("scale", 1e-3, loss=Loss(2.4, taps=0.8)))

    def l24(a, b):
        return (a - b).abs().pow(2.4).sum(1).mean()

    outer = l24(fresh(data.quantized[0]), data.target)
    inner = l24(fresh.first(data.quantized[0]), float_unit.first(data.float_[0]))
    assert losses[0][1] == pytest.approx((outer + 0.8 * inner).item(), rel=FLOAT32)
    assert inner > 0.01 * outer


def test_taps_of_a_single_layer_add_nothing(float_unit, data):
    first = quantize(float_unit.first)
    single = UnitData(data.quantized, data.float_, float_unit.first(data.float_[0]), data.t)
    losses = [
        learn(copy.deepcopy(first), float_unit.first, single, whole("bias", 1e-3, loss=Loss(taps=taps)))[0][1]
        for taps in (0.0, 5.0)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_dropout_is_active_in_train_mode_only_and_draws_from_the_stages_generator(unit, float_unit, data):
    def loss(seed, train_mode):
        stage = whole("bias", 1e-3)
        return learn(copy.deepcopy(unit), float_unit, data, stage, seed, train_mode=train_mode)[0][1]

    plain = loss(0, False)
    assert loss(1, False) == pytest.approx(plain, rel=1e-12)
    torch.manual_seed(0)
    former = torch.get_rng_state()
    first = loss(0, True)
    assert torch.equal(torch.get_rng_state(), former)
    torch.manual_seed(5)
    assert loss(0, True) == first and loss(1, True) != first and abs(first - plain) > 0.01 * plain


# AdaRound on a toy layer (methods §7.1 item 2)


def share_changed_by_hardening(penalty, generator):
    """How many of a learned layer's outputs move by more than 1 % of their spread when its rounding is hardened."""
    x = torch.randn(256, 32, dtype=torch.float64, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(32, 16).double().requires_grad_(False)
    quantized = quantize(layer, weight_bits=4).requires_grad_(False)
    quantized.act_quantizers[0].enabled = False
    data = UnitData((x,), (x,), layer(x), torch.zeros(256))
    stage = Reconstruct({"rounding": Learn(1e-2)}, iterations=1000, batch_size=32, penalty=penalty)
    learn(quantized, layer, data, stage)
    soft = quantized(x)
    quantized.finish_rounding()
    assert ((quantized.weight - layer.weight).abs() <= 1.001 * quantized.weight_quantizers[0].scale).all()
    return ((quantized(x) - soft).abs() > 0.01 * soft.std()).double().mean().item()


def test_hardening_after_the_penalty_changes_less_than_one_percent_of_outputs(generator):
    assert share_changed_by_hardening(RoundingPenalty(0.1), generator) < 0.01
    assert share_changed_by_hardening(None, generator) > 0.5  # without it, rounding stays soft

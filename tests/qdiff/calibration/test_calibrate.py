"""Whole calibrations of a small network: what each stage does, and what a calibration leaves behind."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import qdiff.calibration.stages
from qdiff.calibration.calibrate import Progress, calibrate
from qdiff.calibration.frontier import Frontier
from qdiff.calibration.hooks import recording_inputs
from qdiff.calibration.loop import UnitData, take_rows
from qdiff.calibration.selectors import CalibrationSet
from qdiff.nn.layers import act_quantizers, quant_layers
from qdiff.nn.ranges import grid_from_range
from qdiff.recipes.recipe import QuantSpec, Recipe, Rule, StepGroups
from qdiff.recipes.stages import (
    GPTQ,
    ActivationRanges,
    CorrectBias,
    Learn,
    Loss,
    RangeSpec,
    Reconstruct,
    RoundingPenalty,
    WeightRanges,
)
from qdiff.utils.seeds import generator_of

WEIGHTS, ACTS = WeightRanges(RangeSpec()), ActivationRanges(RangeSpec())
BASE = Recipe("base", QuantSpec(4, axis="out_channel"), QuantSpec(8), split_shortcuts=True, stages=(WEIGHTS, ACTS))
QUICK = Reconstruct(
    {"rounding": Learn(0.3), "scale": Learn(1e-3)}, iterations=2, batch_size=8, penalty=RoundingPenalty()
)
UNITS = [
    "temb.dense.0", "temb.dense.1", "conv_in",
    "down.0.block.0", "down.0.downsample", "down.1.block.0", "down.1.attn.0",
    "mid.block_1", "mid.attn_1", "mid.block_2",
    "up.1.block.0", "up.1.attn.0", "up.1.block.1", "up.1.attn.1", "up.1.upsample",
    "up.0.block.0", "up.0.block.1", "conv_out",
]  # fmt: skip


def with_stages(*stages, **changes):
    return replace(BASE, stages=(WEIGHTS, ACTS, *stages), **changes)


@pytest.fixture
def run(make_network, adapter, states, timesteps):
    """(recipe) -> the calibration of a fresh network."""

    def calibrated(recipe, seed=0, network=None, data=states, **options):
        return calibrate(network or make_network(32), adapter, recipe, data, seed, timesteps, **options)

    return calibrated


def grid(low, high, spec=BASE.activations):
    return grid_from_range(torch.as_tensor(low).view(1), torch.as_tensor(high).view(1), spec)


def assert_act_grid(quantizer, low, high):
    expected = grid(low, high, quantizer.spec)
    torch.testing.assert_close(quantizer.scale.data, expected.scale)
    assert torch.equal(quantizer.zero_point, expected.zero_point)


# Randomness, and what is left alone


def numbers(network):
    """Codes and scales of a network, joined."""
    codes = torch.cat([m.codes.flatten() for m in quant_layers(network).values()])
    return codes, torch.cat([q.scale.flatten() for q in act_quantizers(network).values()])


def test_a_seed_determines_every_bit_and_another_gives_something_else(run):
    recipe = with_stages(replace(QUICK, inputs="mixed", drop=0.5), compat=("train_mode",))
    torch.manual_seed(0)
    former = torch.get_rng_state()
    first = numbers(run(recipe).network)
    assert torch.equal(torch.get_rng_state(), former)  # the global generator is nobody's business
    torch.manual_seed(7)
    again, other = numbers(run(recipe).network), numbers(run(recipe, seed=1).network)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("stages", [(QUICK,), (GPTQ(rows=50),)], ids=["learned", "compensated"])
def test_the_float_network_and_the_states_are_left_alone(run, make_network, states, stages):
    network, former = make_network(32), copy.deepcopy(states)
    result = run(with_stages(*stages), network=network)
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), make_network(32).state_dict().values(),
                                                strict=True))  # fmt: skip
    assert torch.equal(states.x, former.x) and torch.equal(states.t, former.t)
    assert result.network is not network and not quant_layers(network)


def test_a_calibration_leaves_a_network_that_is_ready_to_run(run):
    network = run(with_stages(replace(QUICK, drop=0.5, loss=Loss(taps=1.0)), compat=("train_mode",))).network
    assert not any(m.training for m in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    for layer in quant_layers(network).values():
        assert layer.frozen and layer.rounding is None
        parts = zip(layer.slices, layer.weight_quantizers, strict=True)
        folded = torch.cat([q.grid.values(layer.codes[:, part]) for part, q in parts], 1)
        assert torch.equal(layer.weight, folded)
    for quantizer in act_quantizers(network).values():
        assert quantizer.enabled and quantizer.observer is None and quantizer.drop is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules() if m is not network)


# Weight ranges


def test_weights_are_rounded_to_the_nearest_code_on_their_grid(run, float_weights):
    network = run(replace(BASE, stages=(WEIGHTS,))).network
    for name, weight in float_weights(32).items():
        layer = quant_layers(network)[name]
        assert torch.equal(layer.codes.float(), layer.nearest_codes(weight))
        for part, quantizer in zip(layer.slices, layer.weight_quantizers, strict=True):
            rows = weight[:, part].flatten(1)
            expected = grid_from_range(rows.amin(1), rows.amax(1), quantizer.spec)
            assert torch.equal(quantizer.scale.flatten(), expected.scale)
            assert torch.equal(quantizer.zero_point.flatten(), expected.zero_point)


def test_a_search_narrows_weight_grids(run):
    searched = run(replace(BASE, stages=(WeightRanges(RangeSpec("shrink", 40)),))).network
    plain = run(replace(BASE, stages=(WEIGHTS,))).network
    ratios = searched.conv_in.weight_quantizer.scale / plain.conv_in.weight_quantizer.scale
    assert (ratios <= 1.0001).all() and (ratios < 0.95).any()


# Activation ranges: the input of conv_in is the states themselves, so its grid shows which of them were used.


# Each state is wider than the one before it, so that no two choices of states have the same ends.


@pytest.fixture
def widening(states):
    return CalibrationSet(states.x * torch.linspace(1, 3, 20).view(20, 1, 1, 1), states.t, states.step)


def conv_in_after(run, data, stage, **changes):
    return run(replace(BASE, stages=(WEIGHTS, stage), **changes), data=data).network.conv_in.act_quantizer


@pytest.mark.parametrize(
    ("inputs", "chosen"),
    [
        ("all", slice(None)),
        ("first", torch.arange(3)),
        ("stratified", torch.tensor([0, 6, 13])),
        ("random", torch.randperm(20, generator=generator_of(0, 1, 0))[:3]),
    ],
    ids=["all", "first", "stratified", "random"],
)
def test_ranges_come_from_the_states_that_the_stage_names(run, widening, inputs, chosen):
    quantizer = conv_in_after(run, widening, ActivationRanges(RangeSpec(batch_size=2), inputs=inputs, samples=3))
    x = widening.x[chosen]
    assert_act_grid(quantizer, x.min(), x.max())


@pytest.mark.parametrize("ordered", [False, True], ids=["shuffled", "ordered-ema"])
def test_moving_averages_walk_shuffled_states_unless_the_fault_is_asked_for(run, widening, ordered):
    spec = RangeSpec(aggregate="ema", momentum=0.7, batch_size=4)
    quantizer = conv_in_after(run, widening, ActivationRanges(spec), compat=("ordered_ema",) if ordered else ())
    order = torch.arange(20) if ordered else torch.randperm(20, generator=generator_of(0, 1, 0))
    ends = [(x.min(), x.max()) for x in widening.x[order].split(4)]
    low, high = ends[0]
    for lower, higher in ends[1:]:
        low, high = 0.7 * low + 0.3 * lower, 0.7 * high + 0.3 * higher
    assert_act_grid(quantizer, low, high)


def inputs_of(network, name, x, t):
    seen = []
    with torch.no_grad(), recording_inputs(network.get_submodule(name), seen.append):
        network(x, t)
    return seen[0]


@pytest.mark.parametrize("prefix", ["float", "quantized"])
def test_later_quantizers_see_the_prefix_that_the_stage_names(run, states, prefix):
    """Quantized: what they see when the finished network runs. Float: when no activation is quantized."""
    stage = ActivationRanges(RangeSpec(prefix=prefix, aggregate="first", batch_size=20), inputs="first", samples=20)
    network = run(replace(BASE, activations=QuantSpec(3), stages=(WEIGHTS, stage))).network
    former, name = network.up[0].block[1].conv2.act_quantizer, "up.0.block.1.conv2"
    found = copy.deepcopy(former)
    for quantizer in act_quantizers(network).values():
        quantizer.enabled = prefix == "quantized"
    x = inputs_of(network, name, states.x, states.t)
    assert_act_grid(found, x.min(), x.max())
    for quantizer in act_quantizers(network).values():
        quantizer.enabled = prefix != "quantized"
    other = inputs_of(network, name, states.x, states.t)
    assert abs(other.max() - x.max()) > 1e-3


def test_softmax_outputs_can_have_a_finder_of_their_own(run):
    stage = ActivationRanges(RangeSpec(), softmax=RangeSpec("shrink", 30))
    special = run(replace(BASE, softmax=QuantSpec(4, "unsigned"), stages=(WEIGHTS, stage))).network
    plain = run(replace(BASE, softmax=QuantSpec(4, "unsigned"), stages=(WEIGHTS, ACTS))).network
    for (name, mine), theirs in zip(act_quantizers(special).items(), act_quantizers(plain).values(), strict=True):
        assert (mine.scale < theirs.scale) if name.endswith("_w") else torch.equal(mine.scale, theirs.scale), name


def test_states_of_too_few_steps_leave_a_set_without_range(make_network, adapter, states, timesteps):
    recipe = replace(BASE, step_groups=StepGroups(3))
    first_steps = states.subset(torch.arange(4))
    with pytest.raises(ValueError, match="temb.dense.0.act_quantizer saw no calibration state in step group 1"):
        calibrate(make_network(32), adapter, recipe, first_steps, 0, timesteps)


def test_raw_minimum_reaches_weights_and_activations(run, make_network):
    network = make_network(32)
    network.conv_in.weight[0] = network.conv_in.weight[0].abs() + 1
    network.temb.dense[1].bias += 100  # inputs of temb_proj are positive then, far from zero
    results = {
        c: run(replace(BASE, compat=c), network=copy.deepcopy(network)).network for c in ((), ("raw_min_range",))
    }
    fixed, faulty = (results[c].conv_in.weight for c in results)
    assert fixed[0].max() > 1 and faulty[0].max() < 1
    fixed, faulty = (results[c].mid.block_1.temb_proj.act_quantizer for c in results)
    assert fixed(torch.tensor([[100.0]])) > 90 and faulty(torch.tensor([[100.0]])) < 60


# Learning


def captured(monkeypatch):
    """A list that fills with the arguments of every call of the optimisation loop, which runs as ever; its data are
    read at the time of the call."""
    calls, optimise = [], qdiff.calibration.stages.optimise

    def spy(task, *args, **options):
        data = task.data
        every = torch.arange(len(data.t))
        sources = {key: getattr(data, key) and take_rows(getattr(data, key), every) for key in ("quantized", "float_")}
        read = UnitData(**sources, target=data.target[every], t=data.t)
        calls.append({**vars(task), "data": read, **options})
        return optimise(task, *args, **options)

    monkeypatch.setattr(qdiff.calibration.stages, "optimise", spy)
    return calls


def test_units_learn_in_the_order_in_which_the_network_runs_them(run):
    result = run(with_stages(replace(QUICK, iterations=1)))
    assert [report.unit for report in result.reports] == UNITS


def test_the_published_order_is_that_of_definition(run):
    result = run(with_stages(replace(QUICK, iterations=1), compat=("definition_order",)))
    ups = [unit for unit in UNITS if unit.startswith("up.0")] + [unit for unit in UNITS if unit.startswith("up.1")]
    # Within a level the blocks are defined before the attention.
    ups.sort(key=lambda unit: (unit[:4], ("block", "attn", "upsample").index(unit.split(".")[2])))
    published = UNITS[:10] + ups + ["conv_out"]
    assert [report.unit for report in result.reports] == published != UNITS


@pytest.mark.parametrize("compat", [(), ("definition_order",)], ids=["execution-order", "definition-order"])
@pytest.mark.parametrize("inputs", ["float", "quantized", "mixed"])
@pytest.mark.cases("float-execution-order", "quantized-definition-order", "mixed-execution-order")
def test_units_are_given_the_inputs_and_targets_that_the_stage_names(
    run, make_network, adapter, states, monkeypatch, inputs, compat
):
    """Targets are the float unit's outputs for float inputs; quantized inputs come from the prefix as it is then."""
    calls = captured(monkeypatch)
    result = run(with_stages(replace(QUICK, inputs=inputs, iterations=1), compat=compat))
    plain, prefix = Frontier(make_network(32), adapter, states), Frontier(result.network, adapter, states)
    for call, report in zip(calls, result.reports, strict=True):
        data, name = call["data"], report.unit
        assert torch.equal(data.target, plain.outputs(name)) and torch.equal(data.t, states.t)
        if inputs != "quantized":
            assert all(torch.equal(a, b) for a, b in zip(data.float_, plain.inputs(name), strict=True))
        if inputs == "float":
            assert data.quantized is None
        elif not compat:  # in execution order the prefix is finished when the unit learns
            assert all(torch.equal(a, b) for a, b in zip(data.quantized, prefix.inputs(name), strict=True))
        if inputs == "mixed":
            assert not torch.equal(data.quantized[0], data.float_[0]) or name in ("temb.dense.0", "conv_in")


def test_learning_lowers_the_errors_of_units_and_the_reports_say_so(run, make_network, adapter, states):
    stage = Reconstruct({"rounding": Learn(0.05), "bias": Learn(1e-2)}, iterations=15, batch_size=16)
    result = run(with_stages(stage))
    assert sum(r.after < r.before for r in result.reports) > 0.8 * len(UNITS)
    plain, prefix = Frontier(make_network(32), adapter, states), Frontier(result.network, adapter, states)
    for report in result.reports:
        error = (prefix.outputs(report.unit) - plain.outputs(report.unit)).square().mean()
        assert report.after == pytest.approx(error.item(), rel=1e-4), report.unit
        assert report.kept and report.losses and report.stage == 2


def test_only_what_helps_is_kept_where_the_stage_says_so(run, make_network, adapter, states):
    """At rates that ruin some units, those keep every number they had."""
    learn = {"rounding": Learn(0.3), "scale": Learn(1e-3), "bias": Learn(1e-3)}
    stage = Reconstruct(learn, iterations=2, batch_size=8, keep="better")
    result, before = run(with_stages(stage)), run(with_stages()).network
    kept = {report.unit: report.kept for report in result.reports}
    assert not all(kept.values()) and any(kept.values())
    plain, prefix = Frontier(make_network(32), adapter, states), Frontier(result.network, adapter, states)
    for report in result.reports:
        error = (prefix.outputs(report.unit) - plain.outputs(report.unit)).square().mean().item()
        assert error <= report.before * (1 + 1e-4)
        assert report.kept == (report.after < report.before)
        unit, former = (n.get_submodule(report.unit) for n in (result.network, before))
        same = [torch.equal(a, b) for a, b in zip(tensors(unit), tensors(former), strict=True)]
        assert all(same) != report.kept, report.unit


def tensors(module):
    return [*module.parameters(), *module.buffers()]


def test_a_learned_rounding_starts_from_compensated_weights(run, monkeypatch):
    calls = captured(monkeypatch)
    result = run(replace(BASE, stages=(WEIGHTS, GPTQ(rows=50), replace(QUICK, learn={"rounding": Learn(1e-12)}))))
    compensated = run(replace(BASE, stages=(WEIGHTS, GPTQ(rows=50)))).network
    assert len(calls) == len(UNITS)
    mine, theirs = quant_layers(result.network), quant_layers(compensated)
    differs = torch.cat([(mine[name].codes != layer.codes).flatten() for name, layer in theirs.items()])
    assert differs.float().mean() < 1e-3  # the rate is nothing, so only ties may move
    nearest = run(replace(BASE, stages=(WEIGHTS,))).network
    moved = torch.cat([(quant_layers(nearest)[n].codes != layer.codes).flatten() for n, layer in theirs.items()])
    assert moved.float().mean() > 0.05


def test_units_with_nothing_to_learn_are_skipped(run, monkeypatch):
    """B3: the published code stops there with an empty parameter list."""
    calls = captured(monkeypatch)
    rules = (Rule("conv_in", 0, 0), Rule("mid.block_1*", 0, 0))
    result = run(with_stages(QUICK, rules=rules))
    assert [r.unit for r in result.reports] == [u for u in UNITS if u not in ("conv_in", "mid.block_1")]
    assert len(calls) == len(UNITS) - 2
    weights_only = replace(BASE, activations=None, stages=(WEIGHTS, replace(QUICK, learn={"scale": Learn(1e-3)})))
    assert run(weights_only).reports == []


def test_the_penalty_can_leave_out_the_second_half_of_split_weights(run, monkeypatch):
    calls = captured(monkeypatch)
    for compat in ((), ("skip_second_split",)):
        run(with_stages(replace(QUICK, iterations=1), compat=compat))
    fixed, faulty = calls[: len(UNITS)], calls[len(UNITS) :]
    for mine, theirs, name in zip(fixed, faulty, UNITS, strict=True):
        assert is_same(mine["penalized"], mine["groups"]["rounding"])
        split = name.startswith("up") and "block" in name  # the shortcut's second half is the unit's last variable
        assert is_same(theirs["penalized"], theirs["groups"]["rounding"][: -1 if split else None])


def is_same(tensors, others):
    return len(tensors) == len(others) and all(a is b for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize("compat", [(), ("train_mode",)], ids=["fixed", "train-mode"])
def test_dropout_is_active_only_where_the_fault_is_asked_for(run, make_network, monkeypatch, compat):
    seen = set()
    forward = nn.Dropout.forward
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: (seen.add(self.training), forward(self, x))[1])
    network = run(with_stages(replace(QUICK, iterations=1), compat=compat)).network
    assert seen == ({True, False} if compat else {False})
    assert not any(m.training for m in network.modules())


# Weights taken from another calibration


def test_given_weights_are_taken_over_and_stay(run, states):
    learned = replace(QUICK, learn={"rounding": Learn(0.3), "bias": Learn(0.1)})
    source = run(replace(BASE, activations=None, stages=(WEIGHTS, learned))).network
    network, theirs = run(replace(BASE, stages=(ACTS,)), weights_from=source).network, quant_layers(source)
    for name, layer in quant_layers(network).items():
        assert layer.frozen and torch.equal(layer.codes, theirs[name].codes), name
        assert torch.equal(layer.weight, theirs[name].weight), name
        assert layer.bias is None or torch.equal(layer.bias, theirs[name].bias), name
    expected = inputs_of(source, "mid.block_1.conv1", states.x, states.t)
    quantizer = network.mid.block_1.conv1.act_quantizer
    scale = grid(expected.min(), expected.max(), quantizer.spec).scale
    torch.testing.assert_close(quantizer.scale.data, scale, rtol=1e-5, atol=0)  # batches of another size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split_shortcuts": False}, "split at 64, expected .* split at None"),
        ({"weights": QuantSpec(5, axis="out_channel")}, "expected .* 5 bits"),
        ({"weights": QuantSpec(4, "signed", "out_channel")}, "expected .* signed"),
    ],
    ids=["split", "bits", "kind"],
)
def test_given_weights_of_another_structure_are_refused(run, change, message):
    source = run(replace(BASE, activations=None, stages=(WEIGHTS,))).network
    with pytest.raises(ValueError, match=message):
        run(replace(BASE, stages=(ACTS,), **change), weights_from=source)


class Counting(Progress):
    """Adds up what it is told."""

    def __init__(self):
        self.stages = []

    def start(self, title, total):
        self.stages.append([title, total, 0, False])

    def advance(self, amount=1, note=""):
        self.stages[-1][2] += amount

    def finish(self):
        self.stages[-1][3] = True


def test_progress_adds_up_to_what_each_stage_announced(run):
    """Skipped units included."""
    progress = Counting()
    stages = (GPTQ(rows=50), QUICK)
    run(with_stages(*stages, rules=(Rule("conv_in", 0, 0),)), progress=progress)
    assert len(progress.stages) == 4
    for title, total, done, finished in progress.stages:
        assert done == total > 0 and finished, title


def mean_errors(calibration, adapter, states):
    """Largest mean error of each unit's output over its channels, after the whole calibration."""
    plain, quantized = (Frontier(n, adapter, states) for n in (calibration.float_network, calibration.network))
    found = {}
    for name in calibration.units():
        error = quantized.outputs(name) - plain.outputs(name)
        channels = error if error.dim() == 2 else error.movedim(1, -1).flatten(0, -2)
        found[name] = float(channels.mean(0).abs().max())
    return found


def test_bias_correction_leaves_no_mean_error_in_any_unit(run, adapter, states, make_network):
    """Also where a unit has no bias to correct: that one keeps its error, the next ones lose theirs."""
    network = make_network(32)
    network.conv_in.bias = None
    before = mean_errors(run(with_stages(), network=copy.deepcopy(network)), adapter, states)
    after = mean_errors(run(with_stages(CorrectBias()), network=network), adapter, states)
    assert after["conv_in"] == before["conv_in"] > 1e-3
    others = [name for name in UNITS if name != "conv_in"]
    assert max(after[name] for name in others) < 1e-5
    assert min(before[name] for name in others) > 1e-4

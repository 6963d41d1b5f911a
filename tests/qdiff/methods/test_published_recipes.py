"""The published settings of methods.md, spelled out row by row; rules by name on toy networks; what options change."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qdiff.methods import METHODS, MethodOptions, for_given_weights, make_recipe, require_stages
from qdiff.methods import published_settings as tasks
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import Recipe, StepGroups
from qdiff.recipes.stages import GPTQ, ActivationRanges, Finetune, Reconstruct, Rollout, WeightRanges

FOLDER = Path(__file__).parents[3] / "configs" / "recipes"
PUBLISHED = tasks.published()
KEYS = [pytest.param(key, id=tasks.file_name(key).removesuffix(".yml")) for key in PUBLISHED]
FOUR = ("q-diffusion", "eda-dm", "quest", "accuquant")
SD = "stable-diffusion"


def of(method):
    return {key[1:]: recipe for key, recipe in PUBLISHED.items() if key[0] == method}


def the_one(recipe, kind):
    [stage] = [stage for stage in recipe.stages if isinstance(stage, kind)]
    return stage


# The files


def test_there_is_a_file_for_every_row_and_no_other():
    assert {path.name for path in FOLDER.iterdir()} == {tasks.file_name(key) for key in PUBLISHED}
    assert len(PUBLISHED) == 4 + 10 + 8 and "accuquant" not in {key[0] for key in PUBLISHED}


@pytest.mark.parametrize("key", KEYS)
def test_a_file_is_what_the_table_makes(key):
    path, recipe = FOLDER / tasks.file_name(key), PUBLISHED[key]
    assert path.read_text() == tasks.text(key, recipe)
    loaded = Recipe.load(path)
    assert loaded == recipe
    require_stages(loaded)
    assert loaded.name == key[0] and loaded.compat == ()
    assert (loaded.weights.bits, loaded.activations.bits) == key[2]
    assert loaded.weights.axis == "out_channel"


SAMPLERS = {
    "cifar10": "--timesteps 100 --skip_type quad",
    "bedroom": "-c 200 -e 1",
    "church": "-c 500 -e 0",
    "imagenet": "-c 20 -e 0 --scale 3",
    SD: "--plms --ddim_steps 50 --scale 7.5",
}


@pytest.mark.parametrize("key", KEYS)
def test_a_file_says_which_sampler_it_is_for(key):
    first = (FOLDER / tasks.file_name(key)).read_text().splitlines()[0]
    sampler = "-c 400 -e 0" if key[:2] == ("q-diffusion", "church") else SAMPLERS[key[1]]
    assert first.startswith("# ") and first.endswith(f".py {sampler}")


def test_the_module_writes_the_files_into_a_folder(tmp_path, capsys):
    tasks.main([str(tmp_path / "made" / "here")])
    made, kept = ({path.name: path.read_bytes() for path in f.iterdir()} for f in (tmp_path / "made" / "here", FOLDER))
    assert made == kept
    for arguments in ((), ("--help",), ("a", "b")):
        with pytest.raises(SystemExit, match="2"):
            tasks.main(arguments)
        assert capsys.readouterr() == ("", "usage: python -m qdiff.methods.published_settings FOLDER\n")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


# Q-Diffusion: methods §1.1, §1.2, §1.3, §1.5

# task -> grid of activations, softmax bits, split, finder of weights; of activations, aggregate, inputs, batch;
# steps, samples of each, batch of learning
Q_DIFFUSION = {
    "cifar10": ("signed", 8, True, "minmax", ("minmax", "first", "random", 64), (20, 256, 32)),
    "bedroom": ("signed", 8, False, "shrink", ("minmax", "ema", "all", 64), (20, 256, 32)),
    "church": ("affine", 8, False, "shrink", ("shrink", "first", "stratified", 64), (20, 256, 32)),
    SD: ("affine", 16, True, "shrink", ("shrink", "ema", "all", 16), (25, 128, 8)),
}


def test_q_diffusion_rows():
    assert list(of("q-diffusion")) == [(task, (4, 8)) for task in Q_DIFFUSION]


@pytest.mark.parametrize("task", Q_DIFFUSION)
def test_q_diffusion(task):
    recipe = PUBLISHED["q-diffusion", task, (4, 8)]
    kind, softmax, split, finder, acts, (steps, per_step, batch) = Q_DIFFUSION[task]
    assert (recipe.weights.kind, recipe.activations.kind, recipe.activations.axis) == ("affine", kind, "tensor")
    assert (recipe.softmax.bits, recipe.softmax.kind, recipe.split_shortcuts) == (softmax, "unsigned", split)
    assert recipe.rules == () and recipe.step_groups == StepGroups()
    selector = recipe.selector
    assert (selector.name, selector.steps, selector.per_step) == ("uniform", steps, per_step)
    weights, rounding, ranges, scales = recipe.stages
    assert weights.range.finder == finder
    assert (ranges.range.finder, ranges.range.aggregate, ranges.inputs, ranges.range.batch_size) == acts
    assert (ranges.range.prefix, ranges.range.momentum) == ("quantized", 0.95)
    assert list(rounding.learn) == ["rounding"] and list(scales.learn) == ["scale"]
    rates = [(learn.rate, learn.schedule) for stage in (rounding, scales) for learn in stage.learn.values()]
    assert rates == [(1e-3, "constant"), (4e-4, "cosine")]
    assert (rounding.iterations, rounding.batch_size, rounding.inputs, rounding.loss.p) == (
        20000,
        batch,
        "quantized",
        2,
    )
    assert (scales.iterations, scales.batch_size, scales.inputs, scales.loss.p) == (5000, batch, "float", 2.4)
    penalty = rounding.penalty
    assert (penalty.weight, penalty.warmup, penalty.beta_start, penalty.beta_end) == (0.01, 0.2, 20, 2)
    assert scales.penalty is None and rounding.drop == scales.drop == 0


# EDA-DM: methods §2.1 to §2.3, §2.5

# task, bits of weights -> states, samples with features, radius, lambda, mu, lr_w, lr_a, iterations, batch of learning,
# batch of ranges
EDA_DM = {
    ("cifar10", 4): (1024, 1024, 3.0, 1.2, 0.8, 5e-1, 5e-4, 5000, 32, 256),
    ("cifar10", 8): (1024, 1024, 3.0, 1.2, 0.8, 5e-2, 1e-3, 5000, 32, 256),
    ("bedroom", 4): (1024, 64, 0.3, 1.0, 1.0, 1e-2, 5e-3, 5000, 32, 32),
    ("bedroom", 8): (1024, 64, 0.3, 1.0, 1.0, 5e-4, 1e-4, 5000, 32, 32),
    ("church", 4): (1024, 64, 0.3, 1.0, 1.0, 5e-2, 1e-4, 5000, 32, 32),
    ("church", 8): (1024, 64, 0.3, 1.0, 1.0, 5e-2, 1e-4, 5000, 32, 32),
    ("imagenet", 4): (1024, 64, 3.0, 1.2, 0.8, 5e-1, 1e-4, 1000, 32, 32),
    ("imagenet", 8): (1024, 64, 3.0, 1.2, 0.8, 1e-4, 1e-3, 1000, 32, 32),
    (SD, 4): (256, 8, 0.3, 5.0, 0.8, 3e-2, 1e-4, 1000, 2, 2),
    (SD, 8): (256, 8, 0.3, 5.0, 0.8, 5e-4, 1e-4, 1000, 2, 2),
}


def test_eda_dm_rows():
    assert list(of("eda-dm")) == [(task, (bits, 8)) for task, bits in EDA_DM]


@pytest.mark.parametrize(("task", "bits"), EDA_DM)
def test_eda_dm(task, bits):
    recipe = PUBLISHED["eda-dm", task, (bits, 8)]
    states, features, radius, factor, taps, weight_rate, act_rate, iterations, batch, range_batch = EDA_DM[task, bits]
    assert recipe.weights.kind == recipe.activations.kind == "unsigned_mid" and recipe.activations.axis == "tensor"
    assert (recipe.softmax.bits, recipe.softmax.kind, recipe.split_shortcuts) == (8, "unsigned", True)
    assert recipe.step_groups == StepGroups()
    selector = recipe.selector
    assert (selector.name, selector.seeds, selector.features) == ("density_variety", states, features)
    assert (selector.radius, selector.variety) == (radius, factor)
    weights, ranges, learned = recipe.stages
    assert weights.range.finder == ranges.range.finder == "theta"
    assert (ranges.range.aggregate, ranges.range.momentum, ranges.range.prefix) == ("ema", 0.9, "quantized")
    assert (ranges.inputs, ranges.range.batch_size) == ("all", range_batch)
    rates = {name: (learn.rate, learn.schedule) for name, learn in learned.learn.items()}
    assert rates == {"rounding": (weight_rate, "cosine"), "scale": (act_rate, "cosine")}
    assert (learned.iterations, learned.batch_size, learned.loss.p, learned.loss.taps) == (iterations, batch, 2, taps)
    assert (learned.inputs, learned.mix, learned.drop, learned.penalty) == ("mixed", 0.5, 0.5, None)


# QuEST: methods §3.1 to §3.3, §3.5

# task, bits of activations -> their grid, softmax bits, split, finder and aggregate of ranges; steps, samples of each,
# batch of rounding; critical modules, iterations of the time layers and of those
QKV, FEED_FORWARD = "role:attention", "role:feed_forward"
TWENTY, TWENTY_FIVE = (20, 256, 16), (25, 128, 4)
QUEST = {
    ("bedroom", 8): ("signed", 8, False, ("minmax", "ema"), TWENTY, (QKV,), 16000, 6400),
    ("bedroom", 4): ("signed", 8, False, ("minmax", "all"), TWENTY, (QKV,), 16000, 6400),
    ("church", 8): ("affine", 8, False, ("percentile", "all"), TWENTY, (QKV,), 16000, 6400),
    ("church", 4): ("affine", 8, False, ("percentile", "all"), TWENTY, (QKV,), 16000, 6400),
    ("imagenet", 8): ("signed", 8, False, ("minmax", "ema"), TWENTY, (QKV, FEED_FORWARD), 24000, 6400),
    ("imagenet", 4): ("signed", 8, False, ("minmax", "all"), TWENTY, (QKV, FEED_FORWARD), 24000, 6400),
    (SD, 8): ("affine", 16, True, ("percentile", "ema"), TWENTY_FIVE, (FEED_FORWARD,), 3850, 8000),
    (SD, 4): ("affine", 16, True, ("percentile", "all"), TWENTY_FIVE, (FEED_FORWARD,), 3850, 8000),
}


def test_quest_rows():
    assert list(of("quest")) == [(task, (4, bits)) for task, bits in QUEST]


@pytest.mark.parametrize(("task", "bits"), QUEST)
def test_quest(task, bits):
    recipe = PUBLISHED["quest", task, (4, bits)]
    kind, softmax, split, found, (steps, per_step, batch), layers, time_iterations, iterations = QUEST[task, bits]
    axis = "in_channel" if bits == 4 else "tensor"
    assert (recipe.weights.kind, recipe.activations.kind, recipe.activations.axis) == ("affine", kind, axis)
    assert (recipe.softmax.bits, recipe.softmax.kind, recipe.split_shortcuts) == (softmax, "unsigned", split)
    selector = recipe.selector
    assert (selector.name, selector.steps, selector.per_step) == ("uniform", steps, per_step)
    assert recipe.step_groups == StepGroups(count=steps, lookup="hold")
    weights, rounding, ranges, time, critical = recipe.stages
    assert weights.range.finder == "shrink" and list(rounding.learn) == ["rounding"]
    assert (rounding.iterations, rounding.batch_size, rounding.inputs) == (20000, batch, "quantized")
    assert (rounding.penalty.weight, rounding.penalty.warmup) == (0.01, 0.2)
    assert (ranges.range.finder, ranges.range.aggregate, ranges.range.batch_size) == (*found, 64)
    assert (time.layers, time.scales, time.iterations, time.batch_size) == (
        ("role:time",),
        "layers",
        time_iterations,
        2,
    )
    assert (critical.layers, critical.scales) == (layers, "rest")
    assert (critical.iterations, critical.batch_size) == (iterations, 4)
    for stage, scale_rate in ((time, 1e-5), (critical, 1e-4)):
        rates = {name: (learn.rate, learn.schedule) for name, learn in stage.learn.items()}
        assert rates == {"weight": (1e-5, "constant"), "scale": (scale_rate, "constant")}
        # L_TLA + L_G, then L_CMA + L_G: together the paper's L_TLA + L_CMA + 2 L_G (Q7)
        assert (stage.local, stage.output, stage.order) == (1, 1, "interleaved")


def test_stable_diffusion_finetunes_its_time_layers_for_as_long_as_published():
    """200 epochs at the first of 25 steps, 50 at others with t > 300, 400 below, of one minibatch each."""
    t = range(981, 0, -40)
    assert len(t) == 25
    epochs = [200 if i == 0 else 50 if value > 300 else 400 for i, value in enumerate(t)]
    for bits in (8, 4):
        assert PUBLISHED["quest", SD, (4, bits)].stages[-2].iterations == sum(epochs)


# Rules by name, on toy networks


def defined(network):
    """Convolutions and linear layers in the order of definition."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    return [name for name, module in network.named_modules() if isinstance(module, kinds)]


@pytest.fixture
def toys(make_network, make_latent, adapter, latent_adapter):
    """name -> (network, adapter): families in which the last but one layer is another one each time."""
    everywhere = {"attention_resolutions": [1, 2]}
    return {
        "cifar10": (make_network(32), adapter),
        "ldm-4": (make_latent("plain"), latent_adapter),  # no attention where the up path ends
        "ldm-8": (make_latent("plain", **everywhere), latent_adapter),
        "sd": (make_latent("transformer", **everywhere), latent_adapter),
    }


# first and last layer; and what the released code takes for them (E1): 8-bit weights, and 8-bit activations
ENDS = {
    "cifar10": (("conv_in", "conv_out"), "temb.dense.0", "up.1.upsample.conv"),
    "ldm-4": (("input_blocks.0.0", "out.2"), "time_embed.0", "output_blocks.3.0.skip_connection"),
    "ldm-8": (("input_blocks.0.0", "out.2"), "time_embed.0", "output_blocks.3.1.proj_out"),
    "sd": (("input_blocks.0.0", "out.2"), "time_embed.0", "output_blocks.3.1.proj_out"),
}


def exceptions(recipe, network, adapter):
    """layer -> (bits of weights, of activations or 0), where they are not the recipe's."""
    roles, found = adapter.roles(network), {}
    usual = (recipe.weights.bits, recipe.activations.bits)
    for name in defined(network):
        bits = tuple(0 if spec is None else spec.bits for spec in recipe.layer_specs(name, roles))
        found |= {} if bits == usual else {name: bits}
    return found


@pytest.mark.parametrize("toy", ENDS)
def test_first_and_last_layers(toys, toy):
    (network, adapter), ((first, last), _, _) = toys[toy], ENDS[toy]
    options = MethodOptions(weight_bits=4, act_bits=4)
    assert exceptions(make_recipe("eda-dm", options), network, adapter) == {first: (8, 8), last: (8, 8)}
    assert exceptions(make_recipe("quest", options), network, adapter) == {first: (4, 8), last: (4, 8)}
    for method in set(METHODS) - {"eda-dm", "quest"}:
        assert exceptions(make_recipe(method, options), network, adapter) == {}, method


@pytest.mark.parametrize("toy", ENDS)
def test_first_and_last_layers_as_the_released_code_finds_them(toys, toy):
    (network, adapter), ((first, last), embedding, before_last) = toys[toy], ENDS[toy]
    options = MethodOptions(weight_bits=4, act_bits=4, compat=("positional_ends",))
    found = exceptions(make_recipe("eda-dm", options), network, adapter)
    assert found == {embedding: (8, 4), before_last: (4, 8), last: (8, 0)} and first not in found


# What options change


def test_grids_of_few_bits_have_a_scale_per_input_channel_in_quest_alone():
    for method in METHODS:
        for bits in (3, 4, 5, 8):
            axis = make_recipe(method, MethodOptions(act_bits=bits)).activations.axis
            assert axis == ("in_channel" if method == "quest" and bits <= 4 else "tensor"), (method, bits)


@pytest.mark.parametrize(("steps", "used"), [(20, 2), (200, 20)])
def test_sets_that_change_at_every_tenth_step(steps, used):
    """Q1: of 20 sets, a sampler of 20 steps then uses two; it is right for 200 steps alone."""
    timesteps = torch.arange(steps).flip(0) * (1000 // steps) + 1
    for compat, expected in (((), 20), (("hold_every_ten",), used)):
        groups = make_recipe("quest", MethodOptions(act_bits=8, compat=compat)).step_groups
        assert groups == StepGroups(20, "hold", hold_every=10 if compat else None)
        assert len(StepTable(1000, groups, timesteps).reachable()) == expected


def test_quest_has_a_set_for_each_calibration_step():
    for options in (MethodOptions(act_bits=8, selector_steps=7), MethodOptions(act_bits=8, family="text")):
        recipe = make_recipe("quest", options)
        assert recipe.step_groups.count == recipe.selector.steps == (25 if options.family == "text" else 7)


def test_sequential_steps():
    """Q8: eight states of each step, two at a time, one step after another; the second stage in 20 rounds."""
    options = MethodOptions(act_bits=8, compat=("sequential_steps",))
    time, critical = make_recipe("quest", options).stages[-2:]
    assert (time.order, time.rounds, time.per_step) == ("sequential", 1, 8)
    assert (critical.order, critical.rounds, critical.per_step) == ("sequential", 20, None)
    short = make_recipe("quest", replace(options, act_iterations=3)).stages[-1]
    assert (short.order, short.rounds, short.iterations) == ("sequential", 1, 3)


def test_accuquant_has_a_set_for_each_group_of_five_steps():
    recipe = make_recipe("accuquant", MethodOptions(act_bits=8))
    assert recipe.step_groups == StepGroups(size=5) and recipe.selector.name == "group_starts"
    for steps, expected in ((100, 20), (50, 10), (12, 3), (4, 1)):
        table = StepTable(1000, recipe.step_groups, torch.arange(steps) * (1000 // steps) + 1)
        assert (table.count, len(table.reachable())) == (expected, expected)
    stage = the_one(recipe, Rollout)
    assert (stage.gradient, stage.carry, stage.start, stage.order) == ("two_pass", True, "float", "interleaved")
    assert set(stage.learn) == {"scale", "bias"} and stage.learn["scale"].relative
    given = the_one(make_recipe("accuquant", MethodOptions(act_bits=8, act_rate=1e-4)), Rollout).learn["scale"]
    assert (given.rate, given.relative) == (1e-4, False)  # --cali_lr is in units of the scale, whatever the method


@pytest.mark.parametrize("method", FOUR)
def test_compensated_rounding_comes_before_anything_learns(method):
    options = MethodOptions(weight_bits=4, act_bits=8)
    plain, started = (make_recipe(method, replace(options, rounding_start=s)) for s in ("nearest", "gptq"))
    assert [type(stage) for stage in started.stages[:2]] == [WeightRanges, GPTQ]
    assert any(isinstance(stage, Reconstruct) for stage in started.stages[2:])
    assert replace(started, stages=(started.stages[0], *started.stages[2:])) == plain
    require_stages(started)


# Stages that for_given_weights leaves: activation ranges, and learning of scales
LEFT = {
    "q-diffusion": [ActivationRanges, Reconstruct],
    "eda-dm": [ActivationRanges, Reconstruct],
    "quest": [ActivationRanges, Finetune, Finetune],
    "accuquant": [ActivationRanges, Rollout],
}


@pytest.mark.parametrize("method", FOUR)
@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_given_weights_leave_the_learning_of_activations(method, start):
    whole = make_recipe(method, MethodOptions(weight_bits=4, act_bits=8, rounding_start=start))
    recipe = for_given_weights(whole)
    assert [type(stage) for stage in recipe.stages] == LEFT[method]
    assert all(list(stage.learn) == ["scale"] for stage in recipe.stages[1:])
    assert all(getattr(stage, "penalty", None) is None for stage in recipe.stages)
    assert replace(recipe, stages=whole.stages) == whole  # grids, rules, states and step groups stay
    # Without a stage that finds weights it is no recipe to start from; with one it is.
    require_stages(replace(recipe, stages=(WeightRanges(), *recipe.stages)))
    with pytest.raises(ValueError, match="expected weight_ranges"):
        require_stages(recipe)


@pytest.mark.parametrize("method", FOUR)
@pytest.mark.parametrize("family", ["pixel", "latent", "text"])
def test_float_activations_leave_the_stages_of_weights(method, family):
    recipe = make_recipe(method, MethodOptions(weight_bits=4, act_bits=None, family=family))
    require_stages(recipe)
    assert [type(stage) for stage in recipe.stages] == [WeightRanges, Reconstruct]
    assert list(recipe.stages[1].learn) == ["rounding"]
    assert recipe.activations is None and recipe.softmax is None

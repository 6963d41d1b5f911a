"""Finetuning of weights on frozen grids: what learns, what stays, from what, and that a killed run goes on."""

import copy
from dataclasses import replace

import pytest
import torch

from qdiff.calibration.calibrate import Progress, RunOptions, calibrate
from qdiff.calibration.finetune import _fewer, _Finetuning
from qdiff.calibration.store import MemoryLimits
from qdiff.nn.layers import act_quantizers, quant_layers
from qdiff.recipes.recipe import QuantSpec, Recipe, Rule, StepGroups
from qdiff.recipes.stages import GPTQ, ActivationRanges, Finetune, Learn, RangeSpec, WeightRanges

ONE_LEVEL = {"ch_mult": [1], "attn_resolutions": [8]}
GRID, ACTS = QuantSpec(4, "affine", "out_channel"), QuantSpec(4)
RANGES = (WeightRanges(RangeSpec("minmax")), ActivationRanges(RangeSpec("minmax")))
FAST = {"weight": Learn(3e-3), "scale": Learn(3e-3)}


def recipe(*stages, **fields):
    return Recipe("toy", GRID, ACTS, QuantSpec(8, "unsigned"), stages=(*RANGES, *stages), **fields)


@pytest.fixture(scope="module")
def untuned(make_network, adapter, states, timesteps):
    """(fields of the recipe) -> the calibration without a stage of finetuning; each is made once, none may change."""
    made = {}

    def make(**fields):
        described = recipe(**fields)
        if described not in made:
            made[described] = calibrate(make_network(64, **ONE_LEVEL), adapter, described, states, 0, timesteps)
        return made[described]

    return make


@pytest.fixture(scope="module")
def tuned(make_network, adapter, states, timesteps):
    """(stages, fields of the recipe) -> the calibration with them, of a new network."""

    def make(*stages, ch=64, options=None, progress=None, **fields):
        described = recipe(*stages, **fields)
        arguments = (make_network(ch, **ONE_LEVEL), adapter, described, states, 0, timesteps)
        return calibrate(*arguments, progress=progress, options=options)

    return make


def time_layers(run):
    return set(run.adapter.roles(run.network)["time"])


def changed_layers(before, after):
    """Names of layers whose codes or biases differ."""
    theirs = quant_layers(before.network)
    return {
        name
        for name, layer in quant_layers(after.network).items()
        if not (torch.equal(layer.codes, theirs[name].codes) and torch.equal(layer.bias, theirs[name].bias))
    }


def changed_scales(before, after):
    theirs = act_quantizers(before.network)
    return {n for n, q in act_quantizers(after.network).items() if not torch.equal(q.scale, theirs[n].scale)}


def test_only_the_named_layers_and_their_scales_move(untuned, tuned):
    before, after = untuned(), tuned(Finetune(("role:time",), FAST, iterations=10))
    layers = time_layers(after)
    assert changed_layers(before, after) == layers
    assert changed_scales(before, after) == {f"{name}.act_quantizer" for name in layers}
    for name, layer in quant_layers(after.network).items():
        for mine, theirs in zip(
            layer.weight_quantizers, quant_layers(before.network)[name].weight_quantizers, strict=True
        ):
            assert torch.equal(mine.scale, theirs.scale) and torch.equal(mine.zero_point, theirs.zero_point)
        assert layer.frozen and layer.rounding is None


def test_the_error_falls(tuned):
    learn = {"weight": Learn(1e-3), "scale": Learn(1e-3)}
    after = tuned(Finetune(("mid.*", "up.*"), learn, scales="all", iterations=20), ch=32)
    (report,) = after.reports
    assert report.after < 0.8 * report.before
    assert report.losses[-1][0] == 19 and report.kept


@pytest.mark.parametrize("scales", ["layers", "rest", "all"])
@pytest.mark.cases("rest", "all")
def test_which_scales_move(untuned, tuned, scales):
    before, after = untuned(), tuned(Finetune(("mid.attn_1.q",), {"scale": Learn(1e-3)}, scales=scales, iterations=3))
    every = set(act_quantizers(after.network))
    of_time = {f"{name}.act_quantizer" for name in time_layers(after)}
    expected = {"layers": {"mid.attn_1.q.act_quantizer"}, "rest": every - of_time, "all": every}[scales]
    assert changed_scales(before, after) == expected and not changed_layers(before, after)


def test_of_several_sets_those_of_the_batch_move_alone(untuned, tuned):
    """One state of the first step and one of the last: no momentum reaches the sets between."""
    stage = Finetune(("role:time",), {"scale": Learn(1e-3)}, "all", iterations=20, order="sequential", per_step=1)
    fields = {"step_groups": StepGroups(10)}
    before, after = untuned(**fields), tuned(replace(stage, iterations=2, rounds=1), **fields)
    moved = {}
    for name, quantizer in act_quantizers(after.network).items():
        difference = quantizer.scale != before.network.get_submodule(name).scale
        moved[name] = difference.nonzero().flatten().tolist()
    assert all(set(groups) <= {4, 9} for groups in moved.values()), moved  # 2 iterations for 10 turns: the 5th and 10th
    assert any(groups == [4, 9] for groups in moved.values())


def test_a_layer_with_one_set_for_all_steps(tuned):
    fields = {"step_groups": StepGroups(5), "rules": (Rule("role:time", one_set=True),)}
    after = tuned(Finetune(("role:time",), FAST, iterations=3), **fields)
    layers = time_layers(after)
    for name, quantizer in act_quantizers(after.network).items():
        assert len(quantizer.scale) == (1 if name.rsplit(".", 1)[0] in layers else 5)


def test_sequential_order_gives_each_step_its_share(untuned):
    run = untuned()
    stage = Finetune(("role:time",), iterations=40, batch_size=2, order="sequential", rounds=2)
    work = _Finetuning(run, stage, 2)
    steps = [set(work.data.step[index].tolist()) for index in work._indices()]
    assert steps == [{step} for _ in range(2) for step in range(10) for _ in range(2)]


def test_interleaved_batches_mix_steps(untuned):
    run = untuned()
    work = _Finetuning(run, Finetune(("role:time",), iterations=40, batch_size=8), 2)
    found = [work.data.step[index] for index in work._indices()]
    assert len(found) == 40 and all(len(set(steps.tolist())) > 1 for steps in found)


def test_fewer_states_of_each_step(states):
    kept = _fewer(states, 1)
    assert kept.step.tolist() == list(range(10)) and torch.equal(kept.x, states.x[::2])
    assert _fewer(states, None) is states


@pytest.mark.long
def test_it_starts_from_the_codes_there_are_after_compensation(network, adapter, states, timesteps):
    """Codes may be several steps from the float weight; a rate of 0 changes none."""
    still = Finetune(("*",), {"weight": Learn(0.0)}, iterations=2)
    with_compensation = replace(recipe(), stages=(RANGES[0], GPTQ(rows=50), RANGES[1]))
    before = calibrate(network, adapter, with_compensation, states, 0, timesteps)
    finetuned = replace(with_compensation, stages=(*with_compensation.stages, still))
    after = calibrate(network, adapter, finetuned, states, 0, timesteps)
    assert not changed_layers(before, after)


def test_the_base_of_later_stages_is_the_tuned_weight(tuned):
    run = tuned(Finetune(("role:time",), FAST, iterations=10))
    for name in time_layers(run):
        layer = run.network.get_submodule(name)
        assert not torch.equal(run.unrounded_weights[name], run.float_network.get_submodule(name).weight)
        assert (layer.nearest_codes(run.unrounded_weights[name]) - layer.codes).abs().max() <= 1


def test_losses_are_local_and_global(untuned, states):
    """The loss of one batch, computed with hooks of our own."""
    run = untuned()
    stage = Finetune(("role:time",), local=3.0, output=0.5, iterations=1)
    work, index = _Finetuning(run, stage, 2), torch.tensor([3, 7, 12])
    total, seen = 0.0, {}
    for network, key in ((run.float_network, "aim"), (run.network, "found")):
        handles = [
            network.get_submodule(name).register_forward_hook(
                lambda m, a, out, name=name, key=key: seen.setdefault((name, key), out)
            )
            for name in time_layers(run)
        ]
        seen["output", key] = network(states.x[index], states.t[index])
        for handle in handles:
            handle.remove()
    for name in (*time_layers(run), "output"):
        weight = 0.5 if name == "output" else 3.0
        total = total + weight * (seen[name, "found"] - seen[name, "aim"]).square().mean()
    torch.testing.assert_close(work._loss(index), total, rtol=1e-5, atol=0)


class Killed(BaseException):
    """Stands for the end of the process."""


class Dying(Progress):
    """Ends everything after some iterations."""

    def __init__(self, iterations):
        self.left = iterations

    def advance(self, amount=1, note=""):
        self.left -= note.startswith("loss")
        if self.left == 0:
            raise Killed


@pytest.fixture(scope="module")
def interruptible(tuned):
    """(options) -> the calibration that is killed below; without, the one that is not."""
    stage = Finetune(("role:time", "mid.*"), FAST, "all", iterations=22, batch_size=4)

    def make(**options):
        return tuned(stage, ch=32, step_groups=StepGroups(2), **options)

    return make


@pytest.fixture(scope="module")
def whole(interruptible):
    return interruptible()


@pytest.mark.parametrize("killed_after", [1, 9])  # snapshots come after every other iteration
@pytest.mark.cases("9")
def test_a_killed_run_goes_on_to_the_same_result(interruptible, whole, tmp_path, assert_same_numbers, killed_after):
    options = RunOptions(record=tmp_path / "record", memory=MemoryLimits(host=10**5), scratch=tmp_path)
    with pytest.raises(Killed):
        interruptible(options=options, progress=Dying(killed_after))
    again = interruptible(options=options)
    assert_same_numbers(again.network, whole.network)
    assert [r.losses for r in again.reports] == [r.losses for r in whole.reports]
    assert len(list((tmp_path / "record").glob("*.safetensors"))) == 4  # three stages, the snapshot once


def test_conditional_networks(make_latent, latent_adapter, latent_states, timesteps):
    network, data = make_latent("transformer", model_channels=32), latent_states("transformer")
    stage = Finetune(("role:attention", "role:feed_forward"), FAST, "rest", iterations=15)
    run = calibrate(network, latent_adapter, recipe(stage), data, 0, timesteps)
    assert run.reports[0].after < run.reports[0].before


def test_no_layer_of_that_name(network, adapter, states, timesteps):
    with pytest.raises(ValueError, match="finetune layers: down.9.*, role:feed_forward match no layer"):
        wrong = Finetune(("down.9.*", "role:feed_forward"), iterations=1)
        calibrate(network, adapter, recipe(wrong), states, 0, timesteps)


def test_the_float_network_stays_as_it_is(network, adapter, states, timesteps):
    before = copy.deepcopy(network.state_dict())
    calibrate(network, adapter, recipe(Finetune(("*",), FAST, "all", iterations=3)), states, 0, timesteps)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())

"""The stage over groups of steps: what learns in which order, what is kept, memory, and that a killed run goes on."""

import functools
from dataclasses import replace

import pytest
import torch

from ddim.pipeline import Pipeline
from ddim.schedules import beta_schedule
from qdiff.calibration.calibrate import Progress, RunOptions, calibrate
from qdiff.calibration.rollout import GroupRollout, Rollouts
from qdiff.calibration.rollout_stage import _Rolling
from qdiff.calibration.selectors import select
from qdiff.calibration.store import MemoryLimits
from qdiff.calibration.trajectories import Recorder
from qdiff.evaluation.memory import LiveBytes
from qdiff.nn.layers import act_quantizers, learnable_scales, quant_layers
from qdiff.recipes.recipe import QuantSpec, Recipe, Selector, StepGroups
from qdiff.recipes.stages import ActivationRanges, Learn, RangeSpec, Rollout, RoundingPenalty, WeightRanges

BETAS = beta_schedule("linear", 0.0001, 0.004, 1000)  # mild: a random network is no denoiser
SAMPLES, STEPS = 4, 6
SCALE = {"scale": Learn(0.02, "cosine", relative=True)}
QUICK = Rollout(SCALE, iterations=6, batch_size=2)


def recipe(*stages, size=4, **fields):
    ranges = (WeightRanges(RangeSpec("minmax")), ActivationRanges(RangeSpec("minmax")))
    grids = (QuantSpec(4, "affine", "out_channel"), QuantSpec(4), QuantSpec(8, "unsigned"))
    selector = Selector("group_starts", steps=STEPS, per_step=SAMPLES)
    groups = {"step_groups": StepGroups(size=size)} | fields
    return Recipe("toy", *grids, selector=selector, stages=(*ranges, *stages), **groups)


@pytest.fixture(scope="module")
def float_network(make_network):
    return make_network(32, ch_mult=[2])  # norms of two channels: timesteps show


@pytest.fixture(scope="module")
def rollouts(float_network):
    pipeline, recorder = Pipeline((3, 8, 8), BETAS, steps=STEPS, seed=3), Recorder()
    pipeline.sample(float_network, range(SAMPLES), recorder.add)
    return Rollouts(recorder.trajectories(), pipeline.path())


@pytest.fixture(scope="module")
def rolled(float_network, adapter, rollouts):
    """(stages) -> the calibration."""

    def make(*stages, progress=None, options=None, **fields):
        described = recipe(*stages, **fields)
        data, timesteps = select(rollouts.trajectories, described), rollouts.trajectories.timesteps
        arguments = (float_network, adapter, described, data, 0, timesteps, progress)
        return calibrate(*arguments, options=options, rollouts=rollouts)

    return make


@pytest.fixture(scope="module")
def untouched(rolled):
    """The calibration before any group learns; nobody changes it."""
    return rolled()


def test_each_group_learns_its_own_sets(untouched, whole):
    """Groups of 4 steps do not divide 6: the last has two."""
    before, after = untouched, whole("sequential")
    assert [report.unit for report in after.reports] == ["group 0", "group 1"]
    assert all(report.after < report.before for report in after.reports if report.kept)
    assert sum(report.kept for report in after.reports) >= 1
    for name, layer in quant_layers(after.network).items():
        assert torch.equal(layer.codes, quant_layers(before.network)[name].codes)
    kept = [number for number, report in enumerate(after.reports) if report.kept]
    for name, quantizer in act_quantizers(after.network).items():
        moved = (quantizer.scale != act_quantizers(before.network)[name].scale).nonzero().flatten().tolist()
        assert moved == kept


def test_what_does_not_help_is_put_back(rolled, untouched, assert_same_numbers):
    """Steps so wide that they can only harm."""
    wild = replace(QUICK, learn={"scale": Learn(50.0)}, iterations=2)
    after = rolled(wild)
    assert not any(report.kept for report in after.reports)
    assert_same_numbers(after.network, untouched.network)
    harmed = rolled(replace(wild, keep="always"))
    assert all(report.kept and report.after > report.before for report in harmed.reports)


def test_what_all_groups_share_learns_from_all(rolled):
    learn = {"bias": Learn(1e-3, "cosine"), **SCALE}
    after = rolled(Rollout(learn, iterations=15, batch_size=4, order="interleaved"))
    (report,) = after.reports
    assert report.unit == "all groups" and report.iterations == 30 and report.after < 0.9 * report.before


def test_rounding_learns_too(rolled, untouched):
    learn = {"rounding": Learn(0.1, "cosine")}
    penalty = RoundingPenalty(weight=1e-6, beta_start=10.0)
    stage = Rollout(learn, iterations=5, batch_size=4, order="interleaved", keep="always", penalty=penalty, sharpen=4.0)
    after = rolled(stage)
    changed = [
        (layer.codes.int() - untouched.network.get_submodule(name).codes.int()).abs().max().item()
        for name, layer in quant_layers(after.network).items()
    ]
    assert max(changed) == 1 and all(layer.frozen for layer in quant_layers(after.network).values())


@pytest.mark.long
def test_quantized_starts_see_the_groups_before(rolled, whole):
    """The last group's error is the whole run's: smaller after learning from such starts than before."""
    before = rolled(replace(QUICK, start="quantized", learn={"scale": Learn(0.0)}, keep="always", iterations=1))
    after = whole("quantized")
    assert before.reports[-1].after == pytest.approx(before.reports[-1].before)
    assert before.reports[-1].before > before.reports[0].before  # errors add up
    assert after.reports[-1].after < before.reports[-1].after


def test_a_recipe_without_step_groups_is_one_group(rolled):
    run = rolled(QUICK, step_groups=StepGroups())
    assert [report.unit for report in run.reports] == ["group 0"] and run.reports[0].after < run.reports[0].before


class Killed(BaseException):
    """Stands for the end of the process."""


class Dying(Progress):
    """Ends everything after some iterations."""

    def __init__(self, iterations):
        self.left = iterations

    def advance(self, amount=1, note=""):
        self.left -= "loss" in note
        if self.left == 0:
            raise Killed


STAGES = {
    "sequential": QUICK,
    "quantized": replace(QUICK, start="quantized"),
    "interleaved": Rollout({"bias": Learn(1e-3), **SCALE}, iterations=6, batch_size=2, order="interleaved"),
}


@pytest.fixture(scope="module")
def whole(rolled):
    """(name of a stage) -> the calibration with it; each is made once."""
    return functools.cache(lambda name: rolled(STAGES[name]))


@pytest.mark.parametrize(("stage", "killed_after"), [("sequential", 9), ("quantized", 8), ("interleaved", 3)])
@pytest.mark.cases("quantized-8")
def test_a_killed_run_goes_on_to_the_same_result(rolled, whole, tmp_path, assert_same_numbers, stage, killed_after):
    options = RunOptions(record=tmp_path / "record", memory=MemoryLimits(host=10**5), scratch=tmp_path)
    with pytest.raises(Killed):
        rolled(STAGES[stage], options=options, progress=Dying(killed_after))
    again = rolled(STAGES[stage], options=options)
    assert_same_numbers(again.network, whole(stage).network)
    assert [r.losses for r in again.reports] == [r.losses for r in whole(stage).reports]


@pytest.fixture(scope="module")
def peak(rolled):
    """(steps in a group, way to its gradient) -> bytes alive at most while it is found."""

    @functools.cache
    def begun(size):
        run = rolled(size=size)
        rollout = _Rolling(run, QUICK, 2).rollout(_Rolling(run, QUICK, 2).groups[0])
        assert isinstance(rollout, GroupRollout) and len(rollout.group.calls) == size
        for scale in learnable_scales(list(act_quantizers(run.network).values())):
            scale.requires_grad_(True)
        return rollout

    @functools.cache
    def measure(size, gradient):
        rollout = begun(size)
        rollout.backward(torch.arange(2), gradient)
        with LiveBytes() as meter:
            rollout.backward(torch.arange(2), gradient)
        return meter.peak

    return measure


@pytest.mark.parametrize("gradient", ["two_pass", "exact"])
@pytest.mark.cases("two_pass")
def test_activation_memory_does_not_grow_with_the_group(peak, gradient):
    """Against full unrolling, which holds every step's activations."""
    assert peak(STEPS, gradient) < 1.1 * peak(1, gradient)
    assert peak(STEPS, "unrolled") > 3 * peak(1, "unrolled")


def test_without_trajectories(float_network, adapter, rollouts):
    described = recipe(QUICK)
    data, timesteps = select(rollouts.trajectories, described), rollouts.trajectories.timesteps
    with pytest.raises(ValueError, match="rollout: needs float trajectories and the sampler that made them"):
        calibrate(float_network, adapter, described, data, 0, timesteps)


def test_more_samples_than_recorded(rolled):
    with pytest.raises(ValueError, match="rollout samples 9: the calibration data have only 4 samples"):
        rolled(replace(QUICK, samples=9))

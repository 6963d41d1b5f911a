"""Rollouts over groups of steps: errors and gradients against autograd through the samplers themselves, in float64."""

import copy

import pytest
import torch

from ddim.noise import ImageNoise
from ddim.samplers import ddim_step, run, walk
from ddim.schedules import cumulative_alphas
from ldm.pipeline import Conditioning, Pipeline
from ldm.samplers import guided
from ldm.schedules import beta_schedule
from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.rollout import Carrier, FloatRuns, GroupRollout, Predictor, Rollouts, groups_of
from qdiff.calibration.selectors import CalibrationSet
from qdiff.calibration.store import MemoryLimits, Store
from qdiff.calibration.trajectories import Recorder
from qdiff.nn.layers import act_quantizers, to_double
from qdiff.recipes.layer_names import matches
from qdiff.recipes.recipe import QuantSpec, Recipe, StepGroups
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

BETAS = beta_schedule("linear", 1000, linear_start=0.0015, linear_end=0.0195)
STEPS, SAMPLES, SHAPE = 6, 3, (3, 4, 4)
SAMPLERS = {"ddim": ("ddim", 0.0), "ddim-eta-1": ("ddim", 1.0), "plms": ("plms", 0.0), "dpm": ("dpm_solver", 0.0)}
PRECISION = 1e-10


class Scene:
    """A float network, its quantized copy, and recorded float trajectories of one sampler with guidance."""

    def __init__(self, network, adapter, sampler, groups):
        name, eta = SAMPLERS[sampler]
        self.adapter = adapter
        self.pipeline = Pipeline(SHAPE, BETAS, sampler=name, steps=STEPS, eta=eta, scale=3.0, seed=5)
        self.network = copy.deepcopy(network).double()
        generator = torch.Generator().manual_seed(2)
        contexts = torch.randn(2, SAMPLES, 5, 24, generator=generator, dtype=torch.float64)
        self.conditioning = Conditioning(*contexts)
        recorder, self.calls = Recorder(), []

        def observe(call):
            recorder.add(call)
            self.calls.append(call.x)

        self.end = self.pipeline.sample(self.network, range(SAMPLES), self.conditioning, observe)
        trajectories = recorder.trajectories(cs=contexts[0], ucs=contexts[1])
        self.rollouts = Rollouts(trajectories, self.pipeline.path())
        self.quantized = to_double(self.calibrated(trajectories, groups))
        self.parameters = [q.scale for q in act_quantizers(self.quantized).values()]
        self.references = {}

    def calibrated(self, trajectories, groups):
        stages = (WeightRanges(), ActivationRanges(RangeSpec("minmax")))
        grid = QuantSpec(4, "affine", "out_channel")
        recipe = Recipe("toy", grid, QuantSpec(6), QuantSpec(8, "unsigned"), step_groups=groups, stages=stages)
        count = trajectories.steps
        step = torch.arange(count).repeat_interleave(SAMPLES)
        x, t, cs = torch.cat(trajectories.xs), torch.cat(trajectories.ts), torch.cat(trajectories.extra["cs"])
        data = CalibrationSet(x.float(), t, step, cs.float())
        network = copy.deepcopy(self.network).float()
        return calibrate(network, self.adapter, recipe, data, 0, trajectories.timesteps).network

    def group_rollouts(self, store=None, carried=False):
        store = store or Store(torch.device("cpu"))
        teacher, predict = (Predictor(n, self.adapter, self.rollouts) for n in (self.network, self.quantized))
        runs = FloatRuns(teacher, self.rollouts, SAMPLES, store, 2)
        found, carrier = [], Carrier(runs, store, 2)
        for group in groups_of(self.rollouts.path, self.quantized.step_table):
            found.append(GroupRollout(predict, runs, group, carrier.into(group) if carried else None))
            if carried:
                carrier.add(found[-1])
        return found

    def reference(self, key, compute):
        """The same of what several ways are compared with; it is found once."""
        if key not in self.references:
            self.references[key] = self.gradients(compute)
        return self.references[key]

    def predict(self, detach):
        """The guided quantized network, by other code than the rollouts'."""
        network = guided(self.quantized, self.conditioning.context, self.conditioning.unconditional, 3.0)
        return lambda x, t: network(x.detach() if detach else x, t)

    def sampled(self, detach):
        """The quantized network's result through the sampler itself, under autograd."""
        noise = ImageNoise(5, range(SAMPLES), SHAPE, "cpu", torch.float64)
        return run(self.pipeline._sampler(noise(), noise), self.predict(detach))

    def gradients(self, compute):
        """[K] all scales' gradients of what `compute` does, and what it returns."""
        for parameter in self.parameters:
            parameter.requires_grad_(True).grad = None
        value = compute()
        found = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.parameters]
        )
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        return found, value.detach()


@pytest.fixture(scope="module")
def scene(make_latent, latent_adapter):
    """(sampler, groups) -> a Scene; each is made once."""
    sizes = {"model_channels": 32, "channel_mult": [1], "attention_resolutions": [1]}
    network, made = make_latent("transformer", **sizes), {}

    def make(sampler, groups=None):
        key = (sampler, groups)
        if key not in made:
            made[key] = Scene(network, latent_adapter, sampler, groups or StepGroups())
        return made[key]

    return make


EVERY = torch.arange(SAMPLES)


def close(found, expected):
    assert found.norm() > 0
    assert (found - expected).norm() <= PRECISION * expected.norm()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_float_runs_are_the_samplers_own(scene, sampler):
    """Inputs of calls inside a step, which are not recorded, among them."""
    scene = scene(sampler)
    (rollout,) = scene.group_rollouts()
    assert len(rollout.runs.x) == len(scene.calls) == scene.rollouts.path.calls
    for column, x in zip(rollout.runs.x, scene.calls, strict=True):
        close(column[slice(None)], x)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.cases("ddim-eta-1", "plms")
def test_the_error_at_the_end_is_the_samplers_own(scene, sampler):
    scene = scene(sampler)
    (rollout,) = scene.group_rollouts()
    with torch.no_grad():
        expected = scene.sampled(detach=False) - scene.end
    close(rollout.error(rollout.group.end, rollout.run(EVERY), EVERY), expected)
    torch.testing.assert_close(rollout.loss(EVERY), expected.square().mean(), rtol=PRECISION, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("gradient", "detach"), [("two_pass", True), ("exact", False), ("unrolled", False)])
@pytest.mark.cases("two_pass-*-plms", "two_pass-*-ddim-eta-1", "exact-*-plms", "unrolled-*-ddim")
def test_gradients_are_autograds(scene, sampler, gradient, detach):
    """Two passes: autograd where every call's input is detached. The reverse sweep and unrolling: all of it."""
    scene = scene(sampler)
    (rollout,) = scene.group_rollouts()
    found, loss = scene.gradients(lambda: rollout.backward(EVERY, gradient))

    def reference():
        loss = (scene.sampled(detach) - scene.end).square().mean()
        loss.backward()
        return loss

    expected, wanted = scene.reference(detach, reference)
    close(found, expected)
    torch.testing.assert_close(loss, wanted, rtol=PRECISION, atol=0)


def test_the_approximation_is_one(scene):
    """Else the test above could not tell the two apart."""
    scene = scene("ddim")
    (rollout,) = scene.group_rollouts()
    approximate, _ = scene.gradients(lambda: rollout.backward(EVERY, "two_pass"))
    exact, _ = scene.gradients(lambda: rollout.backward(EVERY, "exact"))
    assert (approximate - exact).norm() > 1e-4 * exact.norm()


def ddim_group(scene, group, detach, start=None):
    """The quantized network's state at a group's end, by DDIM steps from the recorded state (or from `start`)."""
    x = scene.calls[group.calls[0]] if start is None else start
    steps = list(walk(scene.pipeline.timesteps(), cumulative_alphas(BETAS), cumulative_alphas(BETAS)[0].item()))
    for t, alpha, alpha_next in steps[group.calls.start : group.calls.stop]:
        x = ddim_step(x, scene.predict(detach)(x, t.expand(SAMPLES)), alpha, alpha_next)
    return x


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("gradient", "detach"), [("two_pass", True), ("exact", False), ("unrolled", False)])
@pytest.mark.cases("two_pass-True-4", "exact-False-2", "unrolled-False-1")
def test_every_group_starts_from_the_float_state(scene, size, gradient, detach):
    """Groups of 4 do not divide the sampler's steps: the last is shorter. A group's loss reaches its own set alone."""
    scene = scene("ddim", StepGroups(size=size))
    states = [*scene.calls, scene.end]
    rollouts = scene.group_rollouts()
    last = len(scene.rollouts.path.step)
    assert [list(r.group.calls) for r in rollouts] == [
        list(range(k, min(k + size, last))) for k in range(0, last, size)
    ]
    for rollout in rollouts:
        found, _ = scene.gradients(lambda r=rollout: r.backward(EVERY, gradient))
        for parameter in scene.parameters:
            others = [k for k in range(len(rollouts)) if k != rollout.group.number]
            assert parameter.grad is None or not parameter.grad[others].any()

        def reference(group=rollout.group):
            loss = (ddim_group(scene, group, detach) - states[group.end]).square().mean()
            loss.backward()
            return loss

        expected, _ = scene.reference((rollout.group.number, detach), reference)
        close(found, expected)


def test_groups_of_one_step_are_output_reconstruction(scene):
    """M = 1: the error of one prediction, times the squared coefficient of that step."""
    scene = scene("ddim", StepGroups(size=1))
    for rollout in scene.group_rollouts():
        (call,) = rollout.group.calls
        weight = scene.rollouts.path.coefficients[call + 1, call]

        def reference(call=call, weight=weight):
            t = scene.rollouts.path.t[call].expand(SAMPLES)
            x = scene.calls[call]
            aim = guided(scene.network, scene.conditioning.context, scene.conditioning.unconditional, 3.0)(x, t)
            loss = weight**2 * (scene.predict(False)(x, t) - aim).square().mean()
            loss.backward()
            return loss

        expected, wanted = scene.gradients(reference)
        for gradient in ("two_pass", "exact", "unrolled"):
            found, loss = scene.gradients(lambda r=rollout, g=gradient: r.backward(EVERY, g))
            close(found, expected)
            torch.testing.assert_close(loss, wanted, rtol=PRECISION, atol=0)


@pytest.mark.long
def test_without_the_factor_each_steps_own_coefficient_is_left(scene):
    """carry=False: the final gradient goes to every step as it is (the scalar set to 1)."""
    scene = scene("ddim", StepGroups(size=3))
    path = scene.rollouts.path
    for rollout in scene.group_rollouts():
        calls, end = rollout.group.calls, rollout.group.end
        by_end = 2 * rollout.error(end, rollout.run(EVERY), EVERY) / scene.end.numel()

        def reference(rollout=rollout, calls=calls, by_end=by_end):
            differences = rollout.run(EVERY)
            for call in calls:
                error = rollout.error(call, {c: d for c, d in differences.items() if c < call}, EVERY)
                prediction, _ = rollout.difference(call, error, EVERY)
                prediction.backward(path.coefficients[call + 1, call] * by_end)
            return by_end.sum()

        expected, _ = scene.gradients(reference)
        close(scene.gradients(lambda r=rollout: r.backward(EVERY, "two_pass", carry=False))[0], expected)


@pytest.mark.parametrize("sampler", ["ddim-eta-1", "plms"])
@pytest.mark.cases("plms")
def test_quantized_starts_add_up_to_the_whole_run(scene, sampler):
    """Each group goes on from what those before have made: the last one's end is the sampler's."""
    scene = scene(sampler, StepGroups(size=2))
    with torch.no_grad():
        expected = scene.sampled(detach=False) - scene.end
    last = scene.group_rollouts(carried=True)[-1]
    close(last.error(last.group.end, last.run(EVERY), EVERY), expected)


def test_a_look_ahead_takes_the_set_of_its_own_timestep(scene):
    """PLMS' second call of the first step has the next step's timestep, whose set is another group's."""
    scene = scene("plms", StepGroups(size=1))
    first = scene.group_rollouts()[0]
    assert list(first.group.calls) == [0, 1] and first.group.end == 2
    scene.gradients(lambda: first.backward(EVERY, "two_pass"))
    moved = sum(p.grad.abs() for p in scene.parameters if p.grad is not None and p.dim() == 1)
    assert moved[0] > 0 and moved[1] > 0 and not moved[2:].any()


def test_samples_and_shares_of_a_batch_add_up(scene):
    scene = scene("ddim", StepGroups(size=2))
    rollout = scene.group_rollouts()[1]
    whole, loss = scene.gradients(lambda: rollout.backward(EVERY, "two_pass"))

    def parts():
        return sum(
            rollout.backward(EVERY[rows], "two_pass", share=share)
            for rows, share in ((slice(0, 2), 2 / 3), (slice(2, 3), 1 / 3))
        )

    found, total = scene.gradients(parts)
    close(found, whole)
    torch.testing.assert_close(total, loss, rtol=PRECISION, atol=0)


def test_memory_limits_change_no_numbers(scene, tmp_path):
    scene = scene("plms", StepGroups(size=2))
    spilled = Store(torch.device("cpu"), MemoryLimits(host=5_000), tmp_path)
    for free, tight in zip(scene.group_rollouts(), scene.group_rollouts(spilled), strict=True):
        assert torch.equal(free.loss(EVERY), tight.loss(EVERY))
    assert spilled.peak["disk"] > 0


def test_states_of_another_sampler_are_refused(scene):
    recorded = scene("ddim").rollouts.trajectories
    path = Pipeline(SHAPE, BETAS, sampler="ddim", steps=5).path()
    with pytest.raises(ValueError, match=r"states of the same sampler, expected 5 steps \(801, .*, found 7 steps"):
        Rollouts(recorded, path)


def test_the_names_of_time_layers_cover_what_the_step_sets_are_about(scene):
    """The scene's groups do differ: the time layers' inputs depend on the timestep alone."""
    scene = scene("ddim", StepGroups(size=1))
    roles = scene.adapter.roles(scene.quantized)
    names = [n for n in act_quantizers(scene.quantized) if matches("role:time", n.rsplit(".", 1)[0], roles)]
    assert names and all(len(scene.quantized.get_submodule(n).scale.unique()) > 1 for n in names)

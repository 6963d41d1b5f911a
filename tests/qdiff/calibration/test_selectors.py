"""Which float states calibrate."""

from dataclasses import replace

import pytest
import torch

from qdiff.calibration import density
from qdiff.calibration.selectors import (
    CalibrationSet,
    check_selection,
    evenly_spaced,
    group_starts,
    middle_maps,
    select,
    uniform,
)
from qdiff.calibration.trajectories import Trajectories
from qdiff.recipes.recipe import Recipe, Selector, StepGroups


def trajectories(steps, samples):
    """States whose one value is 100 * step + sample."""
    xs = [torch.arange(samples, dtype=torch.float32).view(-1, 1, 1, 1) + 100 * step for step in range(steps)]
    return Trajectories(tuple(xs), tuple(torch.full((samples,), 900 - step) for step in range(steps)), {})


def conditioned(steps, samples, *keys):
    """The same with conditioning: one embedding [2, 3] per sample and key, 100 * key's place + sample + step / 1000."""

    def column(number):
        sample = torch.arange(samples).view(-1, 1, 1)
        return tuple((100.0 * number + sample + step / 1000).expand(samples, 2, 3) for step in range(steps))

    plain = trajectories(steps, samples)
    return Trajectories(plain.xs, plain.ts, {key: column(number) for number, key in enumerate(keys)})


def recipe(name, steps, per_step, groups=None, compat=(), **selector):
    found = Selector(name, steps, per_step, **selector)
    return Recipe("selects", selector=found, step_groups=groups or StepGroups(), compat=compat)


def values(data):
    return data.x.flatten().int().tolist()


def test_uniform_takes_the_first_samples_of_evenly_spaced_steps_in_order():
    data = uniform(trajectories(12, 5), 4, 2)
    assert values(data) == [0, 1, 300, 301, 600, 601, 900, 901]
    assert data.t.tolist() == [900, 900, 897, 897, 894, 894, 891, 891]
    assert data.step.tolist() == [0, 0, 3, 3, 6, 6, 9, 9]
    assert len(data) == 8


def test_uniform_takes_more_steps_where_they_do_not_divide():
    """As the published code: every S // st-th (methods §1.2)."""
    assert uniform(trajectories(11, 3), 4, 1).step.tolist() == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("name", ["uniform", "group_starts"])
@pytest.mark.parametrize(
    ("steps", "per_step", "message"),
    [
        (13, 1, "selector.steps 13: the calibration data have only 12 steps"),
        (4, 6, "selector.per_step 6: .* only 5 samples a step"),
    ],
)
def test_too_few_states_are_an_error_that_names_the_flag(name, steps, per_step, message):
    for check in (select, check_selection):
        with pytest.raises(ValueError, match=message):
            check(trajectories(12, 5), recipe(name, steps, per_step))


def test_a_recipe_selects():
    data = trajectories(12, 5)
    assert values(select(data, recipe("uniform", 2, 1))) == [0, 600]
    assert values(select(data, recipe("group_starts", 3, 1, StepGroups(3)))) == [0, 400, 800]
    for name in ("uniform", "group_starts"):
        check_selection(data, recipe(name, 12, 5, StepGroups(12)))  # all there is


def test_a_subset_keeps_states_timesteps_and_steps_together():
    data = CalibrationSet(torch.arange(4.0).view(4, 1, 1, 1), torch.tensor([9, 8, 7, 6]), torch.arange(4))
    part = data.subset(torch.tensor([3, 1]))
    assert values(part) == [3, 1] and part.t.tolist() == [6, 8] and part.step.tolist() == [3, 1]


def test_states_come_with_their_conditioning():
    data = uniform(conditioned(12, 5, "cs"), 4, 2)
    assert values(data) == values(uniform(trajectories(12, 5), 4, 2))
    expected = torch.tensor([0, 1, 0.003, 1.003, 0.006, 1.006, 0.009, 1.009])
    torch.testing.assert_close(data.context, expected.view(8, 1, 1).expand(8, 2, 3))
    assert uniform(trajectories(12, 5), 4, 2).context is None


@pytest.mark.parametrize("keys", [("cs", "ucs"), ("ucs", "cs")], ids=["cs-first", "ucs-first"])
def test_with_guidance_the_whole_set_comes_twice_first_conditional(keys):
    """formats §3, methods §1.2: whatever the order in the file, cs is first."""
    plain, data = uniform(trajectories(11, 5), 4, 2), uniform(conditioned(11, 5, *keys), 4, 2)
    assert len(data) == 2 * len(plain) == 24
    for mine, theirs in ((data.x, plain.x), (data.t, plain.t), (data.step, plain.step)):
        assert torch.equal(mine, torch.cat([theirs, theirs]))
    samples = torch.tensor([0, 1] * 6) + torch.arange(0, 12, 2).repeat_interleave(2) / 1000
    first, second = (100 * keys.index(key) + samples for key in ("cs", "ucs"))
    torch.testing.assert_close(data.context[:, 0, 0], torch.cat([first, second]))
    assert (data.context == data.context[:, :1, :1]).all()


def test_labels_are_conditioning_too():
    labels = (torch.tensor([4, 5, 6]),) * 3
    data = uniform(replace(trajectories(3, 3), extra={"cs": labels}), 3, 2)
    assert data.context.tolist() == [4, 5, 4, 5, 4, 5] and not data.context.is_floating_point()


def test_subsets_and_batches_keep_the_conditioning_of_each_state():
    data = uniform(conditioned(4, 3, "cs", "ucs"), 4, 3)
    index = torch.tensor([17, 0, 12])
    assert torch.equal(data.subset(index).context, data.context[index])
    batches = list(data.batches(5))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 4]
    for name in ("x", "t", "step", "context"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), getattr(data, name))


@pytest.mark.parametrize(
    ("recorded", "steps", "groups", "expected"),
    [
        (12, 1, StepGroups(4), [0, 3, 6, 9]),  # never fewer than one step a group
        (12, 4, StepGroups(4), [0, 3, 6, 9]),
        (12, 8, StepGroups(4), [0, 1, 3, 4, 6, 7, 9, 10]),  # two of three: places 0 and 3 // 2
        (12, 5, StepGroups(4), [0, 1, 3, 4, 6, 7, 9, 10]),  # about 5: two a group
        (12, 4, StepGroups(1), [0, 3, 6, 9]),
        (11, 3, StepGroups(size=4), [0, 4, 8]),  # groups of 4, 4 and 3 steps
        (11, 11, StepGroups(size=4), list(range(11))),  # 4 a group, of which the last has 3
        (9, 6, StepGroups(size=4), [0, 2, 4, 6, 8]),  # 2 a group, of which the last has 1
        (10, 3, StepGroups(3), [0, 4, 7]),  # step i in group 3 i // 10
        (12, 12, StepGroups(12), list(range(12))),
        (8, 4, StepGroups(4, "hold"), [0, 2, 4, 6]),
        (20, 20, StepGroups(20, hold_every=10), list(range(20))),  # two of the 20 sets are ever used: 10 steps each
        (20, 2, StepGroups(20, hold_every=10), [0, 10]),
    ],
)
def test_group_starts_takes_the_first_step_of_every_group_and_more_where_asked(recorded, steps, groups, expected):
    data = group_starts(trajectories(recorded, 3), steps, 2, groups)
    assert data.step.tolist() == [step for step in expected for _ in range(2)]
    assert values(data) == [100 * step + sample for step in expected for sample in range(2)]
    assert data.t.tolist() == [900 - step for step in expected for _ in range(2)]


def test_steps_of_one_timestep_are_in_one_group():
    """Quadratic schedules ask for some timesteps twice, here across the first boundary: 70 50 50 | 30 | 0 0."""
    times = [70, 50, 50, 30, 0, 0]
    data = replace(trajectories(6, 2), ts=tuple(torch.full((2,), t) for t in times))
    assert group_starts(data, 3, 1, StepGroups(3)).t.tolist() == [70, 30, 0]
    assert group_starts(data, 6, 1, StepGroups(3)).step.tolist() == [0, 1, 3, 4, 5]  # 2 a group, if it has them
    # Of six groups those of the second visits have no step.
    assert group_starts(data, 4, 1, StepGroups(6)).step.tolist() == [0, 1, 3, 4]
    with pytest.raises(ValueError, match="7 groups need at least as many sampler timesteps, found 6"):
        check_selection(data, recipe("group_starts", 3, 1, StepGroups(7)))


def test_groups_go_by_timestep_and_states_by_recorded_step():
    data = replace(trajectories(4, 1), ts=tuple(torch.tensor([t]) for t in (0, 30, 60, 90)))
    assert group_starts(data, 2, 1, StepGroups(2)).step.tolist() == [0, 2]
    assert group_starts(data, 2, 1, StepGroups(2, "hold")).t.tolist() == [0, 60]


def test_group_starts_repeat_with_guidance():
    plain = group_starts(trajectories(12, 5), 4, 2, StepGroups(4))
    data = group_starts(conditioned(12, 5, "ucs", "cs"), 4, 2, StepGroups(4))
    assert torch.equal(data.x, plain.x.repeat(2, 1, 1, 1)) and torch.equal(data.step, plain.step.repeat(2))
    assert (data.context[:8, 0, 0] >= 100).all() and (data.context[8:, 0, 0] < 100).all()  # first cs


@pytest.mark.parametrize("length", [1, 5, 8])
def test_evenly_spaced_values_begin_with_the_first_and_do_not_repeat(length):
    for count in range(1, 10):
        found = evenly_spaced(torch.arange(length) + 3, count)
        assert found[0] == 3 and len(found) == min(count, length)
        steps = found.diff().tolist()
        assert not steps or (min(steps) > 0 and max(steps) - min(steps) <= 1)


# EDA-DM's selector, on real networks: states whose size changes with the step, so that their features differ.


def recorded(steps=6, samples=24, **extra):
    """Noise that shrinks from step to step."""
    noise = torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    sizes = torch.linspace(1, 0.2, steps) ** 2
    times = tuple(torch.full((samples,), 950.0 - 150 * step) for step in range(steps))
    return Trajectories(tuple(noise * size for size in sizes), times, {key: (c,) * steps for key, c in extra.items()})


def embeddings(samples=24):
    generator = torch.Generator().manual_seed(6)
    cs = torch.randn(samples, 5, 24, generator=generator)
    return {"ucs": torch.randn(1, 5, 24, generator=generator).expand(samples, -1, -1).contiguous(), "cs": cs}


def chosen(recorded_states, adapter, network, seed=0, steps=4, per_step=5, compat=(), **selector):
    described = recipe("density_variety", steps, per_step, compat=compat, **{"features": 4, **selector})
    return select(recorded_states, described, network, adapter, seed)


def test_state_k_is_that_of_sample_k_at_its_step(network, adapter):
    states = recorded()
    data = chosen(states, adapter, network)
    assert len(data) == 20 and data.context is None
    for k, step in enumerate(data.step.tolist()):
        assert torch.equal(data.x[k], states.xs[step][k]) and data.t[k] == states.ts[step][k]
    assert not torch.equal(data.step, data.step.sort().values)


@pytest.mark.parametrize("variety", [0.0, 1.2])
def test_steps_are_chosen_as_their_features_count(network, adapter, variety):
    """Features of the first 4 samples, compared directly."""
    states = recorded()
    calls = []
    network.mid.attn_1.register_forward_pre_hook(lambda _, args: calls.append(args[0].double()))
    with torch.no_grad():
        for x, t in zip(states.xs, states.ts, strict=True):
            network(x[:4], t[:4])
    features = torch.stack(calls)  # [S, 4, C, H, W]
    distances = (features[:, None] - features[None]).square().mean((2, 3, 4, 5))
    cosine = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=3)
    radius = (
        distances.flatten().sort().values[6 + 2 * 7].item() * 1.01
    )  # behind six zeros every pair comes twice: 8 are within
    weights = density.step_weights(distances, (1 - cosine).sum((2, 3, 4)), radius, variety)
    expected = density.counts(weights, 20)
    data = chosen(states, adapter, network, radius=radius, variety=variety)
    assert data.step.bincount(minlength=6).tolist() == expected.tolist()
    assert expected.unique().numel() > 1


def test_guided_features_are_those_of_both_and_states_come_twice(make_latent, latent_adapter):
    network, states = make_latent("transformer"), recorded(**embeddings())
    maps = list(middle_maps(states, network, latent_adapter, 3))
    assert len(maps) == 6
    for key, found in (("cs", maps[:3]), ("ucs", maps[3:])):
        contexts = states.extra[key][0]
        for step in range(6):
            given = (states.xs[step][:3], states.ts[step][:3], contexts[:3])
            expected = density.middle_map(network, latent_adapter, *given)
            torch.testing.assert_close(torch.stack([sample[step] for sample in found]), expected, rtol=1e-4, atol=1e-5)
    data = chosen(states, latent_adapter, network)
    assert len(data) == 40
    for column in (data.x, data.t, data.step):
        assert torch.equal(column[:20], column[20:])
    assert torch.equal(data.context, torch.cat([states.extra["cs"][0][:20], states.extra["ucs"][0][:20]]))


def test_batches_of_features_change_nothing(network, adapter):
    states = recorded()
    whole = density.dissimilarities(middle_maps(states, network, adapter, 7))
    for size in (1, 3):
        for mine, theirs in zip(
            density.dissimilarities(middle_maps(states, network, adapter, 7, size)), whole, strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("features", "expected"), [(5, 5), (20, 20), (1000, 24)])
def test_features_are_of_the_first_samples_at_every_step(network, adapter, features, expected):
    states, seen = recorded(), []
    network.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    chosen(states, adapter, network, features=features)
    assert torch.equal(
        torch.cat(seen).flatten(1).sort(0).values,
        torch.cat([x[:expected] for x in states.xs]).flatten(1).sort(0).values,
    )


def test_the_seed_decides_who_gets_which_step_not_how_many(network, adapter):
    states = recorded()
    first, again, other = (chosen(states, adapter, network, seed) for seed in (0, 0, 1))
    assert first.digest() == again.digest() and first.digest() != other.digest()
    assert torch.equal(first.step.bincount(), other.step.bincount())


def test_released_counts_are_an_option(network, adapter, monkeypatch):
    """Shares 2.6, 1.6, 0.8 are rounded 3, 2, 1: one too many, which the released code takes from the last step."""
    weights = torch.tensor([26, 16, 8, 0, 0, 0], dtype=torch.float64)
    monkeypatch.setattr(density, "step_weights", lambda *_: weights)
    for compat, expected in (((), [3, 1, 1]), (("backward_counts",), [3, 2, 0])):
        data = chosen(recorded(), adapter, network, steps=5, per_step=1, compat=compat)
        assert data.step.bincount(minlength=3).tolist() == expected


def test_steps_of_equal_worth_share_the_samples(network, adapter):
    """All steps within each other's reach, and no variety."""
    data = chosen(recorded(), adapter, network, radius=1e9, variety=0.0)
    assert data.step.bincount(minlength=6).tolist() == [4, 4, 3, 3, 3, 3]


def test_density_variety_needs_a_sample_for_each_state(network, adapter):
    described = recipe("density_variety", 5, 5)
    message = "selector.steps 5 selector.per_step 5: density_variety takes 25 states, .*; .* only 24 samples"
    with pytest.raises(ValueError, match=message):
        check_selection(recorded(), described)
    with pytest.raises(ValueError, match=message):
        select(recorded(), described, network, adapter)
    check_selection(recorded(samples=25), described)
    check_selection(recorded(steps=2, samples=24), recipe("density_variety", 24, 1))  # its steps are not recorded ones


def test_density_variety_needs_a_network():
    with pytest.raises(ValueError, match="density_variety: expected the float network and its adapter"):
        select(recorded(), recipe("density_variety", 2, 2))

"""From timesteps to parameter sets, up to whole networks run on batches of mixed timesteps."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from qdiff.nn.grid import Grid
from qdiff.nn.layers import act_quantizers, to_double
from qdiff.nn.quantizers import ActQuantizer
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import QuantSpec, Recipe, StepGroups
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

GROUPED = Recipe(
    "three groups",
    QuantSpec(4, "affine", "out_channel"),
    QuantSpec(8),
    split_shortcuts=True,
    step_groups=StepGroups(3),
    stages=(WeightRanges(RangeSpec()), ActivationRanges()),
)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def plain_group(t, timesteps, count, lookup):
    """The group of one t: steps walked one by one, as a sampler goes down from T."""
    walked = sorted(set(timesteps), reverse=True)
    group = {step: i * count // len(walked) for i, step in enumerate(walked)}
    if lookup == "nearest":
        return {group[step] for step in walked if abs(step - t) == min(abs(s - t) for s in walked)}
    passed = [step for step in walked if step >= t]
    return {group[passed[-1] if passed else walked[0]]}


@given(
    st.lists(st.integers(0, 199), min_size=1, max_size=30, unique=True),
    st.integers(1, 30),
    st.sampled_from(["nearest", "hold"]),
)
def test_every_timestep_has_the_set_that_walking_down_the_sampler_gives(timesteps, count, lookup):
    count = min(count, len(timesteps))
    table = StepTable(200, StepGroups(count, lookup), torch.tensor(timesteps))
    every = torch.arange(200)
    found = table.groups_of(every)
    assert set(found.tolist()) == set(range(count))  # no set is out of reach
    for t in every.tolist():
        assert found[t].item() in plain_group(t, timesteps, count, lookup), t


def test_twenty_steps_and_twenty_sets_use_all_twenty():
    """The released QuEST code reaches 2 of them, silently (methods, Q1)."""
    timesteps = torch.arange(0, 1000, 50)
    table = StepTable(1000, StepGroups(20, "hold"), timesteps)
    assert table.groups_of(timesteps.flip(0)).tolist() == list(range(20))


def test_held_for_ten_steps_only_two_of_twenty_sets_are_ever_used():
    timesteps = torch.arange(950, -1, -50)
    for lookup in ("nearest", "hold"):
        held = StepTable(1000, StepGroups(20, lookup, hold_every=10), timesteps)
        assert held.count == 20 and held.groups_of(torch.arange(1000)).unique().tolist() == [0, 10]
        assert held.groups_of(timesteps).tolist() == [0] * 10 + [10] * 10
        assert len(StepTable(1000, StepGroups(20, lookup), timesteps).groups_of(timesteps).unique()) == 20
    by_size = StepTable(1000, StepGroups(size=1, hold_every=10), timesteps)
    assert by_size.groups_of(timesteps).tolist() == [0] * 10 + [10] * 10


@given(st.integers(1, 40), st.integers(1, 50), st.sampled_from(["nearest", "hold"]))
def test_groups_of_a_size_are_full_but_for_the_last_one(steps, size, lookup):
    timesteps = torch.arange(steps).flip(0) * 7 + 3
    groups = StepGroups(size=size, lookup=lookup)
    table = StepTable(300, groups, timesteps)
    found = table.groups_of(timesteps)
    assert table.count == groups.sets(steps) == found.max() + 1
    assert found.tolist() == sorted(found.tolist())  # the noisiest steps come first
    *full, last = found.bincount().tolist()
    assert set(full) <= {size} and last == steps - size * len(full) <= size


def test_between_the_steps_of_a_group_nearest_and_hold_look_up_as_between_groups_of_a_count():
    timesteps, between = torch.tensor([900, 700, 500, 300, 100]), torch.tensor([999, 700, 650, 550, 500, 250, 150, 0])
    nearest = StepTable(1000, StepGroups(size=2), timesteps)
    assert nearest.groups_of(between).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    hold = StepTable(1000, StepGroups(size=2, lookup="hold"), timesteps)
    assert hold.groups_of(between).tolist() == [0, 0, 0, 0, 1, 1, 1, 2]


def test_groups_of_a_size_need_a_sampler_and_leave_one_set_where_they_are_longer_than_it():
    with pytest.raises(ValueError, match="step_groups: groups of 5 steps need a sampler's timesteps, found none"):
        StepTable(1000, StepGroups(size=5))
    table = StepTable(1000, StepGroups(size=5), torch.tensor([900, 500, 100]))
    table.select(torch.tensor([900, 100]))
    assert table.count == 1 and table.index is None


def test_a_table_knows_the_timesteps_that_it_was_made_for():
    table = StepTable(1000, StepGroups(2), torch.tensor([900, 500, 100]))
    assert table.known.tolist() == [900, 500, 100]
    assert table.made_for(torch.tensor([100, 900, 500, 900])) and table.made_for(torch.tensor([900.0, 500.0, 100.0]))
    for other in ([900, 500], [900, 500, 101], [900, 700, 500, 100], [900.0, 500.5, 100.0]):
        assert not table.made_for(torch.tensor(other))


def test_one_set_is_made_for_every_sampler():
    timesteps = torch.tensor([900, 500, 100])
    for table in (StepTable(1000, StepGroups()), StepTable(1000, StepGroups(size=3), timesteps)):
        assert table.known is None and table.made_for(torch.tensor([5, 3]))


def test_the_noisiest_steps_are_in_set_0_whatever_the_order_they_are_given_in():
    shuffled = torch.tensor([300, 900, 0, 600])
    assert StepTable(1000, StepGroups(2), shuffled).groups_of(shuffled).tolist() == [1, 0, 1, 0]


def test_nearest_and_hold_differ_between_two_steps():
    timesteps = torch.tensor([800, 600])
    between = torch.tensor([999, 800, 750, 650, 600, 0])
    assert StepTable(1000, StepGroups(2, "nearest"), timesteps).groups_of(between).tolist() == [0, 0, 0, 1, 1, 1]
    assert StepTable(1000, StepGroups(2, "hold"), timesteps).groups_of(between).tolist() == [0, 0, 0, 0, 1, 1]


def test_fractional_and_outlying_timesteps_take_the_nearest_whole_one():
    """DPM-Solver's timesteps are fractions, and may round to T."""
    table = StepTable(1000, StepGroups(2), torch.tensor([999, 1]))
    assert table.groups_of(torch.tensor([1000.4, 499.6, 499.4, -0.3])).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("timesteps", "found"),
    [(None, "no sampler"), (torch.tensor([5, 3]), "2 timesteps"), (torch.tensor([5, 5]), "2 timesteps")],
    ids=["unknown", "too-few", "repeated"],
)
def test_more_sets_than_timesteps_are_refused(timesteps, found):
    with pytest.raises(ValueError, match=f"step_groups: 3 groups need .*found {found}"):
        StepTable(1000, StepGroups(3), timesteps)


@pytest.mark.parametrize("lookup", ["nearest", "hold"])
def test_a_timestep_that_a_sampler_visits_twice_is_in_the_group_of_its_first_visit(lookup):
    """PLMS and quadratic spacing repeat timesteps; groups are of visits."""
    visited = torch.tensor([900, 600, 600, 300, 0, 0])
    for groups in (StepGroups(3, lookup), StepGroups(size=2, lookup=lookup)):
        table = StepTable(1000, groups, visited)
        assert table.groups_of(visited).tolist() == [0, 0, 0, 1, 2, 2] and table.reachable() == [0, 1, 2]
    table = StepTable(1000, StepGroups(6, lookup), visited)
    assert table.groups_of(visited).tolist() == [0, 1, 1, 3, 4, 4] and table.reachable() == [0, 1, 3, 4]


def test_sets_that_are_never_used_are_not_reachable():
    timesteps = torch.arange(950, -1, -50)
    assert StepTable(1000, StepGroups(20, hold_every=10), timesteps).reachable() == [0, 10]
    assert StepTable(1000, StepGroups(20), timesteps).reachable() == list(range(20))
    assert StepTable(1000, StepGroups()).reachable() == [0]


def test_one_set_looks_nothing_up():
    table = StepTable(1000, StepGroups())
    table.select(torch.tensor([3, 900]))
    assert table.index is None


def test_a_batch_of_one_set_has_a_single_index_and_the_numbers_of_one_per_sample():
    table = StepTable(1000, StepGroups(2), torch.tensor([900, 100]))
    table.select(torch.tensor([100, 49, 300, 0]))
    assert table.index.tolist() == [1]
    quantizer, x = ActQuantizer(QuantSpec(4), table), torch.linspace(-1, 1, 24).view(4, 2, 3)
    for group, scale in enumerate((0.1, 0.3)):
        quantizer.set_grid(Grid(torch.tensor(scale), torch.tensor(7.0), quantizer.spec), group)
    single = quantizer(x)
    table.index = torch.tensor([1, 1, 1, 1])
    assert torch.equal(single, quantizer(x)) and single.unique().numel() > 3
    table.select(torch.tensor([100, 900]))
    assert table.index.tolist() == [1, 0]


def test_a_choice_of_timesteps_ends_with_its_block_also_on_error():
    table = StepTable(1000, StepGroups(2), torch.tensor([900, 100]))
    table.select(torch.tensor([900]))
    with pytest.raises(KeyError), table.at(torch.tensor([100, 900])):
        assert table.index.tolist() == [1, 0]
        raise KeyError
    assert table.index.tolist() == [0]


# Quantizers with several sets


@pytest.fixture
def table():
    return StepTable(1000, StepGroups(3), torch.tensor([900, 500, 100]))


def two_decimals(table, axis="tensor", channels=None, channel_axis=1):
    """Three sets, of scales 1, 0.1 and 0.01 (times 1, 2, ... per channel)."""
    quantizer = ActQuantizer(QuantSpec(8, "signed", axis), table, channels, channel_axis)
    for group in range(3):
        scale = 0.1**group * (torch.ones(()) if channels is None else torch.arange(1, channels + 1))
        quantizer.set_grid(Grid(scale, torch.zeros_like(scale), quantizer.spec), group)
    return quantizer


def test_each_sample_takes_the_set_of_its_timestep(table):
    x = torch.full((3, 2, 4, 4), 0.537)
    with table.at(torch.tensor([100, 900, 500])):
        snapped = two_decimals(table)(x)
    assert snapped[:, 0, 0, 0].tolist() == pytest.approx([0.54, 1.0, 0.5], abs=1e-6)


def test_heads_folded_into_the_batch_axis_take_their_samples_set(table):
    """[N * heads, tokens, channels], heads within a sample next to one another."""
    x = torch.full((4, 5, 6), 0.537)
    with table.at(torch.tensor([100, 500])):
        snapped = two_decimals(table)(x)
    assert snapped[:, 0, 0].tolist() == pytest.approx([0.54, 0.54, 0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((3, 2), -1), ((3, 7, 2), -1), ((3, 2, 7), 1), ((3, 2, 4, 4), 1)],
    ids=["features", "tokens", "sequences", "images"],
)
def test_sets_with_a_scale_per_channel(table, shape, axis):
    x = torch.full(shape, 4.44)
    with table.at(torch.tensor([900, 500, 100])):
        snapped = two_decimals(table, "in_channel", 2, axis)(x)
    by_channel = snapped.movedim(axis, 1).unsqueeze(-1).flatten(2)[..., 0]
    assert by_channel[:2].tolist() == [pytest.approx([4, 4], abs=1e-5), pytest.approx([4.4, 4.4], abs=1e-5)]
    assert by_channel[2].tolist() == pytest.approx([1.27, 2.54], abs=1e-5)  # clipped at 127 steps


def test_gradients_reach_only_the_sets_of_the_batch(table):
    quantizer = two_decimals(table)
    quantizer.scale.requires_grad_()
    with table.at(torch.tensor([500, 500])):
        quantizer(torch.tensor([[0.537], [0.263]])).sum().backward()
    expected = torch.tensor([0, (5 - 5.37) + (3 - 2.63), 0])
    torch.testing.assert_close(quantizer.scale.grad, expected, rtol=0, atol=1e-4)


def test_a_batch_without_timesteps_is_an_error(table):
    with pytest.raises(RuntimeError, match="timesteps were not given"):
        two_decimals(table)(torch.ones(2, 3))


# A whole network


@pytest.fixture
def grouped(quantized):
    return to_double(quantized(GROUPED, ch=64))


def test_a_batch_of_mixed_timesteps_gives_what_each_sample_alone_gives(grouped, generator):
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=generator)
    t = torch.tensor([930, 20, 480, 800, 333, 610])
    assert grouped.step_table.groups_of(t).unique().tolist() == [0, 1, 2]
    with torch.no_grad():
        together = grouped(x, t)
        alone = torch.cat([grouped(x[i : i + 1], t[i : i + 1]) for i in range(len(t))])
    assert relative(together, alone) < 1e-10


def test_sets_of_a_calibrated_network_differ_and_matter(grouped, generator):
    scales = torch.stack([q.scale for q in act_quantizers(grouped).values()])
    assert (scales[:, 0] != scales[:, 1]).float().mean() > 0.9
    x, t = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=generator), torch.tensor([930])
    with torch.no_grad():
        right = grouped(x, t)
        grouped.step_table.lookup.fill_(2)
        assert relative(grouped(x, t), right) > 1e-4


def test_the_network_tells_its_timesteps_by_position_and_by_name(grouped, generator):
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator), torch.tensor([900, 100])
    with torch.no_grad():
        assert torch.equal(grouped(x, t), grouped(x, t=t))
        assert torch.equal(grouped(x, t), grouped(x=x, t=t))

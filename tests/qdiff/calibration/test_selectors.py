"""Which float states calibrate."""

from dataclasses import replace

import pytest
import torch

from qdiff.calibration.selectors import SELECTORS, CalibrationSet, select, uniform
from qdiff.calibration.trajectories import Trajectories
from qdiff.spec import Selector


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


@pytest.mark.parametrize(
    ("steps", "per_step", "message"),
    [(13, 1, "--cali_st 13: the calibration data have only 12 steps"), (4, 6, "--cali_n 6: .* only 5 samples a step")],
)
def test_too_few_states_are_an_error_that_names_the_flag(steps, per_step, message):
    with pytest.raises(ValueError, match=message):
        uniform(trajectories(12, 5), steps, per_step)


def test_a_description_selects():
    assert set(SELECTORS) == {"uniform"}
    assert values(select(trajectories(12, 5), Selector("uniform", 2, 1))) == [0, 600]


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

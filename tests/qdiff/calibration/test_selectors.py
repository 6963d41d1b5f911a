"""Which float states calibrate."""

import pytest
import torch

from qdiff.calibration.selectors import SELECTORS, CalibrationSet, select, uniform
from qdiff.calibration.trajectories import Trajectories
from qdiff.spec import Selector


def trajectories(steps, samples):
    """States whose one value is 100 * step + sample."""
    xs = [torch.arange(samples, dtype=torch.float32).view(-1, 1, 1, 1) + 100 * step for step in range(steps)]
    return Trajectories(tuple(xs), tuple(torch.full((samples,), 900 - step) for step in range(steps)), {})


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

import pytest
import torch

from ddim.schedules import BETA_SCHEDULES, beta_schedule, cumulative_alphas, select_timesteps


@pytest.mark.parametrize(
    "name, first, middle, last",  # middle: entry 2 of 5
    [
        ("linear", 0.01, 0.25, 0.49),
        ("quad", 0.01, 0.16, 0.49),  # ((0.1 + 0.7) / 2)²
        ("const", 0.49, 0.49, 0.49),
        ("jsd", 1 / 5, 1 / 3, 1.0),
        ("sigmoid", 0.01 + 0.48 / (1 + 403.4287934927351), 0.25, 0.49 - 0.48 / (1 + 403.4287934927351)),
    ],
)
def test_beta_schedules(name, first, middle, last):
    betas = beta_schedule(name, 0.01, 0.49, 5)
    assert betas.dtype == torch.float64 and betas.shape == (5,)
    assert betas[[0, 2, 4]].tolist() == pytest.approx([first, middle, last], rel=1e-12)


def test_every_schedule_is_named_in_the_error():
    with pytest.raises(ValueError, match=f"'cosine'.*{', '.join(BETA_SCHEDULES)}"):
        beta_schedule("cosine", 1e-4, 0.02, 10)


def test_impossible_betas_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\], found 0.1 to 2"):
        beta_schedule("linear", 0.1, 2.0, 10)


def test_cumulative_alphas_are_the_running_product_in_float64():
    alphas = cumulative_alphas(torch.tensor([0.5, 0.5, 0.0, 1.0]))
    assert alphas.dtype == torch.float64
    assert alphas.tolist() == [0.5, 0.25, 0.25, 0.0]


@pytest.mark.parametrize(
    "num, steps, skip_type, expected",
    [
        (1000, 4, "uniform", [750, 500, 250, 0]),
        (10, 4, "uniform", [8, 6, 4, 2, 0]),  # one more than asked: 4 does not divide 10
        (1000, 1, "uniform", [0]),
        (1000, 10, "quad", [800, 632, 483, 355, 246, 158, 88, 39, 9, 0]),  # floor(800 (i/9)²)
        (1000, 1, "quad", [0]),
    ],
)
def test_selected_timesteps(num, steps, skip_type, expected):
    timesteps = select_timesteps(num, steps, skip_type)
    assert timesteps.dtype == torch.int64
    assert timesteps.tolist() == expected


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match=rf"1\.\.1000.*{steps}"):
        select_timesteps(1000, steps, "uniform")


def test_unknown_skip_type_is_refused():
    with pytest.raises(ValueError, match="'cubic'.*uniform, quad"):
        select_timesteps(1000, 10, "cubic")

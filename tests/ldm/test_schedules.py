import math

import pytest
import torch

from ddim.schedules import beta_schedule as ddim_schedule
from ddim.schedules import cumulative_alphas
from ldm.export import PIXEL_TARGET, exported_config
from ldm.models.diffusion.models import DDPM
from ldm.schedules import BETA_SCHEDULES, beta_schedule, betas_of


@pytest.mark.parametrize(
    "name, first, middle, last",  # middle: entry 2 of 5
    [
        ("linear", 0.01, 0.16, 0.49),  # ((0.1 + 0.7) / 2)²
        ("sqrt_linear", 0.01, 0.25, 0.49),
        ("sqrt", 0.1, 0.5, 0.7),
    ],
)
def test_beta_schedules(name, first, middle, last):
    betas = beta_schedule(name, 5, 0.01, 0.49)
    assert betas.dtype == torch.float64 and betas.shape == (5,)
    assert betas[[0, 2, 4]].tolist() == pytest.approx([first, middle, last], rel=1e-12)


@pytest.mark.parametrize("cosine_s", [8e-3, 0.1])
def test_cosine_schedule_has_the_cumulative_alphas_of_its_equation(cosine_s):
    betas = beta_schedule("cosine", 1000, 1e-4, 2e-2, cosine_s)
    alphas = cumulative_alphas(betas)
    f = [math.cos((u / 1000 + cosine_s) / (1 + cosine_s) * math.pi / 2) ** 2 for u in range(1001)]
    assert alphas[:-1].tolist() == pytest.approx([value / f[0] for value in f[1:-1]], rel=1e-9)
    assert betas[-1] == 0.999


def test_end_of_the_stable_diffusion_schedule():
    alphas = cumulative_alphas(beta_schedule("linear", 1000, 0.00085, 0.012))
    assert alphas[[0, 999]].tolist() == pytest.approx([0.99915, 0.0046600], rel=1e-4)


def test_every_schedule_is_named_in_the_error():
    with pytest.raises(ValueError, match=f"'quad'.*{', '.join(BETA_SCHEDULES)}"):
        beta_schedule("quad", 10, 1e-4, 0.02)


@pytest.mark.parametrize(
    "name, num, start, end, match",
    [
        ("linear", 0, 1e-4, 0.02, "at least 1, found 0"),
        ("linear", 10, 0.1, 2.0, "strictly between 0 and 1, found 0.1 to 2"),
        ("sqrt_linear", 10, 0.0, 0.02, "must be positive, found 0.0 and 0.02"),
        ("sqrt", 10, -1e-4, 0.02, "must be positive, found -0.0001 and 0.02"),
    ],
)
def test_impossible_schedules_are_refused(name, num, start, end, match):
    with pytest.raises(ValueError, match=match):
        beta_schedule(name, num, start, end)


@pytest.mark.parametrize(
    ("params", "complaint"),
    [
        ({"timesteps": 10**12}, "timesteps: expected whole numbers up to 1000000, found 1000000000000"),
        ({"beta_schedule": ["linear"]}, "unknown beta_schedule"),
    ],
)
def test_settings_that_no_schedule_has(params, complaint):
    with pytest.raises(ValueError, match=complaint):
        betas_of(params)


GIVEN = {"timesteps": 3, "given_betas": [0.1, 0.2, 0.3]}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, beta_schedule("linear", 1000, 1e-4, 2e-2)),
        ({"timesteps": 9, "beta_schedule": "cosine", "cosine_s": 0.1}, beta_schedule("cosine", 9, 1, 1, 0.1)),
        ({"linear_start": 0.01, "linear_end": 0.2, "beta_schedule": None}, beta_schedule("linear", 1000, 0.01, 0.2)),
        (GIVEN | {"linear_start": 0.01}, torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)),
        ({"given_betas": [0.1, 0.2]}, torch.tensor([0.1, 0.2], dtype=torch.float64)),
    ],
    ids=["defaults", "cosine", "linear", "given", "given alone"],
)
def test_every_form_that_a_configuration_has(params, expected):
    """One place reads it for the model, the sampling scripts and calibration."""
    assert torch.equal(betas_of(params), expected)
    unet = {"target": "torch.nn.Identity"}
    assert torch.equal(DDPM(unet, use_ema=False, **params).betas, expected)


def test_a_pixel_model_is_exported_with_the_schedule_that_it_was_trained_with():
    network = {"image_size": 8, "in_channels": 3, "num_diffusion_timesteps": 1000}
    params = {"unet_config": {"target": PIXEL_TARGET, "params": network}, "beta_schedule": "sqrt_linear"}
    for given in ({"timesteps": 50, "linear_end": 0.1}, {}):
        written = exported_config({"params": params | given})["diffusion"]
        names = ("beta_schedule", "beta_start", "beta_end", "num_diffusion_timesteps")
        torch.testing.assert_close(
            ddim_schedule(*(written[name] for name in names)), betas_of(params | given), rtol=1e-12, atol=0
        )
    with pytest.raises(ValueError, match="can be exported with sqrt_linear, linear, found 'given_betas'"):
        exported_config({"params": params | GIVEN})


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([0.1, 0.2], "expected 3 numbers as timesteps, found 2"),
        ([0.1, 0.2, 1.0], "strictly between 0 and 1, found 0.1 to 1"),
        ([0.1, 0.2, float("nan")], "strictly between 0 and 1"),
        (["a", "b", "c"], "expected a list of numbers"),
        (7, "expected a list of numbers, found 7"),
    ],
)
def test_given_betas_that_make_no_schedule(given, complaint):
    with pytest.raises(ValueError, match=f"^given_betas: .*{complaint}"):
        betas_of(GIVEN | {"given_betas": given})

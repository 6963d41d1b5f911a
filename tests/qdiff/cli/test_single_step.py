"""Samplers whose first step is of nearly clean images make noise of noise: they say so, in one line."""

import pytest
import torch
from latents import LDM, TXT2IMG
from running import call, passed

from ddim.pipeline import Pipeline as Pixels
from ddim.schedules import beta_schedule
from ldm.pipeline import Pipeline as Latents
from ldm.schedules import beta_schedule as latent_betas
from qdiff.cli.runs.sampling import warn_of_start

SHAPE = (3, 8, 8)


def assert_warned(result, timestep):
    assert result.code == 0
    (line,) = result.complaints
    assert f"sampling starts from noise at timestep {timestep}, " in line and "% of noise" in line


def test_pixel_models(tiny, tmp_path):
    flags = (*tiny.model, "--timesteps", 1)
    assert_warned(call("sample_diffusion_ddim", *flags, "--max_images", 1, "-l", tmp_path / "out"), 0)
    assert_warned(call("make_calibration_data", *flags, "--n_samples", 1, "--out", tmp_path / "data"), 0)
    assert_warned(call("evaluate", *flags, "--max_images", 2, "--metrics", "psnr", "--outdir", tmp_path / "e"), 0)
    whole = ("--sample_type", "dpm_solver", "--max_images", 1, "-l", tmp_path / "dpm")  # starts at T - 1
    passed(call("sample_diffusion_ddim", *flags, *whole))


def test_latent_models(latent, tmp_path):
    flags = ("-r", latent.ldm.ckpt, *LDM, "-n", 1, "-c", 1, "-l", tmp_path / "ldm")
    assert_warned(call("sample_diffusion_ldm", *flags), 1)
    flags = ("--ckpt", latent.sd.ckpt, *TXT2IMG, "--n_iter", 1, "--prompt", "a cat", "--ddim_steps", 1)
    assert_warned(call("txt2img", *flags, "--outdir", tmp_path / "sd"), 1)


@pytest.mark.parametrize(
    ("sampler", "steps", "skip", "warned"),
    [
        ("generalized", 1, "uniform", True),
        ("generalized", 1, "quad", True),
        ("ddpm_noisy", 1, "uniform", True),
        ("dpm_solver", 1, "uniform", False),
        ("generalized", 2, "uniform", False),
        ("generalized", 2, "quad", False),
    ],
)
def test_pixel_samplers(caplog, sampler, steps, skip, warned):
    betas = torch.as_tensor(beta_schedule("linear", 0.0001, 0.02, 1000))
    warn_of_start(Pixels(SHAPE, betas, sampler, steps, skip))
    assert len(caplog.records) == warned


@pytest.mark.parametrize(("sampler", "warned"), [("ddim", 1), ("plms", 1), ("dpm_solver", 0), ("ddpm", 0)])
def test_latent_samplers(caplog, sampler, warned):
    warn_of_start(Latents(SHAPE, latent_betas("linear", 1000, 0.0015, 0.0195), sampler, 1))
    assert len(caplog.records) == warned

"""What the sampling scripts write is what evaluate.py and the others read."""

import copy

import pytest
import torch
import yaml
from judging import evaluate
from latents import CONFIGS, images, sample_ldm, txt2img, write_model
from running import call, passed, refused

from qdiff.evaluation.images import open_images
from qdiff.evaluation.runs import read_run_prompts

STRANGE = ("a cat", "  two  words\t", "写真\u3000", "\ufeffnaïve | `x`", "a long prompt " * 300)


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.parametrize("prompt", ["", *STRANGE[1:4]], ids=["empty", "spaces", "cjk", "mark"])
def test_prompts_come_back(latent, tmp_path, prompt):
    """By the run's folder, with its grid, and as a file of prompts."""
    short = ("--n_samples", 2, "--n_iter", 1, "--ddim_steps", 2)
    run = txt2img(latent.sd, tmp_path / "my runs", "--prompt", prompt, *short)
    assert read_run_prompts(run) == (prompt, prompt)
    assert yaml.safe_load((run / "sampling_config.yaml").read_text(encoding="utf8"))["images_in"] == "samples"
    assert [path.name for path in open_images(run).paths] == ["00000.png", "00001.png"]
    result, _, content = evaluate(tmp_path, run, "--float", run, "--metrics", "psnr", "accuracy", "--bootstrap", 0)
    assert f"{run} (2)" in result.out and content["scores"][0]["note"] == "2 of 2 images identical"
    again = txt2img(latent.sd, tmp_path / "again", "--from-file", run / "prompts.txt", *short)
    assert images(again) == images(run) and read_run_prompts(again) == (prompt, prompt)
    passed(call("evaluate", run, "--metrics", "accuracy", "--prompts", run / "prompts.txt"))


def test_a_long_prompt_comes_back(latent, tmp_path):
    flags = ("--n_samples", 1, "--n_iter", 1, "--ddim_steps", 2, "--skip_grid")
    result = call("txt2img", "--ckpt", latent.sd.ckpt, *flags, "--prompt", STRANGE[-1], "--outdir", "out")
    (run,) = (tmp_path / "out").iterdir()
    assert result.code == 0 and read_run_prompts(run) == (STRANGE[-1],)


def test_the_array_of_grey_images(tmp_path, monkeypatch):
    """Which has as many channels as they have."""
    grey = copy.deepcopy(CONFIGS["ldm"])
    grey["model"]["params"]["first_stage_config"]["params"]["ddconfig"] |= {"in_channels": 1, "out_ch": 1}
    monkeypatch.setitem(CONFIGS, "grey", grey)
    run = sample_ldm(write_model(tmp_path / "grey", "grey"), tmp_path / "out")
    (array,) = (run / "numpy").iterdir()
    one, other = open_images(run), open_images(array)
    assert array.name == "3x16x16x1-samples.npz" and one.shape == other.shape == (3, 16, 16)
    assert torch.equal(torch.cat(list(one.batches(9))), torch.cat(list(other.batches(9))))


def test_the_plot_of_a_calibration_is_no_image(calibrated):
    assert (calibrated.folder / "calibration_loss.png").is_file()
    assert [path.name for path in open_images(calibrated.folder).paths] == ["0.png", "1.png", "2.png"]


def test_a_run_that_kept_its_grid_alone_is_refused(latent, tmp_path):
    flags = ("--n_samples", 1, "--n_iter", 1, "--ddim_steps", 2, "--skip_save")
    run = txt2img(latent.sd, tmp_path / "out", "--prompt", "a cat", *flags)
    refused(call("evaluate", run), run, "found a run that kept none")

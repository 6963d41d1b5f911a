"""check_prompts.py: the classifier's view of runs of the bundled text model, and runs that it cannot judge."""

import shutil

import pytest
from latents import BUNDLED, pixels, txt2img
from PIL import Image
from running import call, passed, refused

PROMPTS = ("a photo of a ship", "a photo of a horse", "a truck", "a frog")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A float run of the bundled model, one image of each prompt."""
    out = tmp_path_factory.mktemp("run")
    (out / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ("--from-file", out / "prompts.txt", "--ddim_steps", 20, "--scale", 3, "--plms", "--n_samples", 4)
    passed(call("txt2img", "--ckpt", BUNDLED / "cifar10-sd", *flags, "--n_iter", 1, "--outdir", out / "out"))
    return next((out / "out").iterdir())


@pytest.fixture
def other(run, tmp_path):
    """A copy of the run to be changed."""
    return shutil.copytree(run, tmp_path / "other")


def rows(result):
    """The table's rows, as lists of text."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in result.out.splitlines()]


@pytest.mark.long
def test_one_run(run):
    """Images show what was asked for."""
    found = rows(passed(call("check_prompts", run)))
    assert found[0] == ["run", "images", "prompt's class named", "of the first run's"]
    assert found[2] == [str(run), "4", "1.000", "1.000"]


def test_runs_are_compared_with_the_first(run, other):
    """Two images of grey: the classifier names one class for both, so at most one of four remains right by chance."""
    for index in (0, 1):
        Image.new("RGB", (32, 32), (128, 128, 128)).save(other / "samples" / f"{index:05d}.png")
    found = rows(passed(call("check_prompts", run, other, run)))
    accuracy = float(found[3][2])
    assert accuracy in (0.5, 0.75) and float(found[3][3]) == accuracy
    squares = [(pixels(p).double() / 255 - 128 / 255).square().mean() for p in sorted(run.glob("samples/*"))[:2]]
    expected = -10 * (sum(squares) / 4).log10()
    assert abs(float(found[3][4]) - expected) < 0.006 and found[4][4] == "inf"


def test_prompts_that_belong_to_other_images(run, other):
    (other / "prompts.txt").write_text("\n".join(PROMPTS[1:] + PROMPTS[:1]))
    found = rows(passed(call("check_prompts", run, other)))
    assert found[3][2:4] == ["0.000", "0.000"]


def test_runs_that_cannot_be_judged(latent, run, other, tmp_path):
    refused(call("check_prompts", tmp_path / "nope"), tmp_path / "nope", "no such file")
    (other / "samples" / "00001.png").unlink()
    refused(call("check_prompts", run, other), other, "expected 4 images, found 3")
    shutil.copy(run / "samples" / "00001.png", other / "samples" / "00004.png")
    refused(call("check_prompts", run, other), other, "expected images with the numbers 0 to 3")
    (other / "samples" / "00004.png").unlink()
    (other / "samples" / "00001.png").write_bytes(b"no image")
    refused(call("check_prompts", run, other), "00001.png", "expected an image")
    shutil.copy(run / "samples" / "00001.png", other / "samples")
    (other / "prompts.txt").write_text("a ship\na horse\na castle\na frog\n")
    refused(call("check_prompts", run, other), "'a castle'", "expected one of the words airplane")
    small = txt2img(latent.sd, tmp_path / "small", "--prompt", "a cat")
    refused(call("check_prompts", small), "32")
    refused(call("check_prompts"), "RUN")

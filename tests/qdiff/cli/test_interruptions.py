"""The latent models' scripts, interrupted anywhere: the same command goes on in its folder, another one does not."""

import shutil
import signal
import subprocess
import time

import pytest
from latents import LDM, TXT2IMG, images, sample_ldm, txt2img
from running import ENVIRONMENT, call, command, passed, tree

import qdiff.cli.quantize
from qdiff.cli.runs import outputs as kept
from qdiff.cli.runs import run as latent_model
from qdiff.cli.sample import ldm as sample_diffusion_ldm

W4A8 = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8, "--split")
NEAREST = ("--method", "nearest", "--cali_st", 2, "--cali_n", 2)
CALIBRATING = {"weight ranges", "activation ranges"}
WHERE = {"ldm": "img", "sd": "samples"}  # the images
LAST = {"ldm": "numpy/3x16x16x3-samples.npz", "sd": "grid-0000.png"}  # what is written after them


def line(latent, name, out):
    """(script, its flags) for 3 or 4 images in 2 batches."""
    if name == "ldm":
        return "sample_diffusion_ldm", "-r", latent.ldm.ckpt, *LDM, "-l", out
    return "txt2img", "--ckpt", latent.sd.ckpt, *TXT2IMG, "--prompt", "a photo of a cat", "--outdir", out


def runs(name, out):
    """The folders that runs have made in `out`."""
    return sorted((out / "samples" if name == "ldm" else out).iterdir())


@pytest.fixture(scope="module")
def whole(latent, tmp_path_factory):
    """name -> the uninterrupted calibrating run's folder."""
    out = tmp_path_factory.mktemp("whole")
    return {
        "ldm": sample_ldm(latent.ldm, out / "ldm", *W4A8, *NEAREST),
        "sd": txt2img(latent.sd, out / "sd", "--prompt", "a photo of a cat", *W4A8, *NEAREST),
    }


@pytest.fixture
def interrupt(monkeypatch):
    """(module, name of a function in it, calls): run a command whose given call of that function is interrupted."""

    def run(module, name, calls, *arguments):
        original, made = getattr(module, name), []

        def interrupted(*args, **kwargs):
            made.append(args)
            if len(made) == calls:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            assert call(*arguments).code == 130
        assert len(made) == calls

    return run


# Where a run is interrupted: in module, at the call of function of that number, when so many images are there.
MOMENTS = {
    "first-image": (kept, "save_png", 1, 0),
    "within-a-batch": (kept, "save_png", 2, 1),
    "between-batches": (kept, "save_png", 3, 2),
    "after-calibration": (latent_model, "write_images", 1, 0),
}
# Each moment and each step of a calibration once; from the other script in the long suite.
ONCE = [("ldm", "within-a-batch"), ("ldm", "after-calibration"), ("sd", "first-image"), ("sd", "between-batches")]
STEPS_ONCE = [("ldm", "calibrate_network"), ("ldm", "save_checkpoint"), ("sd", "save_published")]


def crossed(once, seconds):
    """The cases of `once`, and marked as long all others of both scripts."""
    rest = [(name, second) for name in WHERE for second in seconds if (name, second) not in once]
    return [*once, *(pytest.param(*case, marks=pytest.mark.long) for case in rest)]


@pytest.mark.parametrize(("name", "moment"), crossed(ONCE, MOMENTS))
def test_an_interrupted_run_goes_on(latent, whole, interrupt, tmp_path, name, moment):
    """It does not calibrate again, makes whole batches that are missing, and ends as if it had not been."""
    module, function, calls, there = MOMENTS[moment]
    arguments = (*line(latent, name, tmp_path / "out"), *W4A8, *NEAREST)
    interrupt(module, function, calls, *arguments)
    (run,) = runs(name, tmp_path / "out")
    calibrated = (run / "ckpt.safetensors").read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in sorted((run / WHERE[name]).glob("*"))[: 2 * (there // 2)]}
    result = passed(call(*arguments))
    assert runs(name, tmp_path / "out") == [run] and not CALIBRATING & set(result.bars)
    total = len(images(whole[name], WHERE[name]))
    assert result.out.splitlines()[0] == f"going on with {run}: {there} of {total} images are there"
    assert tree(run) == tree(whole[name]) and (run / "ckpt.safetensors").read_bytes() == calibrated
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())
    assert (run / "run.log").read_text().count("command: ") == 2


@pytest.mark.parametrize(
    ("name", "function"), crossed(STEPS_ONCE, ["calibrate_network", "save_published", "save_checkpoint"])
)
def test_an_interrupted_calibration_comes_to_the_same_end(latent, whole, interrupt, tmp_path, name, function):
    """It is unfinished until all of it is written: both checkpoints."""
    arguments = (*line(latent, name, tmp_path / "out"), *W4A8, *NEAREST)
    interrupt(qdiff.cli.quantize, function, 1, *arguments)
    (run,) = runs(name, tmp_path / "out")
    assert not (run / "ckpt.safetensors").exists()
    passed(call(*arguments))
    assert runs(name, tmp_path / "out") == [run] and tree(run) == tree(whole[name])


@pytest.mark.parametrize("name", ["ldm", "sd"])
def test_what_follows_the_images_is_made_up_for(latent, whole, tmp_path, name):
    """No image is made again; after that the run is finished, so the next one has a folder of its own."""
    out = tmp_path / "out"
    run = (out / "samples" if name == "ldm" else out) / whole[name].name
    shutil.copytree(whole[name], run)
    (run / LAST[name]).unlink()
    arguments = (*line(latent, name, out), *W4A8, *NEAREST)
    assert passed(call(*arguments)).bars == []
    assert runs(name, out) == [run] and tree(run) == tree(whole[name])
    passed(call(*arguments))
    assert len(runs(name, out)) == 2 and all(tree(found) == tree(whole[name]) for found in runs(name, out))


def test_the_array_is_complete_or_not_there(latent, whole, interrupt, tmp_path):
    arguments = (*line(latent, "ldm", tmp_path / "out"), *W4A8, *NEAREST)
    interrupt(sample_diffusion_ldm, "load_png", 2, *arguments)
    (run,) = runs("ldm", tmp_path / "out")
    assert list((run / "numpy").iterdir()) == []
    passed(call(*arguments))
    assert tree(run) == tree(whole["ldm"])


def test_skipped_images_are_made_again_for_a_missing_grid(latent, tmp_path, interrupt):
    """--skip_save removes them only when the grid is there."""
    arguments = (*line(latent, "sd", tmp_path / "out"), "--skip_save")
    interrupt(kept, "save_png", 4, *arguments)
    passed(call(*arguments))
    (run,) = runs("sd", tmp_path / "out")
    assert not (run / "samples").exists() and (run / "grid-0000.png").is_file()


CALIBRATE, LOAD = (*W4A8, *NEAREST), (*W4A8, "--cali_ckpt", "ckpt.safetensors")
OTHER_PLANS = {
    "ldm": {
        "seed": ((), ("--seed", 5)),
        "n_samples": ((), ("-n", 5)),
        "batch_size": ((), ("--batch_size", 3)),
        "steps": ((), ("-c", 5)),
        "eta": ((), ("-e", 0.5)),
        "sampler": ((), ("--dpm",)),
        "override": ((), ("model.params.linear_end=0.02",)),
        "quantized": ((), LOAD),
        "bits": (CALIBRATE, (*CALIBRATE, "--weight_bit", 5)),
        "iterations": (CALIBRATE, (*CALIBRATE, "--cali_n", 3)),
        "weights alone": (LOAD, ("--ptq", "--weight_bit", 4, "--split", "--cali_ckpt", "ckpt.safetensors")),
        "resume_w": (LOAD, (*LOAD, *NEAREST, "--resume_w")),
    },
    "sd": {
        "prompt": ((), ("--prompt", "a dog")),
        "scale": ((), ("--scale", 3)),
        "height": ((), ("--H", 24)),
        "fixed_code": ((), ("--fixed_code",)),
        "precision": ((), ("--precision", "full")),
        "n_iter": ((), ("--n_iter", 3)),
        "cali_prompts": (CALIBRATE, (*CALIBRATE, "--cali_prompts", "other.txt")),
    },
}


# One of each kind: of the model, of its sampling, of a calibration, of a checkpoint, of the texts.
KINDS = [("ldm", "override"), ("ldm", "steps"), ("ldm", "iterations"), ("ldm", "weights alone"), ("sd", "prompt")]
ALL_PLANS = [
    pytest.param(name, changed, marks=[] if (name, changed) in KINDS else pytest.mark.long)
    for name, plans in OTHER_PLANS.items()
    for changed in plans
]


@pytest.mark.parametrize(("name", "changed"), ALL_PLANS)
def test_another_plan_has_a_folder_of_its_own(latent, whole, interrupt, tmp_path, name, changed):
    """The interrupted one is left as it is, and goes on when its own command is given."""
    shutil.copy(whole[name] / "ckpt.safetensors", tmp_path)
    (tmp_path / "other.txt").write_text("a dog\n")
    base, other = ((*line(latent, name, tmp_path / "out"), *flags) for flags in OTHER_PLANS[name][changed])
    interrupt(kept, "save_png", 2, *base)
    (run,) = runs(name, tmp_path / "out")
    before = tree(run)
    result = passed(call(*other))
    assert "going on" not in result.out
    assert len(runs(name, tmp_path / "out")) == 2 and tree(run) == before
    assert passed(call(*base)).out.startswith(f"going on with {run}: 1 of ")
    assert len(runs(name, tmp_path / "out")) == 2 and (run / LAST[name]).is_file()


def test_a_killed_process_is_gone_on_with(latent, tmp_path):
    flags = ("--prompt", "a cat", "--n_samples", 1, "--n_iter", 6, "--ddim_steps", 8, "--dpm")
    arguments = ("txt2img", "--ckpt", latent.sd.ckpt, *flags, "--outdir")
    process = subprocess.Popen(command(*arguments, tmp_path / "out"), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("out/*/samples/*.png")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (run,) = runs("sd", tmp_path / "out")
    survived = {path: path.stat().st_mtime_ns for path in run.glob("samples/*.png")}
    assert 1 <= len(survived) < 6
    passed(call(*arguments, tmp_path / "out"))
    passed(call(*arguments, tmp_path / "whole"))
    assert runs("sd", tmp_path / "out") == [run]
    (other,) = runs("sd", tmp_path / "whole")
    found = {path.name: path.read_bytes() for path in run.glob("samples/*.png")}
    assert found == images(other) and len(found) == 6
    assert all(path.stat().st_mtime_ns == changed for path, changed in survived.items())

"""sample_diffusion_ldm.py: what it writes, its samplers and classes, calibrated networks that come back, overrides."""

import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from latents import LDM, all_pixels, as_safetensors, assert_close, images, pixels, sample_ldm
from running import call, only_run, passed, refused, tree

from qdiff.calibration.trajectories import concatenate
from qdiff.checkpoints.native import load_checkpoint
from qdiff.nn.layers import quant_layers

SAMPLE = "sample_diffusion_ldm"
NAMES = [f"sample_{i:06d}.png" for i in range(3)]
FILES = ["img", *(f"img/{name}" for name in NAMES), "numpy", "numpy/3x16x16x3-samples.npz", "sampling_config.yaml"]
W4A8 = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8, "--a_sym", "--split")
NEAREST = ("--method", "nearest", "--cali_st", 2, "--cali_n", 3)
QUICK = ("--method", "quick", "--cali_iters", 2, "--cali_st", 2, "--cali_n", 3)


@pytest.fixture(scope="module")
def plain(latent, tmp_path_factory):
    """The float model's run."""
    return sample_ldm(latent.ldm, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def calibrated(latent, tmp_path_factory):
    """A run that calibrates W4A8 without learning."""
    return sample_ldm(latent.ldm, tmp_path_factory.mktemp("calibrated"), *W4A8, *NEAREST)


# The float model


def test_what_is_written(latent, plain, tmp_path):
    """By the model's folder too: the same bytes."""
    result = passed(call(SAMPLE, "-r", latent.ldm.folder, *LDM, "-l", "out"))
    run = only_run(tmp_path / "out")
    assert re.fullmatch(r"\d{4}(-\d\d){5}", run.name) and result.bars == ["sampling"]
    where = f"out/samples/{run.name}"
    assert result.out == f"3 images of the float model in {where}/img\n{where}/{FILES[5]}\n"
    assert sorted(tree(run)) == FILES and tree(run) == tree(plain)
    assert all(image.shape == (16, 16, 3) and image.float().std() > 10 for image in all_pixels(run, "img"))
    assert len(set(images(run, "img").values())) == 3
    log = (run / "run.log").read_text()
    assert "command: " in log and "float model from " in log and "images 2 to 2" in log


def test_the_array_holds_the_images(plain):
    with np.load(plain / "numpy" / "3x16x16x3-samples.npz") as archive:
        assert archive.files == ["arr_0"]
        array = archive["arr_0"]
    assert array.dtype == np.uint8 and array.shape == (3, 16, 16, 3)
    assert all(np.array_equal(array[i], pixels(plain / "img" / name).numpy()) for i, name in enumerate(NAMES))


def test_the_description_of_the_run(latent, plain):
    found = yaml.safe_load((plain / "sampling_config.yaml").read_text())
    assert (found["images"], found["sampler"], found["timesteps"]) == (3, "ddim", [751, 501, 251, 1])
    assert found["seed"] == 41 and found["recipe"] is None and found["checkpoint"] == str(latent.ldm.ckpt)
    assert found["config"]["model"]["params"]["unet_config"]["params"]["model_channels"] == 32


def test_a_safetensors_file_with_its_configuration_elsewhere(latent, plain, tmp_path):
    folder = as_safetensors(latent.ldm, tmp_path / "model")
    (folder / "config.yaml").rename(tmp_path / "mine.yaml")
    flags = ("-r", folder / "model.safetensors", "--config", tmp_path / "mine.yaml", *LDM, "-l", tmp_path / "out")
    passed(call(SAMPLE, *flags))
    assert images(only_run(tmp_path / "out"), "img") == images(plain, "img")


def test_without_a_logdir_images_go_to_outputs_ldm(latent, tmp_path):
    for flags in ((), ("--logdir", "none")):
        passed(call(SAMPLE, "-r", latent.ldm.ckpt, *LDM, "-n", 1, *flags))
    assert len(list((tmp_path / "outputs" / "ldm" / "samples").glob("*/img/sample_000000.png"))) == 2


def test_images_depend_on_the_seed_and_not_on_their_number(latent, plain, tmp_path):
    expected = images(plain, "img")
    assert images(sample_ldm(latent.ldm, tmp_path / "one", "-n", 1), "img") == {NAMES[0]: expected[NAMES[0]]}
    other = images(sample_ldm(latent.ldm, tmp_path / "seed", "--seed", 5), "img")
    assert not set(other.values()) & set(expected.values())


@pytest.mark.parametrize("eta", [0, 1])
def test_images_do_not_depend_on_the_batch_size_beyond_float_noise(latent, tmp_path, eta):
    """Nor does the noise that DDIM draws with eta 1."""
    expected = all_pixels(sample_ldm(latent.ldm, tmp_path / "2", "-e", eta), "img")
    for size in (1, 3, 10):
        run = sample_ldm(latent.ldm, tmp_path / f"by-{size}", "-e", eta, "--batch_size", size)
        assert_close(all_pixels(run, "img"), expected)


SAMPLERS = {
    "eta": (("-e", 1), "ddim"),
    "dpm": (("--dpm",), "dpm_solver"),
    "vanilla": (("-v", "model.params.timesteps=20"), "ddpm"),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(latent, plain, tmp_path, name):
    """Each gives its own images, calibrates on its own states, and loads what it has calibrated."""
    flags, sampler = SAMPLERS[name]
    run = sample_ldm(latent.ldm, tmp_path / "float", *flags)
    found = yaml.safe_load((run / "sampling_config.yaml").read_text())
    assert found["sampler"] == sampler and len(found["timesteps"]) == (20 if sampler == "ddpm" else 4)
    assert found["eta"] == (1 if name == "eta" else 0)
    assert not set(images(run, "img").values()) & set(images(plain, "img").values())
    made = sample_ldm(latent.ldm, tmp_path / "made", *flags, *W4A8, *NEAREST)
    loaded = sample_ldm(latent.ldm, tmp_path / "loaded", *flags, *W4A8, "--cali_ckpt", made / "ckpt.safetensors")
    assert images(loaded, "img") == images(made, "img")


def test_vanilla_ignores_the_number_of_steps(latent, tmp_path):
    runs = [sample_ldm(latent.ldm, tmp_path / f"{c}", "-v", "-c", c, "-n", 1, OVERRIDE) for c in (4, 10)]
    assert images(runs[0], "img") == images(runs[1], "img")


# Overrides

OVERRIDE = "model.params.timesteps=20"


def test_overrides_may_stand_anywhere(latent, tmp_path):
    lines = [
        ("-r", latent.ldm.ckpt, *LDM, OVERRIDE, "model.params.scale_factor=2.2"),
        ("-r", latent.ldm.ckpt, OVERRIDE, *LDM, "model.params.scale_factor=2.2"),
        (OVERRIDE, "model.params.scale_factor=2.2", "-r", latent.ldm.ckpt, *LDM),
    ]
    found = [yaml.safe_load(passed(call(SAMPLE, *flags, "--dry_run")).out) for flags in lines]
    assert found[0] == found[1] == found[2] and tree(tmp_path) == {}
    assert found[0]["timesteps"] == [16, 11, 6, 1] and found[0]["config"]["model"]["params"]["scale_factor"] == 2.2


def test_overrides_change_the_images(latent, plain, tmp_path):
    run = sample_ldm(latent.ldm, tmp_path / "out", "model.params.unet_config.params.dropout=0.5")  # no effect
    assert images(run, "img") == images(plain, "img")
    run = sample_ldm(latent.ldm, tmp_path / "other", "model.params.linear_end=0.03")
    assert images(run, "img") != images(plain, "img")


# Classes


def labels(run):
    return [int(line) for line in (run / "labels.txt").read_text().split()]


def test_all_classes_in_turn_but_for_the_one_that_stands_for_none(latent, tmp_path):
    run = sample_ldm(latent.cin, tmp_path / "out", "-n", 6)
    assert labels(run) == [0, 1, 2, 3, 0, 1] and len(set(images(run, "img").values())) == 6


def test_chosen_classes(latent, tmp_path):
    run = sample_ldm(latent.cin, tmp_path / "turn", "--classes", "3", "0-1")
    assert labels(run) == [3, 0, 1]
    run = sample_ldm(latent.cin, tmp_path / "each", "--classes", "3", "0-1", "--samples_per_class", 2)
    assert labels(run) == [3, 3, 0, 0, 1, 1] and len(images(run, "img")) == 6  # not the three of -n
    assert (run / "numpy" / "6x16x16x3-samples.npz").is_file()


def test_the_label_changes_the_image_and_guidance_too(latent, tmp_path):
    def sampled(name, *flags):
        return all_pixels(sample_ldm(latent.cin, tmp_path / name, "-n", 1, *flags), "img")

    one, other = sampled("one", "--classes", 1), sampled("other", "--classes", 2)
    guided = sampled("guided", "--classes", 1, "--scale", 3)
    empty, unguided = sampled("empty", "--classes", 4), sampled("unguided", "--classes", 1, "--scale", 0)
    found = [one, other, guided, empty]
    assert all((found[i][0] != found[j][0]).any() for i in range(4) for j in range(i))
    assert_close(unguided, empty)  # scale 0 leaves the prediction without a class, of batch 2
    assert_close(sampled("away", "--classes", 1, "--scale", 3, "--uncond_class", 1), one)  # from itself: nothing left


def test_scale_one_needs_no_label_of_no_class(latent, tmp_path):
    run = sample_ldm(latent.cin, tmp_path / "out", "--uncond_class", -1, "-n", 5)
    assert labels(run) == [0, 1, 2, 3, 4]


# Calibration


def test_a_calibrating_run(latent, calibrated):
    assert sorted(tree(calibrated)) == ["ckpt.pth", "ckpt.safetensors", *FILES]
    found = yaml.safe_load((calibrated / "sampling_config.yaml").read_text())
    assert found["recipe"]["weights"]["bits"] == 4 and found["calibration_data"] == "made by this run"
    log = (calibrated / "run.log").read_text()
    assert "W4A8 model from" in log and "--weight_bit 4 --split --quant_act --act_bit 8 --a_sym" in log


def test_the_same_command_gives_the_same_bytes(latent, calibrated, tmp_path):
    """A finished run starts a new folder."""
    before = tree(calibrated)
    passed(call(SAMPLE, "-r", latent.ldm.ckpt, *LDM, "-l", calibrated.parents[1], *W4A8, *NEAREST))
    (other,) = set(calibrated.parent.iterdir()) - {calibrated}
    shutil.move(other, tmp_path / "other")  # for the tests after this one
    assert tree(tmp_path / "other") == tree(calibrated) == before


@pytest.mark.parametrize("flag", [(), ("--resume",)], ids=["implied", "--resume"])
@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
@pytest.mark.cases("ckpt.pth---resume", "ckpt.safetensors-implied")
def test_loading_gives_the_calibrating_runs_images(latent, calibrated, tmp_path, name, flag):
    run = sample_ldm(latent.ldm, tmp_path / "out", *W4A8, "--cali_ckpt", calibrated / name, *flag)
    assert images(run, "img") == images(calibrated, "img") and sorted(tree(run)) == FILES


Q_DIFFUSION = ("--cali_iters", 2, "--cali_iters_a", 2, "--cali_st", 2, "--cali_n", 2, "--running_stat")


@pytest.mark.parametrize(
    ("name", "flags", "method"),
    [("cin", ("--scale", 2), QUICK), ("ldm", (), Q_DIFFUSION)],
    ids=["guided-quick", "q-diffusion"],
)
@pytest.mark.cases("q-diffusion")
def test_methods_that_learn(latent, tmp_path, name, flags, method):
    model, flags = getattr(latent, name), (*W4A8, *flags)
    run = sample_ldm(model, tmp_path / "out", *flags, *method)
    for file in ("ckpt.pth", "ckpt.safetensors"):
        loaded = sample_ldm(model, tmp_path / file, *flags, "--cali_ckpt", run / file)
        assert images(loaded, "img") == images(run, "img"), file


def test_without_quant_act_a_checkpoint_gives_its_weights_only(latent, calibrated, tmp_path):
    flags = ("--ptq", "--weight_bit", 4, "--split", "--cali_ckpt")
    runs = [sample_ldm(latent.ldm, tmp_path / n, *flags, calibrated / n) for n in ("ckpt.pth", "ckpt.safetensors")]
    assert images(runs[0], "img") == images(runs[1], "img") != images(calibrated, "img")


@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
def test_resume_w_keeps_the_codes_and_calibrates_activations(latent, calibrated, tmp_path, name):
    run = sample_ldm(latent.ldm, tmp_path / "out", *W4A8, *NEAREST, "--cali_ckpt", calibrated / name, "--resume_w")
    mine, theirs = (quant_layers(load_checkpoint(r / "ckpt.safetensors").network) for r in (run, calibrated))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key].codes, theirs[key].codes) for key in mine)
    loaded = sample_ldm(latent.ldm, tmp_path / "loaded", *W4A8, "--cali_ckpt", run / "ckpt.pth")
    assert images(loaded, "img") == images(run, "img")


def test_guided_classes_calibrate_on_both_halves(latent, tmp_path, monkeypatch):
    """The states that calibrate have their class's embedding, and that of no class, which is the file's last row."""
    seen = []

    def record(parts):
        seen.append(concatenate(parts))
        return seen[0]

    monkeypatch.setattr("qdiff.api.sampling.concatenate", record)
    sample_ldm(latent.cin, tmp_path / "out", *W4A8, *NEAREST, "--scale", 2, "--classes", "1", "3")
    rows, (found,) = latent.cin.state["cond_stage_model.embedding.weight"], seen
    assert torch.equal(found.extra["cs"][0][:, 0], rows[[1, 3, 1]])
    assert torch.equal(found.extra["ucs"][0][:, 0], rows[[4, 4, 4]])


# --dry_run and --recipe


def test_a_printed_recipe_given_back_gives_the_same_bytes(latent, calibrated, tmp_path):
    flags = ("-r", latent.ldm.ckpt, *LDM, "-l", "out")
    plan = yaml.safe_load(passed(call(SAMPLE, *flags, *W4A8, *NEAREST, "--dry_run")).out)
    assert tree(tmp_path) == {} and plan["folder"] == "out/samples/<date-time>" and plan["images"] == 3
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(plan["recipe"]))
    run = sample_ldm(latent.ldm, tmp_path / "out", "--ptq", "--recipe", "recipe.yml")
    assert tree(run) == tree(calibrated)


def test_dry_run_of_the_float_model(latent, tmp_path):
    plan = yaml.safe_load(passed(call(SAMPLE, "-r", latent.cin.ckpt, *LDM, "--scale", 2, "--dry_run")).out)
    assert "recipe" not in plan and plan["calibration_data"] is None and tree(tmp_path) == {}
    assert plan["asked_for"]["first"] == [0, 1, 2] and plan["scale"] == 2


@pytest.mark.parametrize("flags", [("--cond",), ("--scale", 1)])
def test_flags_that_change_nothing(latent, plain, tmp_path, flags):
    assert images(sample_ldm(latent.ldm, tmp_path / "out", *flags), "img") == images(plain, "img")


def test_flags_without_effect_are_said(latent, tmp_path):
    flags = ("--ptq", "--weight_bit", 4, "--a_sym", "--sm_abit", 16, *NEAREST)
    result = call(SAMPLE, "-r", latent.ldm.ckpt, *LDM, *flags, "-l", "out")
    assert result.code == 0 and "W4A32" in result.out
    (line,) = result.complaints
    assert "--sm_abit, --a_sym: no effect without --quant_act" in line


def test_a_model_that_this_script_does_not_sample(latent, tmp_path):
    line = refused(call(SAMPLE, "-r", latent.sd.folder, *LDM, "-l", "out"), latent.sd.folder, "text-to-image")
    assert "scripts/txt2img.py" in line and tree(tmp_path) == {}

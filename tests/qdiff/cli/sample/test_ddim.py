"""sample_diffusion_ddim.py: float images, every method calibrated, saved and resumed, and the same bytes each time."""

import json
import re
import shutil

import pytest
import torch
import yaml
from PIL import Image
from running import call, launch, only_run, passed, pictures, refused, tree
from safetensors.torch import load_file
from torchvision.transforms.functional import to_tensor

from qdiff.checkpoints.native import load_checkpoint
from qdiff.nn.layers import quant_layers

SAMPLE = "sample_diffusion_ddim"
NOTES = ["calibration.jsonl", "calibration_loss.png", "sampling_config.yaml"]  # beside run.log
FILES = ["ckpt.pth", "ckpt.safetensors", "img", "img/0.png", "img/1.png", "img/2.png"]


def outputs(folder):
    """What a run is for: images and checkpoints."""
    return {name: content for name, content in tree(folder).items() if name not in NOTES}


def sampled(tiny, logdir, *flags):
    """The folder of a run that succeeds."""
    passed(call(SAMPLE, *tiny.sampling, *flags, "-l", logdir))
    return only_run(logdir)


# The float model


def test_float_images(tiny, tmp_path):
    """In a process of its own, from a folder that is neither the repository's nor the model's."""
    result = passed(call(SAMPLE, *tiny.sampling, "-l", "out"))
    run = only_run(tmp_path / "out")
    assert re.fullmatch(r"\d{4}(-\d\d){5}", run.name)
    assert result.out == f"3 images of the float model in out/samples/{run.name}/img\n" and result.bars == ["sampling"]
    assert sorted(outputs(run)) == FILES[2:]
    for file in (run / "img").iterdir():
        with Image.open(file) as image:
            assert (image.size, image.mode, image.format) == ((16, 16), "RGB", "PNG")
    assert len(set(pictures(run))) == 3


def test_without_a_logdir_images_go_to_outputs_ddim(tiny, tmp_path):
    for flags in ((), ("--logdir", "none")):
        passed(call(SAMPLE, *tiny.sampling, "--max_images", 1, *flags))
    assert len(list((tmp_path / "outputs" / "ddim" / "samples").glob("*/img/0.png"))) == 2


def test_own_weights_instead_of_the_configurations(tiny, tmp_path):
    shutil.copy(tiny.weights, tmp_path / "mine.safetensors")
    torch.save(load_file(tiny.weights), tmp_path / "mine.ckpt")
    flags = ("--config", tiny.config, "--timesteps", 4, "--max_images", 2)
    expected = pictures(sampled(tiny, tmp_path / "pretrained", "--max_images", 2))
    for name in ("mine.safetensors", "mine.ckpt"):
        passed(call(SAMPLE, *flags, "--ckpt", name, "-l", tmp_path / name.replace(".", "-")))
        assert pictures(only_run(tmp_path / name.replace(".", "-"))) == expected


def test_images_depend_on_the_seed_and_not_on_their_number(tiny, tmp_path):
    three = pictures(sampled(tiny, tmp_path / "three"))
    assert pictures(sampled(tiny, tmp_path / "two", "--max_images", 1)) == three[:1]
    assert pictures(sampled(tiny, tmp_path / "seed", "--seed", 5))[0] not in three


@pytest.mark.parametrize(
    "flags",
    [
        ("--sample_type", "dpm_solver"),
        ("--sample_type", "ddpm_noisy"),
        ("--skip_type", "quad"),
        ("--eta", 1),
    ],
    ids=["dpm_solver", "ddpm_noisy", "quad", "eta"],
)
def test_samplers(tiny, calibrated, tmp_path, flags):
    """Each gives its own images, calibrates on its own states, and resumes."""
    assert pictures(sampled(tiny, tmp_path / "float", *flags)) != pictures(sampled(tiny, tmp_path / "ddim"))
    run = sampled(tiny, tmp_path / "calibrated", *flags, *tiny.w4a8, *tiny.nearest)
    resumed = sampled(tiny, tmp_path / "resumed", *flags, *tiny.w4a8, "--cali_ckpt", run / "ckpt.safetensors")
    assert pictures(resumed) == pictures(run)


def test_sequence_keeps_every_step_of_the_first_batch(tiny, tmp_path):
    run = sampled(tiny, tmp_path / "out", "--sequence")
    names = sorted(path.name for path in (run / "sequence").iterdir())
    assert names == [f"{image}_{step:04d}.png" for image in range(2) for step in range(4)]
    assert pictures(run) == pictures(sampled(tiny, tmp_path / "plain"))


def test_cond_is_said_to_do_nothing(tiny, tmp_path):
    result = call(SAMPLE, *tiny.sampling, "--cond", "-l", "out")
    assert result.code == 0 and len(result.complaints) == 1 and "--cond: no effect" in result.complaints[0]
    assert "--cond: no effect" in (only_run(tmp_path / "out") / "run.log").read_text()


def test_two_runs_of_one_second_have_folders_of_their_own(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form, *moment: "2026-01-01-00-00-00")
    for _ in range(3):
        passed(call(SAMPLE, *tiny.sampling, "--max_images", 1, "-l", "out"))
    name = "2026-01-01-00-00-00"
    assert sorted(p.name for p in (tmp_path / "out" / "samples").iterdir()) == [name, f"{name}-2", f"{name}-3"]


# Calibration


def test_a_calibrating_run(calibrated):
    assert sorted(outputs(calibrated.folder)) == FILES
    assert set(NOTES) <= tree(calibrated.folder).keys()  # and nothing of the unfinished calibration is left
    lines = [json.loads(line) for line in (calibrated.folder / "calibration.jsonl").read_text().splitlines()]
    assert [line["units_done"] for line in lines] == list(range(1, lines[0]["units"] + 1))
    assert lines[-1]["remaining_seconds"] == 0 and lines[-1]["peak_memory_bytes"]["host"] > 0
    assert calibrated.result.out == f"3 images of the W4A8 model in {calibrated.folder / 'img'}\n"
    assert calibrated.result.bars == [
        "calibration data",
        "weight ranges",
        "compensated rounding",
        "activation ranges",
        "learning rounding and bias and scale",
        "bias correction",
        "sampling",
    ]


def test_what_the_log_says(calibrated):
    log = (calibrated.folder / "run.log").read_text()
    for part in (
        "--weight_bit 4 --quant_act --act_bit 8 --a_sym --split --method quick",
        "W4A8 model from ",
        "stage 0, WeightRanges",
        "conv_out: error",
        "the original code reads ckpt.pth with --weight_bit 4 --split --quant_act --act_bit 8 --a_sym --sm_abit 9",
        "images 2 to 2",
    ):
        assert part in log, part


def test_the_same_command_gives_the_same_bytes(tiny, calibrated, tmp_path):
    """Here in another process, from another folder: images and both checkpoints."""
    passed(launch(SAMPLE, *tiny.sampling, *tiny.w4a8, *tiny.quick, "-l", "out", cwd=tmp_path))
    run = only_run(tmp_path / "out")
    assert outputs(run) == outputs(calibrated.folder)
    with Image.open(run / "calibration_loss.png") as plot:  # which is drawn in processes of their own alone
        assert min(plot.size) > 400


@pytest.mark.long
def test_another_seed_gives_other_images_and_codes(tiny, calibrated, tmp_path):
    run = sampled(tiny, tmp_path / "out", *tiny.w4a8, *tiny.quick, "--seed", 5)
    assert pictures(run) != pictures(calibrated.folder)
    assert (run / "ckpt.safetensors").read_bytes() != (calibrated.folder / "ckpt.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
@pytest.mark.parametrize("flag", [(), ("--resume",)], ids=["implied", "--resume"])
def test_resuming_gives_the_calibrating_runs_images(tiny, calibrated, tmp_path, name, flag):
    run = sampled(tiny, tmp_path / "out", *tiny.w4a8, "--cali_ckpt", calibrated.folder / name, *flag)
    assert pictures(run) == pictures(calibrated.folder)
    assert sorted(outputs(run)) == FILES[2:]


def test_a_packed_checkpoint_needs_neither_float_weights_nor_flags(tiny, calibrated, tmp_path):
    """The file knows its bits and grids."""
    config = tmp_path / "config.yml"
    config.write_text(tiny.config.read_text().replace("pretrained", "unused"))
    flags = ("--timesteps", 4, "--max_images", 3, "--ptq", "--quant_act")
    shutil.copy(calibrated.folder / "ckpt.safetensors", tmp_path / "mine.safetensors")
    passed(call(SAMPLE, "--config", config, *flags, "--cali_ckpt", "mine.safetensors", "-l", "out"))
    assert pictures(only_run(tmp_path / "out")) == pictures(calibrated.folder)


def test_the_logged_flags_read_the_file_as_the_original_code_does(tiny, calibrated, published, tmp_path):
    """Without our recipe in the file, --sm_abit 9 gives the same images: its upper half is our softmax grid."""
    flags = (*tiny.w4a8, "--sm_abit", 9)
    assert pictures(sampled(tiny, tmp_path / "out", *flags, "--cali_ckpt", published.both)) == pictures(
        calibrated.folder
    )


def pixels(run):
    """The images of a run's folder, [N, C, H, W] int."""
    files = [run / "img" / f"{i}.png" for i in range(len(pictures(run)))]
    return torch.stack([to_tensor(Image.open(file)) for file in files]).mul(255).round().int()


def test_without_quant_act_a_checkpoint_gives_its_weights_only(tiny, calibrated, published, tmp_path):
    flags = ("--ptq", "--weight_bit", 4, "--split")
    found = {}
    for path in (calibrated.folder / "ckpt.safetensors", calibrated.folder / "ckpt.pth", *vars(published).values()):
        result = passed(call(SAMPLE, *tiny.sampling, *flags, "--cali_ckpt", path, "-l", tmp_path / path.name))
        assert "of the W4A32 model" in result.out
        found[path.name] = pixels(only_run(tmp_path / path.name))
    for images in found.values():  # attention without quantizers is a fused kernel in some, and its steps in others
        assert (images - found["ckpt.pth"]).abs().max() <= 1
    assert (found["ckpt.pth"] - pixels(calibrated.folder)).abs().max() > 1


ALL_COMPAT = (
    *("raw_min_range", "ordered_ema", "skip_second_split"),
    *("train_mode", "symmetric_softmax", "definition_order"),
)
TWICE = ("--cali_iters", 2, "--cali_iters_a", 2, "--cali_st", 2, "--cali_n", 2)


@pytest.mark.parametrize(
    "flags",
    [
        ("--method", "nearest", *TWICE),
        ("--method", "gptq", *TWICE),
        ("--method", "q-diffusion", *TWICE),
        ("--quant_mode", "qdiff", *TWICE, "--running_stat"),
        ("--quant_mode", "linear", *TWICE),
        (*TWICE, "--rounding_start", "gptq", "--cali_lr", 1e-3, "--cali_p", 2, "--cali_batch_size", 3),
        (*TWICE, "--compat", *ALL_COMPAT, "--running_stat"),
    ],
    ids=["nearest", "gptq", "q-diffusion", "running_stat", "linear", "gptq-start", "compat"],
)
@pytest.mark.parametrize("grids", ["symmetric-split", "affine"])
@pytest.mark.cases(
    "symmetric-split-nearest",
    "symmetric-split-running_stat",
    "affine-linear",
    "symmetric-split-gptq-start",
    "symmetric-split-compat",
)
def test_every_method_calibrates_and_resumes(tiny, tmp_path, grids, flags):
    bits = tiny.w4a8 if grids == "symmetric-split" else ("--ptq", "--weight_bit", 3, "--quant_act", "--act_bit", 6)
    if "symmetric_softmax" in flags and grids == "affine":
        bits += ("--sm_abit", 12)
    run = sampled(tiny, tmp_path / "out", *bits, *flags)
    assert sorted(outputs(run)) == FILES
    for name in ("ckpt.pth", "ckpt.safetensors"):
        resumed = sampled(tiny, tmp_path / name, *bits, "--cali_ckpt", run / name)
        assert pictures(resumed) == pictures(run), name


def test_weights_alone(tiny, tmp_path):
    flags = ("--ptq", "--weight_bit", 4, "--split")
    run = sampled(tiny, tmp_path / "out", *flags, *tiny.quick)
    assert not any("act_quantizer" in key for key in torch.load(run / "ckpt.pth", weights_only=True))
    for name in ("ckpt.pth", "ckpt.safetensors"):
        assert pictures(sampled(tiny, tmp_path / name, *flags, "--cali_ckpt", run / name)) == pictures(run)


def test_the_data_may_be_a_folder_or_a_file(tiny, data, tmp_path):
    runs = {
        name: sampled(tiny, tmp_path / name, *tiny.w4a8, *tiny.nearest, *flags)
        for name, flags in {
            "shards": ("--cali_data_path", data.shards),
            "file": ("--cali_data_path", data.file),
            "made": (),
        }.items()
    }
    assert outputs(runs["shards"]) == outputs(runs["file"]) == outputs(runs["made"])


def test_data_may_have_more_steps_than_the_images_are_sampled_with(tiny, recipe, tmp_path):
    """Also where the recipe has more groups of steps than that."""
    flags = (*tiny.model, "--timesteps", 8, "--n_samples", 3, "--out", tmp_path / "data")
    passed(call("make_calibration_data", *flags))
    flags = ("--ptq", "--recipe", recipe(step_groups={"count": 8, "lookup": "hold"}), "--cali_st", 8)
    result = call(SAMPLE, *tiny.sampling, *flags, "--cali_data_path", tmp_path / "data", "-l", "out")
    assert result.code == 0 and "no ckpt.pth" in result.complaints[0]
    path = only_run(tmp_path / "out") / "ckpt.safetensors"
    resumed = call(SAMPLE, *tiny.sampling, *tiny.w4a8, "--cali_ckpt", path, "-l", tmp_path / "resumed")
    assert resumed.code == 0 and len(resumed.complaints) == 1 and "8 parameter sets" in resumed.complaints[0]
    assert pictures(only_run(tmp_path / "resumed")) == pictures(path.parent)


# --resume_w


@pytest.mark.parametrize("source", ["ckpt.safetensors", "ckpt.pth", "original", "weights"])
@pytest.mark.cases("ckpt.safetensors", "weights")
def test_resume_w_keeps_the_codes_and_calibrates_activations(tiny, calibrated, published, tmp_path, source):
    path = {"original": published.both, "weights": published.weights}.get(source, calibrated.folder / source)
    flags = (*tiny.w4a8, *tiny.quick, "--cali_ckpt", path, "--resume_w")
    result = passed(call(SAMPLE, *tiny.sampling, *flags, "-l", "out"))
    assert "compensated rounding" not in result.bars and "learning scale" in result.bars
    run = only_run(tmp_path / "out")
    assert sorted(outputs(run)) == FILES
    mine = load_checkpoint(run / "ckpt.safetensors").network
    theirs = load_checkpoint(calibrated.folder / "ckpt.safetensors").network
    layers = quant_layers(theirs)
    assert all(torch.equal(layer.codes, layers[name].codes) for name, layer in quant_layers(mine).items())
    for name in ("ckpt.pth", "ckpt.safetensors"):
        assert pictures(sampled(tiny, tmp_path / name, *tiny.w4a8, "--cali_ckpt", run / name)) == pictures(run)


# --dry_run and --recipe


def test_a_dry_run_prints_a_plan_and_writes_nothing(tiny, tmp_path):
    plan = yaml.safe_load(passed(call(SAMPLE, *tiny.sampling, *tiny.w4a8, *tiny.quick, "-l", "out", "--dry_run")).out)
    assert outputs(tmp_path) == {}
    assert (plan["images"], plan["sampler"], plan["timesteps"]) == (3, "generalized", [750, 500, 250, 0])
    assert plan["calibration_data"] == "made by this run" and plan["folder"] == "out/samples/<date-time>"
    assert plan["recipe"]["weights"]["bits"] == 4 and plan["recipe"]["activations"]["kind"] == "signed"
    plan = yaml.safe_load(passed(call(SAMPLE, *tiny.sampling, "--dry_run")).out)
    assert "recipe" not in plan and plan["calibration_data"] is None


@pytest.fixture
def recipe(tiny, tmp_path):
    """(changes) -> the file of the recipe that the flags make, with some fields changed."""
    plan = yaml.safe_load(passed(call(SAMPLE, *tiny.sampling, *tiny.w4a8, *tiny.quick, "--dry_run")).out)

    def write(**changes):
        (tmp_path / "recipe.yml").write_text(yaml.safe_dump(plan["recipe"] | changes, sort_keys=False))
        return tmp_path / "recipe.yml"

    return write


@pytest.mark.parametrize("beside", [("--ptq",), "w4a8"], ids=["alone", "beside-the-flags"])
def test_a_printed_recipe_given_back_gives_the_same_plan(tiny, recipe, beside):
    flags = (*tiny.sampling, "--dry_run", "-l", "out")
    expected = passed(call(SAMPLE, *flags, *tiny.w4a8, *tiny.quick)).out
    beside = tiny.w4a8 if beside == "w4a8" else beside
    assert passed(call(SAMPLE, *flags, *beside, "--recipe", recipe())).out == expected


def test_a_printed_recipe_given_back_gives_the_same_bytes(tiny, recipe, calibrated, tmp_path):
    assert outputs(sampled(tiny, tmp_path / "out", "--ptq", "--recipe", recipe())) == outputs(calibrated.folder)


def test_flags_beside_a_recipe_replace_its_values(tiny, recipe):
    flags = ("--weight_bit", 5, "--act_bit", 6, "--sm_abit", 7, "--cali_st", 2, "--cali_n", 1)
    changed = recipe(split_shortcuts=False, activations={"bits": 8, "kind": "affine", "axis": "tensor"})
    result = call(SAMPLE, *tiny.sampling, "--ptq", *flags, "--a_sym", "--split", "--recipe", changed, "--dry_run")
    found = yaml.safe_load(passed(result).out)["recipe"]
    assert (found["weights"]["bits"], found["softmax"]["bits"], found["split_shortcuts"]) == (5, 7, True)
    assert found["activations"] == {"bits": 6, "kind": "signed", "axis": "tensor"}
    assert (found["selector"]["steps"], found["selector"]["per_step"]) == (2, 1)


def test_a_recipe_that_ckpt_pth_cannot_express_still_gives_ckpt_safetensors(tiny, recipe, tmp_path):
    """And what sets it apart is in the file: the images come back."""
    changed = recipe(rules=[{"pattern": "conv_in", "weight_bits": 8}, {"pattern": "conv_out", "act_bits": 0}])
    result = call(SAMPLE, *tiny.sampling, "--ptq", "--recipe", changed, "-l", "out")
    assert result.code == 0 and len(result.complaints) == 1
    assert "no ckpt.pth" in result.complaints[0] and "conv_in has 8 bits" in result.complaints[0]
    run = only_run(tmp_path / "out")
    assert sorted(outputs(run)) == FILES[1:]
    resumed = sampled(tiny, tmp_path / "resumed", *tiny.w4a8, "--cali_ckpt", run / "ckpt.safetensors")
    assert pictures(resumed) == pictures(run)


@pytest.mark.parametrize(
    "name", ["method", "cali_iters", "cali_batch_size", "compat", "rounding_start", "running_stat"]
)
def test_flags_that_a_recipe_holds_are_refused_beside_it(tiny, recipe, tmp_path, name):
    value = {"method": ["quick"], "compat": ["train_mode"], "rounding_start": ["gptq"], "running_stat": []}
    flags = (f"--{name}", *value.get(name, [5]))
    path = recipe()
    refused(call(SAMPLE, *tiny.sampling, "--ptq", "--recipe", path, *flags), f"--{name}", path)
    assert sorted(outputs(tmp_path)) == ["recipe.yml"]

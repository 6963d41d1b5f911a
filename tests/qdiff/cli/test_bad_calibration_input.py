"""What a user may get wrong with calibration data, output folders and recipes: exit code 2, one line, and no file."""

import shutil

import pytest
import torch
import yaml
from running import call, passed, refused, shorten, tree

from qdiff.calibration.trajectories import Trajectories, save_shard

SAMPLE = "sample_diffusion_ddim"


# Calibration data


def states(steps=4, samples=3, shape=(3, 16, 16), **changes):
    return {"xs": torch.zeros(steps, samples, *shape), "ts": torch.zeros(steps, samples)} | changes


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (states(shape=(3, 32, 32)), ("(3, 16, 16)", "(3, 32, 32)")),
        (states(shape=(4, 16, 16)), ("(3, 16, 16)", "(4, 16, 16)")),
        (states(shape=(3, 16)), ("[N, C, H, W]", "(3, 3, 16)")),
        (states(steps=1), ("--cali_st 2", "1 steps")),
        (states(samples=1), ("--cali_n 2", "1 samples")),
        (states(samples=0), ("[N, C, H, W]", "(0, 3, 16, 16)")),
        (states(steps=0), ("steps", "'xs': 0")),
        (states(ts=torch.zeros(3, 3)), ("steps", "'ts': 3")),
        (states(ts=torch.zeros(4)), ("ts [N]", "()")),
        (states(xs=torch.full((4, 3, 3, 16, 16), float("nan"))), ("finite",)),
        (states(xs=5), ("xs", "list of tensors")),
        (states(xs=["a"] * 4), ("xs", "list of tensors")),
        ({"xs": torch.zeros(4, 3, 3, 16, 16)}, ("xs and ts", "['xs']")),
        ([1], ("xs and ts", "list")),
    ],
    ids=str,
)
def test_calibration_data(tiny, fails, tmp_path, content, names):
    torch.save(content, tmp_path / "data.pt")
    line = fails("--ptq", *tiny.nearest, "--cali_data_path", "data.pt", names=names)
    assert "data.pt" in line or "calibration data" in line


def times(*values):
    """Three samples at those times."""
    return torch.tensor(values).repeat_interleave(3).view(-1, 3)


RANGES = {
    "divided": ({"ts": times(0.9, 0.6, 0.3, 0.0)}, ("0 ... 999", "0 ... 0.9", "divided by 1000")),
    "between": ({"ts": times(900.0, 600.5, 300.0, 0.0)}, ("whole timesteps", "600.5", "dpm_solver")),
    "beyond": ({"ts": times(1000, 600, 300, 0)}, ("0 ... 999", "0 ... 1000")),
    "far-beyond": ({"ts": times(10**12, 600, 300, 0)}, ("0 ... 999", "0 ... 1e+12")),
    "negative": ({"ts": times(900.0, 600.0, 300.0, -1.0)}, ("0 ... 999", "-1 ... 900")),
    "bytes": ({"xs": torch.zeros(4, 3, 3, 16, 16, dtype=torch.uint8)}, ("floats", "torch.uint8")),
    "integers": ({"xs": torch.zeros(4, 3, 3, 16, 16, dtype=torch.int64)}, ("floats", "torch.int64")),
    "complex-times": ({"ts": times(900, 600, 300, 0).to(torch.complex64)}, ("numbers", "torch.complex64")),
    "infinite": ({"xs": torch.full((4, 3, 3, 16, 16), float("inf"))}, ("finite",)),
    "no-time": ({"ts": times(900.0, 600.0, float("nan"), 0.0)}, ("finite",)),
}


@pytest.mark.parametrize("layout", ["file", "shard"])
@pytest.mark.parametrize(("changes", "names"), RANGES.values(), ids=RANGES)
def test_calibration_data_out_of_range(tiny, fails, tmp_path, changes, names, layout):
    content = states(ts=times(900.0, 600.0, 300.0, 0.0)) | changes
    if layout == "file":
        path = tmp_path / "data.pt"
        torch.save(content, path)
    else:
        path = tmp_path / "shard_00000.safetensors"
        save_shard(Trajectories(tuple(content["xs"]), tuple(content["ts"]), {}), path, {})
    fails("--ptq", *tiny.nearest, "--cali_data_path", path, names=(path, *names))


def test_times_between_steps_are_right_for_dpm_solver_alone(tiny, tmp_path):
    torch.save(states(ts=times(999.0, 749.25, 499.5, 249.75)), "data.pt")
    flags = (*tiny.sampling, "--sample_type", "dpm_solver", "--ptq", *tiny.nearest, "--cali_data_path", "data.pt")
    passed(call(SAMPLE, *flags, "-l", tmp_path / "out"))
    torch.save(states(ts=times(0.9, 0.6, 0.3, 0.0)), "data.pt")  # as little as for other samplers
    refused(call(SAMPLE, *flags, "-l", tmp_path / "other"), "data.pt", "divided by 1000")


def test_calibration_data_that_are_not_there(tiny, fails, tmp_path):
    flags = ("--ptq", *tiny.nearest, "--cali_data_path")
    fails(*flags, "nope.pt", names=("nope.pt", "no such"))
    fails(*flags, tmp_path, names=(tmp_path, "shard_", "found none"))
    fails(*flags, tiny.weights, names=(tiny.weights, "expected a trajectory shard"))
    fails(*flags, tiny.config, names=(tiny.config, "not a readable"))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize("form", ["file", "shards"])
def test_truncated_calibration_data(tiny, fails, data, tmp_path, form, share):
    if form == "file":
        damaged = path = shorten(data.file, tmp_path / "data.pt", share)
    else:
        path = shutil.copytree(data.shards, tmp_path / "shards")
        damaged = shorten(data.shards / "shard_00001.safetensors", path / "shard_00001.safetensors", share)
    fails("--ptq", *tiny.nearest, "--cali_data_path", path, names=(damaged, "not a readable"))


def test_calibration_data_whose_recording_was_interrupted(tiny, fails, data, tmp_path):
    path = shutil.copytree(data.shards, tmp_path / "shards")
    for gone, found in ((1, 3), (2, 2)):
        (path / f"shard_{gone:05d}.safetensors").unlink()
        fails("--ptq", *tiny.nearest, "--cali_data_path", path, names=(path, "expected 5 samples", f"found {found}"))


def test_calibration_data_of_two_recordings(tiny, fails, data, tmp_path):
    flags = (*data.flags, "--seed", 1)
    assert call("make_calibration_data", *flags, "--out", tmp_path / "other").code == 0
    path = shutil.copytree(data.shards, tmp_path / "shards")
    shutil.copy(tmp_path / "other" / "shard_00002.safetensors", path)
    fails("--ptq", *tiny.nearest, "--cali_data_path", path, names=("shard_00002", "shard_00000", "other settings"))


@pytest.mark.parametrize("form", ["shards", "file"])
def test_too_few_steps_or_samples(tiny, fails, data, form):
    path = getattr(data, form)
    flags = ("--ptq", "--method", "nearest", "--cali_data_path", path)
    fails(*flags, "--cali_st", 5, "--cali_n", 2, names=("--cali_st 5", "4 steps"))
    fails(*flags, "--cali_st", 2, "--cali_n", 6, names=("--cali_n 6", "5 samples"))
    fails("--ptq", "--cali_data_path", path, names=("--cali_n 1024", "5 samples"))


# The output folder


@pytest.mark.parametrize("work", ["float", "calibrating", "resuming"])
@pytest.mark.parametrize("out", ["a-file", "a-file/out"])
def test_an_output_folder_that_cannot_be_made(tiny, calibrated, tmp_path, work, out):
    (tmp_path / "a-file").touch()
    flags = {
        "float": (),
        "calibrating": ("--ptq", *tiny.nearest),
        "resuming": (*tiny.w4a8, "--cali_ckpt", calibrated.folder / "ckpt.pth"),
    }[work]
    result = call(SAMPLE, *tiny.sampling, *flags, "-l", out)
    refused(result, out)
    assert result.bars == [] and tree(tmp_path) == {"a-file": b""}


# Recipes


@pytest.fixture
def printed(tiny):
    """The recipe that the flags make, as plain data."""
    return yaml.safe_load(call(SAMPLE, *tiny.sampling, *tiny.w4a8, *tiny.quick, "--dry_run").out)["recipe"]


def fields(**changes):
    return lambda recipe: recipe | changes


def stages(*numbers):
    return lambda recipe: recipe | {"stages": [recipe["stages"][i] for i in numbers]}


WRONG_RECIPES = {
    "unknown-field": (fields(wieghts=4), ("expected one of name, weights", "'wieghts'")),
    "unknown-field-within": (fields(weights={"bits": 4, "width": 1}), ("recipe.weights", "'width'")),
    "no-mapping": (fields(weights=4), ("recipe.weights", "a mapping", "4")),
    "no-number": (fields(weights={"bits": "4"}), ("recipe.weights.bits", "int", "'4'")),
    "no-list": (fields(stages={"stage": "compensate"}), ("recipe.stages", "a list")),
    "missing-field": (fields(weights={"kind": "affine"}), ("recipe.weights", "bits is missing")),
    "missing-name": (lambda recipe: {"weights": recipe["weights"]}, ("name is missing",)),
    "9-bits": (fields(weights={"bits": 9}), ("weights.bits", "9")),
    "kind": (fields(weights={"bits": 4, "kind": "odd"}), ("kind", "affine", "'odd'")),
    "no-steps": (fields(selector={"steps": 0}), ("selector.steps", "0")),
    "too-many-steps": (fields(selector={"steps": 9}), ("--cali_st 9", "4 steps")),
    "unknown-stage": (fields(stages=[{"stage": "magic"}]), ("recipe.stages[0]", "reconstruct", "'magic'")),
    "unnamed-stage": (fields(stages=[{"damping": 1}]), ("recipe.stages[0]", "None")),
    "no-stages": (stages(), ("stages", "weight_ranges")),
    "no-weight-ranges": (stages(1, 2, 3), ("stages", "weight_ranges")),
    "no-activation-ranges": (stages(0, 1), ("stages", "activation_ranges")),
    "reversed": (stages(3, 2, 1, 0), ("stages[0]", "weight_ranges before reconstruct")),
    "scales-before-ranges": (stages(0, 3, 2), ("stages[1]", "activation_ranges before")),
    "rule-for-nothing": (fields(rules=[{"pattern": "nosuch*", "weight_bits": 8}]), ("'nosuch*'", "conv_in")),
    "rule-of-1-bit": (fields(rules=[{"pattern": "*", "weight_bits": 1}]), ("weight_bits", "1")),
    "too-many-groups": (fields(step_groups={"count": 5}), ("step_groups", "5", "4")),
    "unknown-fault": (fields(compat=["magic"]), ("compat", "'magic'")),
    "float-activations": (fields(activations=None, softmax=None), ("--quant_act", "leaves activations float")),
    "list": (lambda recipe: ["name"], ("a mapping", "name")),
    "empty": (lambda recipe: None, ("a mapping", "None")),
}


@pytest.mark.parametrize("name", WRONG_RECIPES)
def test_wrong_recipes(tiny, fails, printed, tmp_path, name):
    change, names = WRONG_RECIPES[name]
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(change(printed), sort_keys=False))
    fails(*tiny.w4a8, "--recipe", "recipe.yml", names=names)


@pytest.mark.parametrize(
    "text",
    ["a: [1", "a: b: c", "!!python/object/apply:os.getcwd []", "\x00"],
    ids=["list", "colons", "python", "binary"],
)
def test_recipes_that_are_not_yaml(fails, tmp_path, text):
    (tmp_path / "recipe.yml").write_text(text)
    fails("--ptq", "--recipe", "recipe.yml", names=("recipe.yml: not a recipe",))


def test_a_recipe_that_is_not_there(fails, tmp_path):
    fails("--ptq", "--recipe", "nope.yml", names=("--recipe nope.yml", "no such file"))
    fails("--ptq", "--recipe", tmp_path, names=(f"--recipe {tmp_path}", "no such file"))

"""--help: every script has it, it is complete, and the defaults it shows are those that a run takes."""

import re
from pathlib import Path

import pytest
import yaml
from running import call, passed

from qdiff.cli.sample import ddim as sample_diffusion_ddim
from qdiff.cli.sample import ldm as sample_diffusion_ldm
from qdiff.cli.sample import txt2img
from qdiff.families.ldm.config import read_config
from qdiff.families.ldm.source import downsampling

SCRIPTS = {
    "make_calibration_data": (),
    "sample_diffusion_ddim": (),
    "sample_diffusion_ldm": (),
    "txt2img": (),
    "check_prompts": (),
    "compare_methods": (),
    "check_checkpoint": (),
    "sensitivity": (),
    "evaluate": (),
    "benchmark": ("simulate",),
    "export": (),
}


def help_of(script, *command):
    """{flag: its help text on one line}"""
    text = " ".join(passed(call(script, *command, "--help")).out.split("options:", 1)[1].split())
    return {entry.split()[0].rstrip(","): entry for entry in re.split(r"\s(?=--?[a-z])", text)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = passed(call(script, *SCRIPTS[script], "--help")).out
    assert "(default: None)" not in text and "(default: False)" not in text and "(default: ())" not in text
    assert text.count("default: a GPU if any") <= 1 and max(map(len, text.splitlines())) <= 100
    assert not re.search(r"^ +--\w+( [A-Z_]+)?$\n(?! {10})", text, re.MULTILINE)  # a flag without a word about it


def test_the_original_flags_are_all_there():
    """Names and defaults of the Q-Diffusion repository's script."""
    args = vars(sample_diffusion_ddim.parse_args(["--config", "x.yml"]))
    expected = {
        "seed": 1234,
        "logdir": "none",
        "sample_type": "generalized",
        "skip_type": "uniform",
        "timesteps": 1000,
        "eta": 0.0,
        "max_images": 50000,
        "quant_mode": "qdiff",
    }
    expected |= dict.fromkeys(("use_pretrained", "sequence", "ptq", "quant_act", "resume", "resume_w", "cond"), False)
    expected |= dict.fromkeys(("a_sym", "running_stat", "split", "verbose"), False)
    expected |= dict.fromkeys(("cali_ckpt", "cali_data_path"))
    assert {name: args[name] for name in expected} == expected
    assert sample_diffusion_ddim.parse_args(["--config", "x.yml", "-l", "out"]).logdir == "out"


QUANTIZATION = {"quant_mode": "qdiff"} | dict.fromkeys(("cali_ckpt", "cali_data_path"))
QUANTIZATION |= dict.fromkeys(("ptq", "quant_act", "resume", "resume_w", "a_sym", "running_stat"), False)
QUANTIZATION |= dict.fromkeys(("split", "rs_sm_only", "a_min_max", "cond", "verbose"), False)


def test_the_flags_for_latent_models_are_all_there():
    args = vars(sample_diffusion_ldm.parse_args(["--resume_base", "x", "--seed", "1"]))
    expected = {"n_samples": 50000, "eta": 1.0, "logdir": "none", "custom_steps": 50, "batch_size": 10}
    expected |= {"vanilla_sample": False, "dpm": False, **QUANTIZATION}
    assert {name: args[name] for name in expected} == expected
    short = ["-r", "x", "-n", "3", "-e", "0", "-l", "out", "-c", "20", "--seed", "1"]
    long = ["--resume_base", "x", "--n_samples", "3", "--eta", "0", "--logdir", "out", "--custom_steps", "20"]
    assert sample_diffusion_ldm.parse_args(short) == sample_diffusion_ldm.parse_args([*long, "--seed", "1"])
    assert sample_diffusion_ldm.parse_args([*short, "-v"]).vanilla_sample


def test_the_flags_for_text_to_image_models_are_all_there():
    """--config, --H, --W, --C and --f are by default the model's own: for Stable Diffusion, the original's."""
    args = vars(txt2img.parse_args(["--prompt", "a cat"]))
    expected = {"ddim_steps": 50, "ddim_eta": 0.0, "n_iter": 2, "n_samples": 3, "n_rows": 0, "scale": 7.5, "seed": 42}
    expected |= dict.fromkeys(("skip_grid", "skip_save", "plms", "laion400m", "fixed_code", "no_grad_ckpt"), False)
    expected |= dict.fromkeys(("from_file", "H", "W", "C", "f", "config")) | {"precision": "autocast", **QUANTIZATION}
    assert {name: args[name] for name in expected} == expected
    assert str(args["outdir"]) == "outputs/txt2img-samples"
    assert str(args["ckpt"]) == "models/ldm/stable-diffusion-v1/model.ckpt"
    published = read_config(Path(__file__).parents[3] / txt2img.CONFIG)
    params, factor = published.model.params, downsampling(published)
    assert (params.image_size * factor, params.channels, factor) == (512, 4, 8)
    given = ["--H", "8", "--W", "8", "--C", "4", "--f", "2", "--precision", "full", "--from-file", "x"]
    assert vars(txt2img.parse_args(given))["f"] == 2


def test_what_left_out_flags_mean(tiny):
    """The original's defaults, as the help says them."""
    flags = (*tiny.model, "--timesteps", 4, "--ptq", "--quant_act", "--dry_run")
    recipe = yaml.safe_load(passed(call("sample_diffusion_ddim", *flags)).out)["recipe"]
    rounding, scales = (stage for stage in recipe["stages"] if stage["stage"] == "reconstruct")
    found = {
        "--weight_bit": recipe["weights"]["bits"],
        "--act_bit": recipe["activations"]["bits"],
        "--sm_abit": recipe["softmax"]["bits"],
        "--cali_st": recipe["selector"]["steps"],
        "--cali_n": recipe["selector"]["per_step"],
        "--cali_iters": rounding["iterations"],
        "--cali_iters_a": scales["iterations"],
        "--cali_batch_size": rounding["batch_size"],
        "--cali_lr": scales["learn"]["scale"]["rate"],
        "--cali_p": scales["loss"]["p"],
    }
    assert list(found.values()) == [8, 8, 8, 1, 1024, 20000, 5000, 32, 4e-4, 2.4]
    texts = help_of("sample_diffusion_ddim")
    for flag, value in found.items():
        assert float(re.search(r"\(default: ([\d.e-]+)\)", texts[flag])[1]) == value, texts[flag]

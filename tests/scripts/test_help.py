"""--help: every script has it, it is complete, and the defaults it shows are those that a run takes."""

import re

import pytest
import sample_diffusion_ddim
import yaml
from running import call, passed

SCRIPTS = {
    "make_calibration_data": (),
    "sample_diffusion_ddim": (),
    "compare_methods": (),
    "check_checkpoint": (),
    "benchmark": ("simulate",),
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

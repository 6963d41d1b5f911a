"""--runtime: the same images however the quantized network computes, and what is said where it cannot."""

import argparse
import re

import pytest
import torch
import yaml
from latents import all_pixels, sample_ldm, txt2img
from running import call, only_run, passed, pictures, refused, tree
from torch import nn

from qdiff.cli.errors import told
from qdiff.cli.flags import check_runtime_flags
from qdiff.cli.runs import run as latent_model
from qdiff.deploy.runtime import RUNTIMES
from qdiff.evaluation.similarity import pooled_psnr_db
from qdiff.nn.layers import quant_layers

SAMPLE = "sample_diffusion_ddim"
LATENT = ("--ptq", "--weight_bit", 8, "--quant_act", "--act_bit", 8)
NEAREST = ("--method", "nearest", "--cali_st", 2, "--cali_n", 2)
CALIBRATED = ("--ptq", "--quant_act", "--cali_ckpt")


# Float noise moves codes across ties, and a network with random weights makes of one such code what quantization makes
# of all: its images agree to some 25 dB, a trained network's or one with float activations to 50 and more.
TIES = 20


def psnr_db(found, expected):
    """PSNR of runs' images, infinite for the same ones."""
    one, other = (torch.stack(images).permute(0, 3, 1, 2).float() / 255 for images in (found, expected))
    return float("inf") if torch.equal(one, other) else pooled_psnr_db(one, other)


@pytest.fixture(scope="module")
def packed(calibrated):
    return calibrated.folder / "ckpt.safetensors"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_pixel_images_are_those_of_the_simulation(tiny, calibrated, packed, tmp_path, runtime):
    flags = (*tiny.sampling, *CALIBRATED, packed, "--runtime", runtime, "-l", "out")
    result = passed(call(SAMPLE, *flags))
    assert psnr_db(all_pixels(only_run(tmp_path / "out"), "img"), all_pixels(calibrated.folder, "img")) > TIES
    log = (only_run(tmp_path / "out") / "run.log").read_text()
    assert f"runtime: {runtime}" in log
    if runtime == "auto":
        (line,) = re.findall(r"runtime auto: .*; taking \w+", result.out)
        assert "simulate" in line and "onnx" in line and line in log


def test_auto_decides_once_on_a_machine(tiny, packed, tmp_path, own_cache):
    """So that the same command gives the same images, however busy the machine is."""
    first, second = (
        passed(call(SAMPLE, *tiny.sampling, *CALIBRATED, packed, "--runtime", "auto", "-l", out)).out for out in "ab"
    )
    assert "measured before" not in first and "measured before; taking" in second
    assert pictures(only_run(tmp_path / "a")) == pictures(only_run(tmp_path / "b"))


def test_a_calibration_goes_on_in_its_runtime(tiny, tmp_path):
    """As a run does that loads what it wrote."""
    passed(call(SAMPLE, *tiny.sampling, *tiny.w4a8, *NEAREST, "--runtime", "onnx", "-l", "made"))
    run = only_run(tmp_path / "made")
    flags = (*CALIBRATED, run / "ckpt.safetensors", "--runtime", "onnx", "-l", "loaded")
    passed(call(SAMPLE, *tiny.sampling, *flags))
    assert pictures(run) == pictures(only_run(tmp_path / "loaded"))


def test_weights_alone(tiny, packed, tmp_path):
    """Activations stay float without --quant_act, in every runtime."""
    images = {}
    for runtime in ("simulate", "integer", "onnx"):
        flags = ("--ptq", "--cali_ckpt", packed, "--runtime", runtime, "-l", runtime)
        assert "W4A32" in passed(call(SAMPLE, *tiny.sampling, *flags)).out
        images[runtime] = all_pixels(only_run(tmp_path / runtime), "img")
    assert psnr_db(images["integer"], images["simulate"]) > 50 and psnr_db(images["onnx"], images["simulate"]) > 50


@pytest.fixture(scope="module")
def latent_runs(latent, tmp_path_factory):
    """Simulated runs that calibrate: of a class-conditional and a text-to-image model."""
    folder = tmp_path_factory.mktemp("runs")
    cin = sample_ldm(latent.cin, folder / "cin", "--classes", "0-2", "--scale", 2, *LATENT, *NEAREST)
    sd = txt2img(latent.sd, folder / "sd", "--prompt", "a cat", *LATENT, *NEAREST)
    return argparse.Namespace(cin=cin, sd=sd)


def test_latent_images_are_those_of_the_simulation(latent, latent_runs, tmp_path):
    flags = (*CALIBRATED, latent_runs.cin / "ckpt.safetensors", "--runtime", "integer")
    found = sample_ldm(latent.cin, tmp_path / "cin", "--classes", "0-2", "--scale", 2, *flags)
    assert psnr_db(all_pixels(found, "img"), all_pixels(latent_runs.cin, "img")) > TIES
    flags = (*CALIBRATED, latent_runs.sd / "ckpt.safetensors", "--runtime", "onnx")
    found = txt2img(latent.sd, tmp_path / "sd", "--prompt", "a cat", *flags)
    assert psnr_db(all_pixels(found), all_pixels(latent_runs.sd)) > TIES


def test_a_latent_run_holds_no_float_network(latent, latent_runs, tmp_path, monkeypatch):
    seen = []
    write_images = latent_model.write_images

    def watched(plan, model, network, *others):
        seen.extend([model.network, network])
        write_images(plan, model, network, *others)

    monkeypatch.setattr(latent_model, "write_images", watched)
    flags = (*CALIBRATED, latent_runs.sd / "ckpt.safetensors", "--runtime", "integer")
    txt2img(latent.sd, tmp_path / "sd", "--prompt", "a cat", *flags)
    held, network = seen
    assert isinstance(held, nn.Identity)
    assert not any(layer.weight_quantizers for layer in quant_layers(network).values())


def test_the_plan_says_how_it_runs(tiny, packed, tmp_path):
    def plan(*flags):
        return yaml.safe_load(passed(call(SAMPLE, *tiny.sampling, *CALIBRATED, packed, *flags, "--dry_run")).out)

    assert plan()["runtime"] == "simulate" and "prefer" not in plan()
    assert plan("--runtime", "onnx")["runtime"] == "onnx"
    found = plan("--runtime", "auto", "--prefer", "memory")
    assert (found["runtime"], found["prefer"]) == ("auto", "memory") and tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--runtime", "integer"), ("--runtime integer", "needs --ptq")),
        (("--runtime", "fast"), ("--runtime", "'fast'", "simulate", "onnx")),
        (("--ptq", "--runtime", "onnx", "--prefer", "memory"), ("--prefer memory", "--runtime auto", "onnx")),
        (("--prefer", "memory"), ("--prefer memory", "--runtime auto")),
    ],
    ids=str,
)
def test_flags_that_are_at_odds(tiny, latent, tmp_path, flags, names):
    before = tree(tmp_path)
    refused(call(SAMPLE, *tiny.sampling, *flags, "-l", "out"), *names)
    refused(call("sample_diffusion_ldm", "-r", latent.ldm.ckpt, "--seed", 1, *flags, "-l", "out"), *names)
    refused(call("txt2img", "--ckpt", latent.sd.ckpt, "--prompt", "a cat", *flags, "--outdir", "out"), *names)
    assert tree(tmp_path) == before


def test_onnx_on_a_gpu():
    args = argparse.Namespace(runtime="onnx", prefer="speed", ptq=True)
    with pytest.raises(ValueError) as error:
        check_runtime_flags(args, torch.device("cuda"))
    assert told(error.value).startswith("--runtime onnx: runs on the CPU, found cuda")


def test_onnx_without_its_packages(tiny, packed, tmp_path, monkeypatch):
    monkeypatch.setattr("qdiff.deploy.runtime.has_onnx_runtime", lambda: False)
    flags = (*tiny.sampling, *CALIBRATED, packed, "--runtime")
    refused(call(SAMPLE, *flags, "onnx", "-l", "out"), "--runtime onnx", "pip install '.[onnx]'")
    assert tree(tmp_path) == {}
    assert "taking simulate" in passed(call(SAMPLE, *flags, "auto", "-l", "out")).out


@pytest.mark.parametrize("runtime", ["integer", "onnx", "auto"])
@pytest.mark.parametrize("damage", ["truncated", "bit", "format"])
def test_a_damaged_file(tiny, packed, tmp_path, runtime, damage):
    path = tmp_path / "bad.safetensors"
    content = bytearray(packed.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "bit":
        content[-5] ^= 1
    else:
        content = content.replace(b"qdiff-checkpoint-2", b"qdiff-checkpoint-9")
    path.write_bytes(content)
    reason = {"truncated": "truncated", "bit": "damaged", "format": "qdiff-checkpoint-9"}[damage]
    before = tree(tmp_path)
    refused(call(SAMPLE, *tiny.sampling, *CALIBRATED, path, "--runtime", runtime, "-l", "out"), path, reason)
    assert tree(tmp_path) == before


def test_another_runtime_is_another_run(tiny, packed, tmp_path):
    """A run that was interrupted goes on in the runtime that it began with."""
    flags = (*tiny.sampling, *CALIBRATED, packed, "-l", "out")
    passed(call(SAMPLE, *flags))
    (only_run(tmp_path / "out") / "img" / "0.png").unlink()
    passed(call(SAMPLE, *flags, "--runtime", "onnx"))
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 2

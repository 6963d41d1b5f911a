"""evaluate.py on a model: images of a checkpoint and of its float model, gone on with; and what the model takes."""

import csv
import json

import pytest
import torch
from judging import evaluate
from latents import LDM, images, sample_ldm
from running import call, only_run, passed, pictures, refused

SAMPLING = ("--timesteps", 4, "--skip_type", "quad", "--max_images", 3, "--sample_batch_size", 2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test finds what another one kept, nor weights that lie on this machine."""
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def run32(tiny32, tmp_path_factory):
    """Runs of sample_diffusion_ddim.py, quantized and float: their folders."""
    logdir = tmp_path_factory.mktemp("run")
    flags = (*tiny32.sampling, "--skip_type", "quad")
    quantize = ("--ptq", "--quant_act", "--weight_bit", 4, "--method", "nearest", "--cali_st", 2, "--cali_n", 2)
    passed(call("sample_diffusion_ddim", *flags, *quantize, "-l", logdir / "quantized"))
    passed(call("sample_diffusion_ddim", *flags, "-l", logdir / "float"))
    return only_run(logdir / "quantized"), only_run(logdir / "float")


def bytes_of(folder):
    return [(folder / f"{i}.png").read_bytes() for i in range(len(list(folder.glob("*.png"))))]


def test_a_checkpoint_is_sampled_beside_its_float_model(tmp_path, tiny32, run32):
    quantized, floats = run32
    flags = (*tiny32.model, *SAMPLING, "--cali_ckpt", quantized / "ckpt.safetensors", "--outdir", tmp_path / "out")
    result, found, _ = evaluate(tmp_path, *flags)
    assert bytes_of(tmp_path / "out" / "images") == pictures(quantized)
    assert bytes_of(tmp_path / "out" / "float") == pictures(floats)
    assert result.bars == ["images", "float images", "features", "pairs"]
    _, expected, _ = evaluate(tmp_path, quantized, "--float", floats)
    assert found == expected and "psnr" in found and "fd_float" in found
    assert json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    # Once more: nothing is sampled; a missing image is.
    again, same, _ = evaluate(tmp_path, *flags)
    assert same == found and again.bars == ["features", "pairs"]
    (tmp_path / "out" / "images" / "2.png").unlink()
    third, same, _ = evaluate(tmp_path, *flags)
    assert same == found and third.bars == ["images", "features", "pairs"]
    line = refused(call("evaluate", *flags, "--seed", 5), tmp_path / "out" / "images", "another run", "seed")
    assert "--outdir" in line


def test_the_float_model_alone(tmp_path, tiny32, run32):
    _, floats = run32
    result, found, _ = evaluate(tmp_path, *tiny32.model, *SAMPLING, "--outdir", tmp_path / "out", "--metrics", "fd")
    assert bytes_of(tmp_path / "out" / "images") == pictures(floats) and not (tmp_path / "out" / "float").exists()
    assert found.keys() == {"fd"}


def test_given_float_images_are_taken(tmp_path, tiny32, run32):
    quantized, floats = run32
    flags = (*tiny32.model, *SAMPLING, "--cali_ckpt", quantized / "ckpt.safetensors", "--float", floats)
    result, found, _ = evaluate(tmp_path, *flags, "--outdir", tmp_path / "out", "--metrics", "psnr")
    assert result.bars == ["images", "pairs"] and "psnr" in found


def test_the_integer_runtime(tmp_path, tiny32, run32):
    """The images are those that the sampling script makes with it."""
    quantized, floats = run32
    loads = ("--cali_ckpt", quantized / "ckpt.safetensors", "--runtime", "integer")
    flags = (*tiny32.model, *SAMPLING, *loads, "--float", floats, "--outdir", tmp_path / "out", "--metrics", "psnr")
    evaluate(tmp_path, *flags)
    passed(
        call(
            "sample_diffusion_ddim",
            *tiny32.sampling,
            "--skip_type",
            "quad",
            "--ptq",
            "--quant_act",
            *loads,
            "-l",
            tmp_path / "run",
        )
    )
    assert bytes_of(tmp_path / "out" / "images") == pictures(only_run(tmp_path / "run"))


def test_a_latent_model(tmp_path, latent):
    run = sample_ldm(latent.ldm, tmp_path / "run")
    flags = ("-r", latent.ldm.folder, "--timesteps", 4, "--seed", 41, "--max_images", 3, "--sample_batch_size", 2)
    _, found, _ = evaluate(tmp_path, *flags, "--outdir", tmp_path / "out", "--float", run)
    assert bytes_of(tmp_path / "out" / "images") == list(images(run, "img").values())
    assert found == {"psnr": None, "psnr_mean": None, "ssim": pytest.approx(1)} and LDM[-1] == 41


def test_a_text_model_brings_its_prompts(tmp_path, latent):
    flags = ("-r", latent.sd.folder, "--prompt", "a cat", "--timesteps", 2, "--scale", 1, "--max_images", 2)
    result, _, _ = evaluate(tmp_path, *flags, "--outdir", tmp_path / "out", "--metrics", "accuracy")
    assert "left out: accuracy: the bundled classifier takes images of 32x32" in result.out


def test_bad_checkpoints_are_one_line(tmp_path, tiny, tiny32, run32):
    checkpoint = run32[0] / "ckpt.safetensors"
    refused(call("evaluate", *tiny.model, "--cali_ckpt", checkpoint, "--outdir", tmp_path / "out"), "another network")
    refused(call("evaluate", *tiny.model, "--cali_ckpt", tmp_path / "absent.safetensors"), "absent.safetensors")
    refused(call("evaluate", *tiny.model, "--cali_ckpt", run32[0] / "ckpt.pth"), "expected a packed .safetensors")
    refused(call("evaluate", *tiny.model, "--runtime", "integer"), "--runtime integer")
    (tmp_path / "strange" / "images").mkdir(parents=True)
    (tmp_path / "strange" / "images" / "0.png").write_bytes(b"")
    refused(call("evaluate", *tiny.model, "--outdir", tmp_path / "strange"), "not made by this script")


def test_the_plan(tiny32, tmp_path):
    result = passed(call("evaluate", *tiny32.model, *SAMPLING, "--outdir", tmp_path / "out", "--dry_run"))
    assert "sampling:" in result.out and "skip_type: quad" in result.out and not (tmp_path / "out").exists()


def rows(out):
    """The table's rows: {model: its cells}."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_the_cost_of_the_published_model(tmp_path):
    from latents import BUNDLED

    config = BUNDLED.parent / "configs" / "cifar10.yml"
    found = rows(passed(call("evaluate", "--cost", "--config", config, "--outdir", tmp_path)).out)
    published = {"float32": 6597, "all 8/32": 2294, "all 4/32": 1147, "all 8/8": 798, "all 4/8": 399}
    for name, gbops in published.items():
        assert float(found[name]["GBops as in papers"]) == pytest.approx(gbops, rel=0.01)
    assert found["float32"]["parameters (M)"] == "35.75" and found["all 4/8"]["weights (MB)"] == "17.9"
    with (tmp_path / "cost.csv").open(newline="") as file:
        layers = list(csv.DictReader(file))
    total = sum(int(layer["bops"]) for layer in layers)
    assert total / 1e9 == pytest.approx(float(found["float32"]["GBops as in papers"]), abs=0.5)
    assert {layer["kind"] for layer in layers} == {"conv", "linear", "attention"}
    assert json.loads((tmp_path / "cost.json").read_text())["layers"][0]["name"] == "temb.dense.0"


def test_the_cost_of_a_checkpoint(tiny32, run32):
    checkpoint = run32[0] / "ckpt.safetensors"
    found = rows(passed(call("evaluate", "--cost", "--config", tiny32.config, "--cali_ckpt", checkpoint)).out)
    row = found["ckpt.safetensors"]
    assert float(row["file (MB)"]) == pytest.approx(checkpoint.stat().st_size / 1e6, abs=0.05)
    assert float(row["GBops"]) >= float(row["GBops as in papers"])  # attention's operands have 8 bits each
    assert row["GBops as in papers"] == found["all 4/8"]["GBops as in papers"]
    assert float(row["weights (MB)"]) < 0.2 * float(found["float32"]["weights (MB)"])


def test_the_cost_of_a_latent_configuration(latent):
    found = rows(passed(call("evaluate", "--cost", "--config", latent.sd.config)).out)
    for named in (latent.sd.folder, latent.sd.ckpt):
        assert rows(passed(call("evaluate", "--cost", "-r", named)).out) == found
    assert found["float32"]["parameters (M)"] == f"{_parameters(latent.sd.state) / 1e6:.2f}"


def _parameters(state: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() for key, value in state.items() if key.startswith("model.diffusion_model."))


def test_the_cost_of_another_model_is_refused(tiny, run32):
    checkpoint = run32[0] / "ckpt.safetensors"
    refused(call("evaluate", "--cost", "--config", tiny.config, "--cali_ckpt", checkpoint), checkpoint, "made for")

"""export.py: what it writes is what it read, in the format that was asked for, or nothing."""

import json
import re

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from latents import CONFIGS
from running import call, only_run, passed, refused, tree
from safetensors.torch import load_file

from qdiff.checkpoints.native import load_checkpoint, read_about
from qdiff.deploy.runtime import load

LATENT = ("--ptq", "--weight_bit", 8, "--quant_act", "--act_bit", 8)
NEAREST = ("--method", "nearest", "--cali_st", 2, "--cali_n", 2)


@pytest.fixture(scope="module")
def packed(calibrated):
    return calibrated.folder / "ckpt.safetensors"


@pytest.fixture(scope="module")
def text(latent, tmp_path_factory):
    """The packed file of a calibrated text-to-image model."""
    out = tmp_path_factory.mktemp("text")
    flags = ("--prompt", "a cat", "--n_samples", 1, "--n_iter", 1, "--ddim_steps", 2, "--skip_grid")
    passed(call("txt2img", "--ckpt", latent.sd.ckpt, *flags, *LATENT, *NEAREST, "--outdir", out))
    (folder,) = out.iterdir()
    return folder / "ckpt.safetensors"


@pytest.fixture(scope="module")
def grouped(tiny, tmp_path_factory):
    """The packed file of a model with two parameter sets, for groups of steps."""
    out = tmp_path_factory.mktemp("grouped")
    flags = (*tiny.w4a8, *NEAREST, "--set", "step_groups.count=2", "-l", out)
    assert call("sample_diffusion_ddim", *tiny.sampling, "--max_images", 1, *flags).code == 0  # warns: no ckpt.pth
    return only_run(out) / "ckpt.safetensors"


def export(source, kind, out, *flags):
    """Standard output of an export that succeeds."""
    return passed(call("export", "--cali_ckpt", source, "--format", kind, "--out", out, *flags)).out


def recipe_of(state):
    return json.loads(state._metadata[""]["qdiff_recipe"])


def same_tensors(one, other):
    found, expected = load_file(one), load_file(other)
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_packed_from_the_original_format(tiny, calibrated, packed, published, tmp_path):
    out = export(calibrated.folder / "ckpt.pth", "packed", "new/", *tiny.model[:2], *tiny.w4a8[1:])
    assert same_tensors(tmp_path / "new" / "ckpt.safetensors", packed) and "new/ckpt.safetensors: W4A8" in out
    # Without the recipe that files of ours bring: an unsigned softmax grid is half of a signed one.
    export(published.both, "packed", "two.safetensors", *tiny.model[:2], *tiny.w4a8[1:], "--sm_abit", 9)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3, 700])
    expected = load_checkpoint(packed).network(x, t)
    assert torch.allclose(load_checkpoint("two.safetensors").network(x, t), expected, atol=1e-4)
    assert read_about("two.safetensors")["source"] == "both.pth"
    assert {path.name for path in tmp_path.iterdir()} == {"new", "two.safetensors"}


def test_packed_anew_with_a_policy_for_attention(packed, tmp_path):
    out = export(packed, "packed", "float.safetensors", "--attention", "float")
    assert same_tensors("float.safetensors", packed)
    assert read_about("float.safetensors") == read_about(packed) | {"attention": "float"}
    export("float.safetensors", "packed", "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "float.safetensors").read_bytes()
    size, about = (tmp_path / "float.safetensors").stat().st_size, read_about(packed)
    whole = 4 * sum(p.numel() for p in load_checkpoint(packed).adapter.build(about["config"]).parameters())
    assert f"W4A8, {size / 2**20:.2f} MiB, 1/{whole / size:.2f} of the {whole / 2**20:.2f} MiB of float32" in out


def test_the_original_format_from_packed(tiny, calibrated, packed, tmp_path):
    out = export(packed, "qdiffusion", "back.pth", *tiny.model)
    found, expected = (torch.load(f, weights_only=True) for f in ("back.pth", calibrated.folder / "ckpt.pth"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert recipe_of(found) == recipe_of(expected)
    assert "the original code reads it with --weight_bit 4 --split --quant_act --act_bit 8 --a_sym" in out


@pytest.mark.parametrize("kind", ["onnx", "onnx-portable", "onnx-portable-4bit"])
def test_onnx(packed, tmp_path, kind):
    out = export(packed, kind, "out")
    assert "weights have zero points" not in out and ("TensorRT" in out) == (kind == "onnx-portable")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "ckpt.onnx")
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    (found,) = session.run(None, {"x": x.numpy(), "t": t.numpy()})
    expected = load(packed, "integer")(x, t).numpy()
    assert np.linalg.norm(found - expected) < 0.2 * np.linalg.norm(expected)  # ties, see test_runtimes
    assert list(tree(tmp_path)) == ["out", "out/ckpt.onnx"]


def test_attention_in_floats_is_for_tensorrt(packed):
    """Softmax outputs are all that symmetric activations leave unsigned."""
    remark = r"1 of \d+ quantizers are not for TensorRT.*--a_sym --set weights.kind=signed.*--attention float"
    assert re.search(remark, export(packed, "onnx-portable", "one.onnx"))
    assert "TensorRT" not in export(packed, "onnx-portable", "other.onnx", "--attention", "float")


def test_it_says_where_a_graph_is_exact(latent, packed, text):
    """W4 fits everywhere but for attention's operands; of W8 the form decides."""
    assert "exact on every CPU: all weights have at most 7 bits" in export(packed, "onnx", "one.onnx")
    inexact = "int8 weights: x86 CPUs without VNNI cut off sums"
    assert inexact in export(packed, "onnx", "one.onnx", "--weight_type", "int8")
    for kind in ("onnx", "onnx-portable"):
        out = export(text, kind, "two.onnx", "-r", latent.sd.ckpt)
        assert re.search(r"^\d+ weights are uint8: exact on every CPU", out, re.MULTILINE) and inexact not in out
    assert inexact in export(text, "onnx", "two.onnx", "-r", latent.sd.ckpt, "--weight_type", "int8")


def test_onnx_of_a_latent_model(latent, text, tmp_path):
    """Sizes are the configuration's, or of the height and width that are asked for."""
    export(text, "onnx", "sd.onnx", "-r", latent.sd.ckpt)
    out = export(text, "onnx-portable", "wide.onnx", "-r", latent.sd.folder, "--W", 32)
    assert "weights have zero points" in out and "--set weights.kind=signed" in out  # of 8 bits
    for name, width in (("sd.onnx", 8), ("wide.onnx", 16)):
        shapes = {each.name: each.shape for each in onnxruntime.InferenceSession(tmp_path / name).get_inputs()}
        assert shapes["x"][1:] == [4, 8, width] and shapes["context"][1:] == [16, 32]


def test_onnx_of_several_parameter_sets(grouped, tmp_path):
    out = export(grouped, "onnx-portable", "sets.onnx")
    assert sorted(tree(tmp_path)) == ["sets_set00.onnx", "sets_set01.onnx"]
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 2
    assert "sets_set00.onnx: timesteps" in out and "to 999" in out
    export(grouped, "onnx", "one.onnx")
    assert "set" in [each.name for each in onnxruntime.InferenceSession(tmp_path / "one.onnx").get_inputs()]


# Mistakes


def test_mistakes(tiny, calibrated, packed, latent, grouped, text, tmp_path):
    pth, before = calibrated.folder / "ckpt.pth", tree(tmp_path)

    def fails(source, kind, *flags, out="out/", names=()):
        refused(call("export", "--cali_ckpt", source, "--format", kind, "--out", out, *flags), *names)
        assert tree(tmp_path) == before

    fails(packed, "pickle", names=("--format", "'pickle'", "onnx-portable"))
    fails("nope.safetensors", "packed", names=("nope.safetensors", "no such"))
    fails("nope.pth", "packed", *tiny.model[:2], names=("nope.pth", "no such"))
    fails(packed, "packed", out=packed, names=("--out", packed, "--cali_ckpt"))
    fails(packed, "onnx", out="out.safetensors", names=("--out out.safetensors", ".onnx"))
    fails(packed, "packed", "--weight_bit", 4, names=("--weight_bit", packed, "own recipe"))
    fails(pth, "packed", names=(pth, "--config or -r"))
    fails(pth, "packed", *tiny.model[:2], "--weight_bit", 8, "--split", names=("--weight_bit 8", "contradicts", pth))
    fails(pth, "qdiffusion", *tiny.model, names=("--format qdiffusion", pth, "already"))
    fails(packed, "qdiffusion", names=("--format qdiffusion", "float weights", "--config or -r"))
    fails(packed, "qdiffusion", *tiny.model[:2], names=("no float weights", "--use_pretrained"))
    fails(packed, "qdiffusion", *tiny.model, "--attention", "float", names=("--attention",))
    fails(grouped, "qdiffusion", *tiny.model, names=("--format qdiffusion", "one activation scale"))
    fails(packed, "packed", "-r", latent.sd.ckpt, names=(packed, "ddim", "ldm"))
    fails(text, "onnx", "-r", latent.cin.ckpt, names=(text, "in_channels 4", "3"))
    fails(text, "onnx", names=("--format onnx", text, "-r or --config"))
    fails(text, "onnx", "-r", latent.sd.ckpt, "--H", 9, names=("--H 9", "multiple of"))
    fails(packed, "onnx", *tiny.model, "--H", 32, names=("--H", "latent"))
    fails(packed, "packed", "--weight_type", "int8", names=("--weight_type", "ONNX", "packed"))


def test_onnx_without_its_packages(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("qdiff.cli.export.has_onnx_runtime", lambda: False)
    result = call("export", "--cali_ckpt", packed, "--format", "onnx", "--out", "a.onnx")
    refused(result, "--format onnx", "pip install '.[onnx]'")
    assert tree(tmp_path) == {}


def test_a_failure_leaves_nothing(packed, grouped, tmp_path, monkeypatch):
    """Not even the first of several files."""
    from qdiff.deploy.onnx import export as onnx_export

    real, calls = onnx_export.make_model, []

    def fails_at_the_second(*args, **kwargs):
        if calls:
            raise ValueError("mid.block_1: expected operators that the ONNX export knows, found erfinv")
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(onnx_export, "make_model", fails_at_the_second)
    result = call("export", "--cali_ckpt", grouped, "--format", "onnx-portable", "--out", "sets.onnx")
    refused(result, "mid.block_1", "erfinv")
    assert tree(tmp_path) == {}


def test_configurations_and_damaged_files(packed, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIGS["ldm"]))
    (tmp_path / "cut.safetensors").write_bytes(packed.read_bytes()[:-100])
    before = tree(tmp_path)
    flags = ("--format", "onnx", "--out", "out.onnx")
    refused(call("export", "--cali_ckpt", "cut.safetensors", *flags), "cut.safetensors", "truncated")
    refused(call("export", "--cali_ckpt", packed, "--config", "config.yaml", *flags), packed, "ddim", "ldm")
    assert tree(tmp_path) == before

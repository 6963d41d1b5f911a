"""check_checkpoint.py on the golden case, on copies of it that are perturbed, and on copies that are broken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import call, launch, passed, refused
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[3] / "fixtures"
GOLDEN = FIXTURES / "ddim_split_w4a8_sym"
LATENT = ("ldm_w4a8", "sd_split_w8a8_sm16")
CHECK = "check_checkpoint"


@pytest.fixture
def case(tmp_path):
    """A copy of the golden case."""
    return shutil.copytree(GOLDEN, tmp_path / "case")


def verdicts(result):
    """{output: ok or too large}"""
    return {line.split()[0]: line.split("  ")[-1] for line in result.out.splitlines()}


def perturb(path, key, change):
    """Change one tensor of a safetensors file or a ckpt.pth."""
    load, save = (load_file, save_file) if path.suffix == ".safetensors" else (torch.load, torch.save)
    state = load(path)
    state[key] = change(state[key])
    save(state, path)


def test_the_golden_case(tmp_path):
    result = passed(call(CHECK, "--case", GOLDEN))
    assert verdicts(result) == dict.fromkeys(("eps_fp", "eps_w", "eps_wa"), "ok") and len(result.out.splitlines()) == 3
    errors = [float(line.split()[3]) for line in result.out.splitlines()]
    assert max(errors) < 1e-9


@pytest.mark.parametrize("name", LATENT)
def test_the_golden_cases_of_latent_models(name):
    result = call(CHECK, "--case", FIXTURES / name)
    assert result.code == 0 and verdicts(result) == dict.fromkeys(("eps_fp", "eps_w", "eps_wa"), "ok")
    assert max(float(line.split()[3]) for line in result.out.splitlines()) < 1e-9


@pytest.mark.parametrize(
    ("name", "file", "key", "wrong"),
    [
        ("ldm_w4a8", "qdiff_wa.pth", "middle_block.1.attention.qkv_matmul.act_quantizer_q.delta", ["eps_wa"]),
        ("ldm_w4a8", "qdiff_wa.pth", "middle_block.1.qkv.weight_quantizer.delta", ["eps_w", "eps_wa"]),
        (
            "sd_split_w8a8_sm16",
            "qdiff_wa.pth",
            "middle_block.1.transformer_blocks.0.attn2.act_quantizer_w.delta",
            ["eps_wa"],
        ),
        (
            "sd_split_w8a8_sm16",
            "qdiff_wa.pth",
            "output_blocks.0.0.skip_connection.weight_quantizer_0.delta",
            ["eps_w", "eps_wa"],
        ),
        ("sd_split_w8a8_sm16", "io.safetensors", "context", ["eps_fp", "eps_w", "eps_wa"]),
    ],
)
@pytest.mark.cases("ldm_w4a8-*", "sd_*.attn2.act_quantizer_w.delta-*")
def test_one_perturbed_tensor_of_a_latent_case_fails(tmp_path, name, file, key, wrong):
    case = shutil.copytree(FIXTURES / name, tmp_path / "case")
    perturb(case / file, f"model.{key}" if file == "qdiff_wa.pth" else key, lambda tensor: 1.01 * tensor)
    result = call(CHECK, "--case", case)
    assert result.code == 1
    assert [output for output, verdict in verdicts(result).items() if verdict == "too large"] == wrong


@pytest.mark.parametrize("name", LATENT)
def test_a_wrong_width_of_softmax_outputs_fails(tmp_path, name):
    """Nothing in the file says it."""
    case = shutil.copytree(FIXTURES / name, tmp_path / "case")
    about = json.loads((case / "case.json").read_text())
    (case / "case.json").write_text(json.dumps(about | {"softmax_bits": 7}))
    result = call(CHECK, "--case", case)
    assert result.code == 1 and verdicts(result) == {"eps_fp": "ok", "eps_w": "ok", "eps_wa": "too large"}


@pytest.mark.parametrize(
    ("file", "key", "wrong"),
    [
        ("fp.safetensors", "conv_in.bias", ["eps_fp"]),
        ("qdiff_wa.pth", "model.conv_in.bias", ["eps_w", "eps_wa"]),
        ("qdiff_wa.pth", "model.conv_in.weight_quantizer.delta", ["eps_w", "eps_wa"]),
        ("qdiff_wa.pth", "model.mid.attn_1.act_quantizer_q.delta", ["eps_wa"]),
        ("io.safetensors", "eps_w", ["eps_w"]),
    ],
)
def test_one_perturbed_tensor_fails(case, file, key, wrong):
    perturb(case / file, key, lambda tensor: 1.001 * tensor)
    result = call(CHECK, "--case", case)
    assert result.code == 1 and result.complaints == []
    assert [name for name, verdict in verdicts(result).items() if verdict == "too large"] == wrong


@pytest.mark.long
def test_in_a_process_of_its_own(case):
    perturb(case / "qdiff_wa.pth", "model.conv_in.bias", lambda tensor: tensor + 1e-3)
    result = launch(CHECK, "--case", case)
    assert result.code == 1 and result.err == ""


def test_undefined_outputs_fail(case):
    """Nor is a case of weights that are not finite one."""
    perturb(case / "io.safetensors", "eps_fp", lambda tensor: tensor * float("nan"))
    result = call(CHECK, "--case", case)
    assert result.code == 1 and verdicts(result)["eps_fp"] == "too large"
    perturb(case / "fp.safetensors", "conv_in.bias", lambda tensor: tensor * float("nan"))
    refused(call(CHECK, "--case", case), "fp.safetensors: conv_in.bias", "finite")


def test_the_tolerance(case):
    perturb(case / "io.safetensors", "eps_w", lambda tensor: 1.001 * tensor)
    assert call(CHECK, "--case", case, "--tolerance", 0.1).code == 0
    assert call(CHECK, "--case", case, "--tolerance", 1e-6).code == 1


def test_no_case(tmp_path):
    refused(call(CHECK), "--case", "required")
    refused(call(CHECK, "--case", tmp_path), "case.json", "no such")
    refused(call(CHECK, "--case", GOLDEN, "--tolerance", "tight"), "--tolerance", "'tight'")


@pytest.mark.parametrize("file", ["fp.safetensors", "io.safetensors", "qdiff_wa.pth"])
def test_a_missing_or_truncated_file_is_named(case, file):
    content = (case / file).read_bytes()
    (case / file).write_bytes(content[: len(content) // 2])
    refused(call(CHECK, "--case", case), case / file, "not a readable")
    (case / file).unlink()
    refused(call(CHECK, "--case", case), case / file, "no such")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model": "dit"}, ("model", "ddim", "'dit'")),
        ({"config": {}}, ("config", "in_channels")),
        ({"config": 5}, ("config", "dict", "5")),
        ({"config": None}, ("config", "None")),
        ({"weight_bits": "4"}, ("weight_bits", "int", "'4'")),
        ({"weight_bits": 8}, ("--weight_bit 8", "qdiff_wa.pth", "4 bits")),
        ({"split_shortcut": False}, ("--split", "qdiff_wa.pth")),
        ({"act_symmetric": False}, ("--a_sym", "qdiff_wa.pth")),
        ({"act_bits": 99}, ("2 to 16", "99")),
        ({"softmax_bits": None}, ("softmax_bits", "None")),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_description(case, change, names):
    path = case / "case.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(call(CHECK, "--case", case), *names)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"model": "ddim"}'])
def test_no_description(case, text):
    (case / "case.json").write_text(text)
    refused(call(CHECK, "--case", case), case / "case.json")


def test_a_missing_or_other_output(case):
    path = case / "io.safetensors"
    perturb(path, "eps_wa", lambda tensor: tensor[:1].contiguous())
    refused(call(CHECK, "--case", case), "eps_wa", "[4, 3, 16, 16]", "[1, 3, 16, 16]")
    io = load_file(path)
    save_file({key: value for key, value in io.items() if key != "x"}, path)
    refused(call(CHECK, "--case", case), path, "x is missing")

"""The CIFAR-10 command lines of the Q-Diffusion repository, as they stand; only the model is tiny and the work short.

Added to each: --max_images; to the calibrating ones also --cali_iters and --cali_iters_a, and a smaller --cali_n.
"""

import shlex

import pytest
import torch
from running import call, launch, only_run, passed, pictures, tree

from qdiff.checkpoints.native import load_checkpoint

SAMPLE = (
    "--config {config} --use_pretrained --timesteps 100 --eta 0 --skip_type quad --ptq --weight_bit {bits} "
    "--quant_mode qdiff --split {resume} -l {out} --cali_ckpt {ckpt}"
)
SAMPLE_WITH_ACTIVATIONS = (
    "--config {config} --use_pretrained --timesteps 100 --eta 0 --skip_type quad --ptq --weight_bit {bits} "
    "--quant_mode qdiff --quant_act --act_bit 8 --a_sym --split {resume} -l {out} --cali_ckpt {ckpt}"
)
CALIBRATE = (
    "--config {config} --use_pretrained --timesteps 100 --eta 0 --skip_type quad --ptq --weight_bit {bits} "
    "--quant_mode qdiff --cali_st 20 --cali_batch_size 32 --cali_n 256 --quant_act --act_bit 8 --a_sym --split "
    "--cali_data_path {data} -l {out}"
)
QUICKLY = ["--cali_n", "2", "--cali_iters", "2", "--cali_iters_a", "2"]


def line(template, **values):
    return [*shlex.split(template.format(**values)), "--max_images", "1"]


@pytest.fixture(scope="module", params=[4, 8], ids=["w4", "w8"])
def made(request, tiny, tmp_path_factory):
    """bits, and the folder of the calibrating line's run, on states in the original's format."""
    folder = tmp_path_factory.mktemp("published")
    generator = torch.Generator().manual_seed(0)
    steps = [int(step) for step in torch.linspace(0, 800**0.5, 100).square().flip(0)]
    states = [torch.randn(3, 3, 16, 16, generator=generator) for _ in steps]
    torch.save({"xs": states, "ts": [torch.full((3,), step) for step in steps]}, folder / "data.pt")
    values = {"config": tiny.config, "bits": request.param, "data": folder / "data.pt", "out": folder / "out"}
    passed(call("sample_diffusion_ddim", *line(CALIBRATE, **values), *QUICKLY))
    return request.param, only_run(folder / "out")


def test_the_calibrating_line(made):
    bits, run = made
    notes = {"calibration.jsonl", "calibration_loss.png", "sampling_config.yaml"}
    assert sorted(tree(run).keys() - notes) == ["ckpt.pth", "ckpt.safetensors", "img", "img/0.png"]
    recipe = load_checkpoint(run / "ckpt.safetensors").recipe
    assert (recipe.name, recipe.weights.bits, recipe.activations.bits) == ("q-diffusion", bits, 8)
    assert (recipe.selector.steps, recipe.stages[1].batch_size, recipe.split_shortcuts) == (20, 32, True)


def resumed(tiny, made, out, template, resume, ckpt):
    values = {"config": tiny.config, "bits": made[0], "resume": resume, "out": out, "ckpt": ckpt}
    result = passed(call("sample_diffusion_ddim", *line(template, **values)))
    return result, pictures(only_run(out))


@pytest.mark.parametrize("resume", ["--resume", ""], ids=["--resume", "older-copies"])
@pytest.mark.cases("w4---resume", "w8-older-copies")
def test_with_activations(tiny, made, tmp_path, resume):
    result, images = resumed(tiny, made, tmp_path / "out", SAMPLE_WITH_ACTIVATIONS, resume, made[1] / "ckpt.pth")
    assert f"W{made[0]}A8" in result.out and images == pictures(made[1])


@pytest.mark.parametrize("resume", ["--resume", ""], ids=["--resume", "older-copies"])
@pytest.mark.cases("w8---resume", "w4-older-copies")
def test_weights_only(tiny, made, tmp_path, resume):
    result, images = resumed(tiny, made, tmp_path / "out", SAMPLE, resume, made[1] / "ckpt.pth")
    assert f"W{made[0]}A32" in result.out and images != pictures(made[1])


@pytest.mark.parametrize("template", [SAMPLE, SAMPLE_WITH_ACTIVATIONS], ids=["weights", "with-activations"])
@pytest.mark.cases("w4-weights", "w8-with-activations")
def test_on_a_file_that_the_original_wrote(tiny, made, tmp_path, template):
    """Nothing in the file but the original's tensors; the weights are the same, so W-only images are too."""
    torch.save(dict(torch.load(made[1] / "ckpt.pth", weights_only=True)), tmp_path / "original.pth")
    _, images = resumed(tiny, made, tmp_path / "original", template, "--resume", tmp_path / "original.pth")
    if template == SAMPLE:
        assert images == resumed(tiny, made, tmp_path / "ours", SAMPLE, "--resume", made[1] / "ckpt.pth")[1]


@pytest.mark.long
def test_in_a_process_of_its_own_with_relative_paths(tiny, made, tmp_path):
    (tmp_path / "w.pth").write_bytes((made[1] / "ckpt.pth").read_bytes())
    values = {"config": tiny.config, "bits": made[0], "resume": "", "out": "out", "ckpt": "w.pth"}
    passed(launch("sample_diffusion_ddim", *line(SAMPLE_WITH_ACTIVATIONS, **values), cwd=tmp_path))
    assert pictures(only_run(tmp_path / "out")) == pictures(made[1])

"""Files that are no checkpoint of Q-Diffusion, or none of this network: refused in one line."""

import os
import re
from collections import OrderedDict

import pytest
import torch
from published_file import one_line, recipe_of
from safetensors.torch import save_file

from ddim.network import DDPMUNet
from qdiff.checkpoints.qdiffusion import Published, load_published


class Foreign:
    """Stands for any object a pickle may bring along."""


def write_truncated(path, golden):
    path.write_bytes(golden.read_bytes()[:200_000])


def write_foreign(path, golden):
    torch.save({**torch.load(golden, weights_only=True), "model.extra": Foreign()}, path)


def write_code(path, golden):
    torch.save({**torch.load(golden, weights_only=True), "model.extra": os.system}, path)


def write_float(path, golden):
    torch.save({"conv_in.weight": torch.ones(2), "conv_in.bias": torch.ones(2)}, path)


def write_list(path, golden):
    torch.save([torch.ones(2)], path)


def write_empty(path, golden):
    torch.save({}, path)


def write_safetensors(path, golden):
    save_file({"model.conv_in.weight_quantizer.delta": torch.ones(2)}, path)


def write_without(*keys):
    def write(path, golden):
        state = torch.load(golden, weights_only=True)
        for key in keys:
            del state[key]
        torch.save(state, path)

    return write


def write_with(**changes):
    def write(path, golden):
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        torch.save({**torch.load(golden, weights_only=True), **changed}, path)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_truncated, "truncated or not a PyTorch file"),
        (write_foreign, r"it holds an object of .*\.Foreign"),
        (write_code, r"it holds an object of (posix|os)\.system"),
        (write_float, "expected a Q-Diffusion checkpoint .*2 entries such as 'conv_in.weight'"),
        (write_list, "expected a Q-Diffusion checkpoint"),
        (write_empty, "expected a Q-Diffusion checkpoint"),
        (write_safetensors, "not a PyTorch file"),
        (write_without("model.conv_in.weight"), "conv_in.weight is missing"),
        (write_without("model.norm_out.bias"), "norm_out.bias is missing"),
        (write_without("model.conv_in.bias"), "conv_in.bias is missing"),
        (write_without("model.conv_in.weight_quantizer.alpha"), "conv_in.weight_quantizer.alpha is missing"),
        (write_without("model.conv_in.weight_quantizer.zero_point"), "conv_in.weight_quantizer.zero_point is missing"),
        (write_without("model.conv_in.act_quantizer.delta"), "conv_in.act_quantizer.delta is missing"),
        (write_with(model__extra__weight=torch.ones(2)), "extra.weight is not part of it"),
        (write_with(model__conv_in__weight=torch.ones(32, 4, 3, 3)), "conv_in.weight"),
        (write_with(model__conv_in__weight_quantizer__delta=torch.ones(7, 1, 1, 1)), "conv_in"),
        (write_with(model__conv_in__act_quantizer__delta=torch.ones(7)), "conv_in"),
        (write_with(model__conv_in__act_quantizer__delta=torch.zeros(())), "conv_in.*expected scales above 0, found 0"),
        (write_with(model__norm_out__bias=torch.full((32,), torch.nan)), "norm_out.bias: expected finite numbers"),
        (
            write_with(model__conv_in__weight=torch.ones(32, 3, 3, 3, dtype=torch.int8)),
            "conv_in.weight: expected floating-point numbers, found int8",
        ),
    ],
    ids=[
        "truncated", "foreign-object", "function", "float", "list", "empty", "safetensors", "no-weight", "no-norm",
        "no-bias", "no-alpha", "no-zero-point", "no-act-delta", "foreign-layer", "weight-shape", "delta-shape",
        "act-shape", "act-zero", "nan", "int8",
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_line(golden, case_network, adapter, tmp_path, write, message):
    path = tmp_path / "ckpt.pth"
    write(path, golden)
    with pytest.raises(ValueError) as error:
        load_published(path, case_network, adapter, recipe_of(adapter))
    one_line(error, str(path))
    assert re.search(message, str(error.value)), str(error.value)


@pytest.mark.parametrize("about", ["{", "3", '{"name": "x", "bits": 4}', 3], ids=str)
def test_a_recipe_inside_a_file_that_cannot_be_read_is_an_error(golden, tmp_path, about):
    state = OrderedDict(torch.load(golden, weights_only=True))
    state._metadata = OrderedDict({"": {"qdiff_recipe": about}})
    torch.save(state, tmp_path / "ckpt.pth")
    with pytest.raises(ValueError) as error:
        Published(tmp_path / "ckpt.pth")
    one_line(error, f"{tmp_path / 'ckpt.pth'}: the recipe it brings cannot be read")


@pytest.mark.parametrize("change", [{"ch": 64}, {"num_res_blocks": 2}, {"attn_resolutions": []}], ids=str)
def test_a_network_of_another_architecture_is_refused(case, golden, adapter, change):
    network = DDPMUNet(**{**case["config"], **change})
    with pytest.raises(ValueError) as error:
        load_published(golden, network, adapter, recipe_of(adapter))
    one_line(error, f"{golden}: expected a checkpoint of this architecture")


def test_a_missing_file_is_named(case_network, adapter, tmp_path):
    with pytest.raises(FileNotFoundError, match="ckpt.pth: no such Q-Diffusion checkpoint"):
        load_published(tmp_path / "ckpt.pth", case_network, adapter, recipe_of(adapter))

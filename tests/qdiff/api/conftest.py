"""A tiny pixel model, as a user names one: a configuration with its weights beside it."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1] / "cli"))  # of latents and running

from ddim.pretrained import build_network, load_config  # noqa: E402

CONFIG = """
pretrained: tiny.safetensors
data: {dataset: CIFAR10, image_size: 16, channels: 3, rescaled: true}
model: {in_channels: 3, out_ch: 3, ch: 32, ch_mult: [1], num_res_blocks: 1, attn_resolutions: [16]}
diffusion: {beta_schedule: linear, beta_start: 0.0001, beta_end: 0.02, num_diffusion_timesteps: 1000}
sampling: {batch_size: 2}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixel")
    path = folder / "tiny.yml"
    path.write_text(CONFIG)
    save_file(build_network(load_config(path), seed=3).state_dict(), folder / "tiny.safetensors")
    return path

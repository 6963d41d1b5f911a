"""Pixel-space diffusion (DDPM/DDIM): the U-Net, its noise schedules, its samplers and its checkpoints."""

from ddim.chain import Segment, State
from ddim.network import DDPMUNet
from ddim.noise import ImageNoise
from ddim.pretrained import build_network, load_config, load_pretrained
from ddim.samplers import SAMPLERS, make_sampler, run, to_images

__all__ = [
    "SAMPLERS",
    "DDPMUNet",
    "ImageNoise",
    "Segment",
    "State",
    "build_network",
    "load_config",
    "load_pretrained",
    "make_sampler",
    "run",
    "to_images",
]

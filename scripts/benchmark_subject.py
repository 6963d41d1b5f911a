"""The network of benchmark.py calibrate: of any family, with its weights or random ones, and noise as its states."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import latent_model
import pixel_model
import torch
import yaml
from conditioning import is_conditional, number_of_classes
from torch import nn

import ddim.pretrained
import ldm.pretrained
from qdiff.adapters import Adapter
from qdiff.calibration.selectors import CalibrationSet

TOKENS = 77  # of a prompt, where the configuration does not say


@dataclass(frozen=True)
class Subject:
    """A float network on its device, and what its inputs look like. context: of one state, () for none."""

    network: nn.Module
    adapter: Adapter
    shape: tuple[int, ...]
    context: tuple[int, ...]
    family: str

    def states(self, steps: int, per_step: int, seed: int) -> CalibrationSet:
        """Noise at `steps` timesteps."""
        generator, count = torch.Generator().manual_seed(seed), steps * per_step
        step = torch.arange(steps).repeat_interleave(per_step)
        t = (step + 1) * self.adapter.num_timesteps(self.network) // steps - 1
        x = torch.randn((count, *self.shape), generator=generator)
        context = torch.randn((count, *self.context), generator=generator) if self.context else None
        return CalibrationSet(x, t, step, context)


def load_subject(args: argparse.Namespace, device: torch.device) -> Subject:
    """The model that the flags name. Raises ValueError naming the flags where they name none."""
    if args.resume_base is None and args.config is None:
        raise ValueError("-r, --config: name a checkpoint, or a configuration")
    if args.method is not None and args.against is None:
        raise ValueError("--method: whole calibrations are only compared; add --against plain")
    found = _latent(args) if args.resume_base is not None or _is_latent(args.config) else _pixel(args)
    return replace(found, network=found.network.to(device).requires_grad_(False))


def _is_latent(path: Path) -> bool:
    """Whether a configuration is one; files that are none are left to the readers to complain about."""
    try:
        return "target" in yaml.safe_load(path.read_text(encoding="utf8"))["model"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return False


def _pixel(args: argparse.Namespace) -> Subject:
    config = pixel_model.read_config(args)
    if args.random:
        network = ddim.pretrained.build_network(config, args.seed)
    else:
        network = pixel_model.load_float_model(args, config).network
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    return Subject(network, pixel_model.ADAPTER, shape, (), "pixel")


def _latent(args: argparse.Namespace) -> Subject:
    if args.resume_base is None and not args.random:
        raise ValueError("no float weights: give -r PATH, or --random")
    checkpoint = None if args.random else ldm.pretrained.find_checkpoint(args.resume_base)
    config = ldm.pretrained.load_config(args.config or ldm.pretrained.find_config(checkpoint))
    if checkpoint is None:
        network = ldm.pretrained.build_network(config)
    else:
        network = ldm.pretrained.load_model(config, checkpoint).model.diffusion_model
    size, width = config.model.params.image_size, network.config["context_dim"]
    prompts = is_conditional(config) and number_of_classes(config) is None
    family = "text" if prompts else "latent"
    stage = config.model.params.get("cond_stage_config")
    options = (stage.get("params") or {}) if prompts else {}
    tokens = options.get("max_length", options.get("max_seq_len", TOKENS)) if prompts else 1
    context = () if width is None else (tokens, width)
    return Subject(network, latent_model.ADAPTER, (network.in_channels, size, size), context, family)

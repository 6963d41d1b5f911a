"""Flags of the pixel models (CIFAR-10, LSUN)."""

from __future__ import annotations

import argparse
from pathlib import Path

from qdiff.cli.models.any_family import FLAGS, NO_WEIGHTS, PIXEL_SAMPLERS, ChosenModel
from qdiff.cli.parser import number, whole
from qdiff.families.open import pixel_model
from qdiff.families.options import SamplingOptions
from qdiff.utils.errors import flags_named


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--config, --use_pretrained, --ckpt."""
    group = parser.add_argument_group("model")
    group.add_argument("--config", type=Path, required=True, help="model configuration, e.g. configs/cifar10.yml")
    group.add_argument("--use_pretrained", action="store_true", help="use the weights that the configuration names")
    group.add_argument("--ckpt", type=Path, default=None, help="float weights of your own, instead of those")


def add_sampling_flags(parser: argparse.ArgumentParser, timesteps: int = 1000, skip_type: str = "uniform") -> None:
    """--sample_type, --skip_type, --timesteps, --eta."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--sample_type", choices=list(PIXEL_SAMPLERS), default="generalized", help="sampler")
    group.add_argument("--skip_type", choices=("uniform", "quad"), default=skip_type, help="spacing of the timesteps")
    group.add_argument("--timesteps", type=whole(1), default=timesteps, help="sampler steps")
    group.add_argument("--eta", type=number(0, 1), default=0.0, help="share of DDPM noise, 0 (DDIM) to 1")


def chosen_pixel_model(args: argparse.Namespace) -> ChosenModel:
    """The pixel model that the flags name, and how it samples. Raises ValueError naming the flag at fault."""
    source = pixel_model(args.config, args.ckpt, pretrained=args.use_pretrained, no_weights=NO_WEIGHTS)
    options = SamplingOptions(
        steps=args.timesteps, sampler=args.sample_type, skip_type=args.skip_type, eta=args.eta, seed=args.seed
    )
    with flags_named(FLAGS):
        return ChosenModel(source, source.sampling(options))

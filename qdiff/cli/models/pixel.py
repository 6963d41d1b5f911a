"""What the scripts of the pixel models (CIFAR-10, LSUN) share: their flags, the float model, float sampling states."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ddim.pipeline import Pipeline
from ddim.pretrained import build_network, load_config, load_pretrained, load_state, load_weights, sha256
from ddim.samplers import SAMPLERS
from qdiff.calibration.trajectories import Trajectories, concatenate
from qdiff.cli.commandline import number, whole
from qdiff.cli.runs.sampling import ALONE, FIRST_CALIBRATION_IMAGE, Sample, batches, record_batches, sample_batches
from qdiff.families import adapter_for
from qdiff.utils.team import Team

ADAPTER = adapter_for("ddim")


def _whole(value: object) -> bool:
    return type(value) is int and value > 0


def _number(value: object) -> bool:
    return type(value) in (int, float)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


PICTURE_CHANNELS = (1, 3)
# What the values of a configuration must be, where it has them.
CONFIG_VALUES: dict[str, tuple[str, Callable[[object], bool]]] = {
    **dict.fromkeys(("data.image_size", "data.channels"), ("a whole number", _whole)),
    **dict.fromkeys(("model.in_channels", "model.out_ch", "model.ch"), ("a whole number", _whole)),
    "model.num_res_blocks": ("a whole number", _whole),
    **dict.fromkeys(("model.ch_mult", "model.attn_resolutions"), ("a list of whole numbers", _sizes)),
    "model.dropout": ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1),
    **dict.fromkeys(("diffusion.beta_start", "diffusion.beta_end"), ("a number", _number)),
    "diffusion.num_diffusion_timesteps": ("a whole number", _whole),
    "sampling.batch_size": ("a whole number", _whole),
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--config, --use_pretrained, --ckpt."""
    group = parser.add_argument_group("model")
    group.add_argument("--config", type=Path, required=True, help="model configuration, e.g. configs/cifar10.yml")
    group.add_argument("--use_pretrained", action="store_true", help="use the weights that the configuration names")
    group.add_argument("--ckpt", type=Path, default=None, help="float weights of your own, instead of those")


def add_sampling_flags(parser: argparse.ArgumentParser, timesteps: int = 1000, skip_type: str = "uniform") -> None:
    """--sample_type, --skip_type, --timesteps, --eta."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--sample_type", choices=list(SAMPLERS), default="generalized", help="sampler")
    group.add_argument("--skip_type", choices=("uniform", "quad"), default=skip_type, help="spacing of the timesteps")
    group.add_argument("--timesteps", type=whole(1), default=timesteps, help="sampler steps")
    group.add_argument("--eta", type=number(0, 1), default=0.0, help="share of DDPM noise, 0 (DDIM) to 1")


@dataclass(frozen=True)
class FloatModel:
    """A float network with its configuration and where its weights came from."""

    config: DictConfig
    network: nn.Module
    source: Path

    def describe(self) -> dict[str, str]:
        """Provenance: file name and SHA-256 of the weights."""
        return {"source": self.source.name, "source_sha256": sha256(self.source)}


def load_float_model(args: argparse.Namespace, config: DictConfig) -> FloatModel:
    """The float model the flags ask for. Raises ValueError when they name none, or what loading raises."""
    if args.ckpt is not None:
        network = build_network(config)
        load_weights(network, load_state(args.ckpt), args.ckpt)
        return FloatModel(config, network, args.ckpt)
    if not args.use_pretrained:
        raise ValueError("no float weights: give --use_pretrained, or --ckpt FILE with weights of your own")
    return FloatModel(config, *load_pretrained(config))


def make_pipeline(args: argparse.Namespace, config: DictConfig) -> Pipeline:
    """The sampling pipeline the flags ask for. Raises ValueError naming --timesteps where the model has fewer."""
    trained = config.diffusion.num_diffusion_timesteps
    if args.timesteps > trained:
        raise ValueError(f"--timesteps {args.timesteps}: expected at most {trained}, the timesteps of {args.config}")
    options = {"steps": args.timesteps, "skip_type": args.skip_type, "eta": args.eta, "seed": args.seed}
    try:
        return Pipeline.from_config(config, sampler=args.sample_type, **options)
    except ValueError as error:  # of the noise schedule: parsing has checked the flags
        raise ValueError(f"{args.config}: {error}") from error


def read_config(args: argparse.Namespace) -> DictConfig:
    """The configuration that --config names. Raises what `load_config` raises, and ValueError naming a wrong value."""
    config = load_config(args.config)
    plain = OmegaConf.to_container(config, resolve=True)
    for name, (wanted, fits) in CONFIG_VALUES.items():
        section, key = name.split(".")
        if key in plain[section] and not fits(plain[section][key]):
            raise ValueError(f"{args.config}: {name}: expected {wanted}, found {plain[section][key]!r}")
    channels = {plain["data"]["channels"], plain["model"]["in_channels"], plain["model"]["out_ch"]}
    if len(channels) > 1:
        found = ", ".join(map(str, sorted(channels)))
        names = "data.channels, model.in_channels, model.out_ch"
        raise ValueError(f"{args.config}: {names}: expected the same number, found {found}")
    if plain["data"]["channels"] not in PICTURE_CHANNELS:
        expected = "1 (grey) or 3 (RGB), which pictures can be made of"
        raise ValueError(f"{args.config}: data.channels: expected {expected}, found {plain['data']['channels']}")
    if not isinstance(plain.get("pretrained", ""), str | None):
        raise ValueError(f"{args.config}: pretrained: expected a name or a path, found {plain['pretrained']!r}")
    try:
        with torch.device("meta"):
            build_network(config)
    except ValueError as error:
        raise ValueError(f"{args.config}: {error}") from error
    return config


def sampler_of(pipeline: Pipeline, network: nn.Module) -> Sample:
    """Images of a batch of indices, [N, C, H, W] in [0, 1]."""
    return lambda batch, observe: pipeline.sample(network, batch, observe)


def sample_images(
    pipeline: Pipeline, network: nn.Module, count: int, batch_size: int, title: str, team: Team = ALONE
) -> Tensor:
    """Images 0 ... count - 1, [count, C, H, W] in [0, 1]; in all processes of a team."""
    steps, indices = len(pipeline.timesteps()), list(batches(0, count, batch_size))
    found = sample_batches(sampler_of(pipeline, network), steps, indices, title, team=team)
    return torch.cat(team.gather([images for _, images in found], len(indices)))


def record(pipeline: Pipeline, network: nn.Module, count: int, batch_size: int, team: Team = ALONE) -> Trajectories:
    """Float sampling states of `count` calibration images, in memory; in that of all processes of a team."""
    steps, indices = len(pipeline.timesteps()), list(batches(FIRST_CALIBRATION_IMAGE, count, batch_size))
    found = record_batches(sampler_of(pipeline, network), steps, indices, team=team)
    return concatenate(team.gather([part for _, part in found], len(indices)))

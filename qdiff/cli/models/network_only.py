"""A model of any family named by its checkpoint or configuration: the network alone, and what its inputs look like."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from torch import Tensor, nn

import ddim.pretrained
import ldm.pretrained
from qdiff.cli.models import pixel as pixel_model
from qdiff.cli.models.conditioning import is_conditional, number_of_classes
from qdiff.families import Adapter

TOKENS = 77  # of a prompt, where the configuration does not say


@dataclass(frozen=True)
class NamedModel:
    """What the flags name; nothing is loaded yet.

    shape: (C, H, W) of an input; context: of its conditioning, () for none; family: "pixel", "latent" or "text".
    build: the float network, its weights of no matter. load: the same with its weights, on the CPU; raises ValueError
    where the flags name none.
    """

    adapter: Adapter
    shape: tuple[int, ...]
    context: tuple[int, ...]
    family: str
    build: Callable[[], nn.Module]
    load: Callable[[], nn.Module]

    def check(self, path: Path, family: str, config: dict[str, Any]) -> None:
        """Raise ValueError where a packed file, made for a network of `family` with `config`, is of another model."""
        if family != self.adapter.family:
            raise ValueError(f"{path}: made for a {family} model, the flags name a {self.adapter.family} one")
        with torch.device("meta"):
            expected = self.adapter.config_of(self.build())
        for key, value in expected.items():
            if config.get(key) != value and key != "dropout":
                raise ValueError(f"{path}: made for {key} {config.get(key)}, the configuration has {value}")

    def inputs(self, batch_size: int, seed: int) -> tuple[Tensor, ...]:
        """x, t and, for networks that take one, a context: noise for one evaluation, at timesteps from 0 to T - 1."""
        generator = torch.Generator().manual_seed(seed)
        with torch.device("meta"):
            timesteps = self.adapter.num_timesteps(self.build())
        x = torch.randn((batch_size, *self.shape), generator=generator)
        t = torch.randint(0, timesteps, (batch_size,), generator=generator)
        if not self.context:
            return x, t
        return x, t, torch.randn((batch_size, *self.context), generator=generator)


def add_named_model_flags(parser: argparse.ArgumentParser, random: bool = True) -> None:
    """--config, --use_pretrained, --ckpt, -r, and --random where random weights will do."""
    group = parser.add_argument_group("model")
    group.add_argument("--config", type=Path, help="configuration of a pixel or latent model")
    group.add_argument("--use_pretrained", action="store_true", help="pixel models: the configuration's weights")
    group.add_argument("--ckpt", type=Path, help="pixel models: float weights of your own")
    group.add_argument("-r", "--resume_base", type=Path, help="latent models: checkpoint or its folder")
    if random:
        group.add_argument("--random", action="store_true", help="random weights of the configuration's sizes")


def named_model(args: argparse.Namespace) -> NamedModel | None:
    """The model that the flags name, None where they name none. Raises ValueError naming what is wrong with them."""
    if args.resume_base is None and args.config is None:
        return None
    return _latent(args) if args.resume_base is not None or _is_latent(args.config) else _pixel(args)


def _is_latent(path: Path) -> bool:
    """Whether a configuration is one; files that are none are left to the readers to complain about."""
    try:
        return "target" in yaml.safe_load(path.read_text(encoding="utf8"))["model"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        return False


def _pixel(args: argparse.Namespace) -> NamedModel:
    config = pixel_model.read_config(args)
    shape = (config.data.channels, config.data.image_size, config.data.image_size)

    def build() -> nn.Module:
        return ddim.pretrained.build_network(config, getattr(args, "seed", 0))

    def load() -> nn.Module:
        random = getattr(args, "random", False)
        return build() if random else pixel_model.load_float_model(args, config).network

    return NamedModel(pixel_model.ADAPTER, shape, (), "pixel", build, load)


def _latent(args: argparse.Namespace) -> NamedModel:
    from qdiff.cli.models import latent as latent_model  # with Lightning, which takes seconds

    random = getattr(args, "random", False)
    checkpoint = None
    if args.resume_base is not None and not random:
        checkpoint = ldm.pretrained.find_checkpoint(args.resume_base)
    config = ldm.pretrained.load_config(args.config or ldm.pretrained.find_config(checkpoint or args.resume_base))

    def load() -> nn.Module:
        if random:
            return ldm.pretrained.build_network(config)
        if checkpoint is None:
            raise ValueError("no float weights: give -r PATH with the latent model's checkpoint, or --random")
        return ldm.pretrained.load_model(config, checkpoint).model.diffusion_model

    sides = argparse.Namespace(H=getattr(args, "H", None), W=getattr(args, "W", None))
    shape = (config.model.params.channels, *latent_model.latent_size(sides, config))
    prompts = is_conditional(config) and number_of_classes(config) is None
    family = "text" if prompts else "latent"
    return NamedModel(
        latent_model.ADAPTER,
        shape,
        _context(config, prompts),
        family,
        lambda: ldm.pretrained.build_network(config),
        load,
    )


def _context(config: DictConfig, prompts: bool) -> tuple[int, ...]:
    """(tokens, width) of what a latent network is conditioned on, () for none."""
    width = config.model.params.unet_config.params.get("context_dim")
    if width is None:
        return ()
    stage = config.model.params.get("cond_stage_config")
    options = (stage.get("params") or {}) if prompts else {}
    return options.get("max_length", options.get("max_seq_len", TOKENS)) if prompts else 1, width

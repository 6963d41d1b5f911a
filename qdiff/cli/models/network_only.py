"""A model of any family named by its checkpoint or configuration: the network alone, and what its inputs look like."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qdiff.cli.models.any_family import FLAGS, NO_WEIGHTS
from qdiff.cli.parser import Options
from qdiff.families import Adapter
from qdiff.families.open import is_latent_config, latent_model, pixel_model
from qdiff.families.source import Source, check_same_network, inputs
from qdiff.utils.errors import flags_named

NO_LATENT_WEIGHTS = "no float weights: give -r PATH with the latent model's checkpoint, or --random"


@dataclass(frozen=True)
class NamedModel:
    """What the flags name; nothing is loaded yet.

    shape: (C, H, W) of an input. build: the float network, its weights of no matter. load: the same with its weights,
    on the CPU; raises ValueError where the flags name none.
    """

    source: Source
    shape: tuple[int, ...]
    build: Callable[[], nn.Module]
    load: Callable[[], nn.Module]

    @property
    def adapter(self) -> Adapter:
        """What the toolkit knows about the network."""
        return self.source.adapter

    @property
    def context(self) -> tuple[int, ...]:
        """Shape of one image's conditioning, () for none."""
        return self.source.context

    @property
    def family(self) -> str:
        """ "pixel", "latent" or "text"."""
        return self.source.kind

    def check(self, path: Path, family: str, config: dict[str, Any]) -> None:
        """Raise ValueError where a packed file, made for a network of `family` with `config`, is of another model."""
        check_same_network(self.adapter, self.build, path, family, config)

    def inputs(self, batch_size: int, seed: int) -> tuple[Tensor, ...]:
        """x, t and, for networks that take one, a context: noise for one evaluation, at timesteps from 0 to T - 1."""
        return inputs(self.source, self.shape, batch_size, seed)


def add_named_model_flags(parser: argparse.ArgumentParser, random: bool = True) -> None:
    """--config, --use_pretrained, --ckpt, -r, and --random where random weights will do."""
    group = parser.add_argument_group("model")
    group.add_argument("--config", type=Path, help="configuration of a pixel or latent model")
    group.add_argument("--use_pretrained", action="store_true", help="pixel models: the configuration's weights")
    group.add_argument("--ckpt", type=Path, help="pixel models: float weights of your own")
    group.add_argument("-r", "--resume_base", type=Path, help="latent models: checkpoint or its folder")
    if random:
        group.add_argument("--random", action="store_true", help="random weights of the configuration's sizes")


@dataclass(frozen=True)
class ModelOptions(Options):
    """What the flags of `add_named_model_flags` say, each under the flag's name. H, W: of the images in pixels."""

    config: Path | None = None
    use_pretrained: bool = False
    ckpt: Path | None = None
    resume_base: Path | None = None
    random: bool = False
    seed: int = 0
    H: int | None = None
    W: int | None = None


def named_model(options: ModelOptions) -> NamedModel | None:
    """The model that is named, None where none is. Raises ValueError naming the flag that is wrong."""
    if options.resume_base is None and options.config is None:
        return None
    with flags_named(FLAGS):
        if options.resume_base is not None or is_latent_config(options.config):
            weights = {"read": not options.random, "no_weights": NO_LATENT_WEIGHTS}
            source = latent_model(options.resume_base, options.config, **weights)
            build = source.build
            shape = source.shape(options.H, options.W)
        else:
            weights = {"pretrained": options.use_pretrained, "no_weights": NO_WEIGHTS}
            source = pixel_model(options.config, options.ckpt, **weights)
            build = partial(source.build, options.seed)
            shape = source.shape()
    return NamedModel(source, shape, build, build if options.random else source.load_network)

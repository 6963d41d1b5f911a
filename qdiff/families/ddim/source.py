"""Pixel models (CIFAR-10, LSUN): named by a configuration in the DDIM repository's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ddim.pipeline import Pipeline
from ddim.pretrained import build_network, find_pretrained, load_config, load_pretrained, load_state, load_weights
from ddim.samplers import SAMPLERS, Sampler, make_sampler, to_images
from qdiff.families.ddim.adapter import DDIMAdapter
from qdiff.families.options import SamplingOptions
from qdiff.families.source import Predict, Sampling, starting_noise
from qdiff.utils.errors import FieldError
from qdiff.utils.files import sha256
from qdiff.utils.images import PICTURE_CHANNELS, PICTURE_CHANNELS_SAID

NO_WEIGHTS = "no float weights: expected a file of weights, or that those of the configuration are asked for"
__all__ = ["PixelModel", "PixelSource", "load_state", "load_weights", "read_config"]
OF_LATENT_MODELS = ("scale", "height", "width", "prompts", "labels", "no_label")


def _whole(value: object) -> bool:
    return type(value) is int and value > 0


def _number(value: object) -> bool:
    return type(value) in (int, float)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


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


def read_config(path: Path) -> DictConfig:
    """A configuration, checked. Raises what `load_config` raises, and ValueError naming a wrong value."""
    config = load_config(path)
    plain = OmegaConf.to_container(config, resolve=True)
    for name, (wanted, fits) in CONFIG_VALUES.items():
        section, key = name.split(".")
        if key in plain[section] and not fits(plain[section][key]):
            raise ValueError(f"{path}: {name}: expected {wanted}, found {plain[section][key]!r}")
    channels = {plain["data"]["channels"], plain["model"]["in_channels"], plain["model"]["out_ch"]}
    if len(channels) > 1:
        found = ", ".join(map(str, sorted(channels)))
        names = "data.channels, model.in_channels, model.out_ch"
        raise ValueError(f"{path}: {names}: expected the same number, found {found}")
    if plain["data"]["channels"] not in PICTURE_CHANNELS:
        found = plain["data"]["channels"]
        raise ValueError(f"{path}: data.channels: expected {PICTURE_CHANNELS_SAID}, found {found}")
    if not isinstance(plain.get("pretrained", ""), str | None):
        raise ValueError(f"{path}: pretrained: expected a name or a path, found {plain['pretrained']!r}")
    try:
        with torch.device("meta"):
            build_network(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


class PixelSource:
    """See `qdiff.families.source.Source`."""

    adapter, kind, context, samplers = DDIMAdapter(), "pixel", (), tuple(SAMPLERS)

    def __init__(
        self, config: DictConfig, weights: Path | None = None, pretrained: bool = True, no_weights: str = NO_WEIGHTS
    ) -> None:
        """config: of `read_config`. weights: a file of float weights; without one, where `pretrained`, those that the
        configuration names. no_weights: what is said where neither is asked for."""
        self._config, self._weights, self._pretrained, self._no_weights = config, weights, pretrained, no_weights
        self.where = {"config": config.config_file}
        self.batch_size = config.sampling.batch_size

    @property
    def config(self) -> DictConfig:
        return self._config

    def shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        side = self._config.data.image_size
        for field, given in (("height", height), ("width", width)):
            if given not in (None, side):
                raise FieldError(field, f" {given}: pixel models have one size, {side}")
        return self._config.data.channels, side, side

    def sampling(self, options: SamplingOptions) -> Sampling:
        for field in OF_LATENT_MODELS:
            if getattr(options, field) not in (None, ()):
                raise FieldError(field, ": for latent models only")
        trained = self._config.diffusion.num_diffusion_timesteps
        if options.steps > trained:
            where = self._config.config_file
            raise FieldError("steps", f" {options.steps}: expected at most {trained}, the timesteps of {where}")
        sampler = options.sampler or self.samplers[0]
        if sampler not in self.samplers:
            expected = ", ".join(self.samplers)
            raise FieldError("sampler", f" {sampler}: expected one of {expected} for this model")
        chosen = {"steps": options.steps, "skip_type": options.skip_type, "eta": options.eta, "seed": options.seed}
        try:
            return Sampling(Pipeline.from_config(self._config, sampler=sampler, **chosen))
        except ValueError as error:  # of the noise schedule: the options have been checked
            raise ValueError(f"{self._config.config_file}: {error}") from error

    def weights(self) -> Path:
        if self._weights is not None:
            return self._weights
        if not self._pretrained:
            raise ValueError(self._no_weights)
        return find_pretrained(self._config)

    def build(self, seed: int = 0) -> nn.Module:
        return build_network(self._config, seed)

    def load_network(self) -> nn.Module:
        return self._read()[0]

    def load(self, device: torch.device | str = "cpu", network: bool = True) -> PixelModel:
        if not network:
            return PixelModel(nn.Identity(), {})
        made, path = self._read()
        return PixelModel(made, {"source": path.name, "source_sha256": sha256(path)}).to(device)

    def _read(self) -> tuple[nn.Module, Path]:
        return load_pretrained(self._config, path=self.weights())


class PixelModel:
    """See `qdiff.families.source.FloatModel`."""

    def __init__(self, network: nn.Module, origin: dict[str, str]) -> None:
        self.network, self.origin = network, origin

    def to(self, device: torch.device | str) -> PixelModel:
        self.network = self.network.to(device)
        return self

    def without_network(self) -> PixelModel:
        self.network = nn.Identity()
        return self

    def start(
        self, sampling: Sampling, batch: Sequence[int], network: nn.Module, codes: Sequence[int] | None = None
    ) -> Sampler:
        pipeline = sampling.pipeline
        how = {"steps": pipeline.steps, "skip_type": pipeline.skip_type, "eta": pipeline.eta, "betas": pipeline.betas}
        x, noise = starting_noise(pipeline, batch, network, codes)
        return make_sampler(pipeline.sampler, x, noise=noise, **how)

    def predictor(self, sampling: Sampling, network: nn.Module, batch: Sequence[int], first: int = 0) -> Predict:
        return network

    def columns(self, sampling: Sampling, batch: Sequence[int], first: int = 0) -> dict[str, Tensor]:
        return {}

    def decode(self, x: Tensor) -> Tensor:
        return to_images(x)

    def warnings(self, sampling: Sampling) -> list[str]:
        return []

"""Latent models (LSUN, ImageNet, Stable Diffusion v1): a checkpoint with its configuration in the CompVis layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ddim.samplers import Sampler, to_images
from ldm.pipeline import Conditioning, Pipeline
from ldm.pretrained import build_network, find_checkpoint, load_model
from ldm.samplers import guided, make_sampler, sampler_timesteps
from ldm.schedules import betas_of
from qdiff.families.ldm.adapter import LatentAdapter
from qdiff.families.ldm.conditioning import Conditioner, asked_for, context_shape, kind_of
from qdiff.families.options import SamplingOptions
from qdiff.families.source import Predict, Sampling, starting_noise
from qdiff.utils.errors import FieldError
from qdiff.utils.files import sha256

if TYPE_CHECKING:
    from ldm.models.diffusion.models import LatentDiffusion

NO_WEIGHTS = "no float weights: expected a checkpoint"
__all__ = ["LatentModel", "LatentSource", "colours", "downsampling", "find_checkpoint", "latent_shape", "make_pipeline"]


def downsampling(config: DictConfig) -> int:
    """Pixels per latent along an axis."""
    params = config.model.params.first_stage_config.get("params") or {}
    return 2 ** (len(params["ddconfig"]["ch_mult"]) - 1) if "ddconfig" in params else 1


def colours(config: DictConfig) -> int:
    """Channels of the images."""
    params = config.model.params.first_stage_config.get("params") or {}
    return params["ddconfig"]["out_ch"] if "ddconfig" in params else config.model.params.channels


def latent_shape(config: DictConfig, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """(C, h, w) of the latents of images of that size in pixels. Raises FieldError where the model has no such size."""
    params, factor = config.model.params, downsampling(config)
    step = factor * 2 ** (len(params.unet_config.params.channel_mult) - 1)
    sides = []
    for field, given in (("height", height), ("width", width)):
        pixels = params.image_size * factor if given is None else given
        if pixels % step:
            raise FieldError(field, f" {pixels}: expected a multiple of {step} for this model")
        sides.append(pixels // factor)
    return params.channels, sides[0], sides[1]


def make_pipeline(config: DictConfig, shape: tuple[int, int, int], **options) -> Pipeline:
    """The sampling pipeline of a configuration for latents of `shape` (C, h, w).

    Raises FieldError for steps that the model does not have, ValueError for other wrong options.
    """
    betas = betas_of(config.model.params)
    try:
        sampler_timesteps(options["sampler"], steps=options["steps"], num_timesteps=len(betas))
    except ValueError as error:
        raise FieldError("steps", f" {options['steps']}: {error}") from error
    return Pipeline(shape, betas, **options)


class LatentSource:
    """See `qdiff.families.source.Source`."""

    adapter, samplers, batch_size = LatentAdapter(), ("ddim", "plms", "dpm_solver", "ddpm"), None

    def __init__(self, config: DictConfig, checkpoint: Path | None, no_weights: str = NO_WEIGHTS) -> None:
        """config: of `qdiff.families.ldm.config.read_config`. no_weights: what is said where there is no checkpoint."""
        self.config, self._checkpoint, self._no_weights = config, checkpoint, no_weights
        self.where = {"checkpoint": str(checkpoint)}
        self.kind, self.context = kind_of(config), context_shape(config)

    def shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        return latent_shape(self.config, height, width)

    def sampling(self, options: SamplingOptions) -> Sampling:
        sampler = options.sampler or self.samplers[0]
        if sampler not in self.samplers:
            expected = ", ".join(self.samplers)
            raise FieldError("sampler", f" {sampler}: expected one of {expected} for this model")
        entries, nothing, scale = asked_for(options, self.config)
        chosen = {"steps": options.steps, "eta": options.eta, "scale": scale, "seed": options.seed}
        shape = self.shape(options.height, options.width)
        return Sampling(make_pipeline(self.config, shape, sampler=sampler, **chosen), entries, nothing)

    def weights(self) -> Path:
        if self._checkpoint is None:
            raise ValueError(self._no_weights)
        return self._checkpoint

    def build(self, seed: int = 0) -> nn.Module:
        return build_network(self.config, seed)

    def load_network(self) -> nn.Module:
        return load_model(self.config, self.weights()).model.diffusion_model

    def load(self, device: torch.device | str = "cpu", network: bool = True) -> LatentModel:
        path = self.weights()
        model = load_model(self.config, path, network=network).to(device)
        return LatentModel(model, {"source": path.name, "source_sha256": sha256(path)})


class LatentModel:
    """See `qdiff.families.source.FloatModel`. whole: with first stage and what encodes prompts or labels."""

    def __init__(self, whole: LatentDiffusion, origin: dict[str, str]) -> None:
        self.whole, self.origin = whole, origin

    @property
    def network(self) -> nn.Module:
        return self.whole.model.diffusion_model

    def to(self, device: torch.device | str) -> LatentModel:
        self.whole = self.whole.to(device)
        return self

    def without_network(self) -> LatentModel:
        self.whole.model.diffusion_model = nn.Identity()
        return self

    def start(
        self, sampling: Sampling, batch: Sequence[int], network: nn.Module, codes: Sequence[int] | None = None
    ) -> Sampler:
        pipeline = sampling.pipeline
        x, noise = starting_noise(pipeline, batch, network, codes)
        how = {"steps": pipeline.steps, "betas": pipeline.betas, "eta": pipeline.eta}
        return make_sampler(pipeline.sampler, x, noise=noise, **how)

    def predictor(self, sampling: Sampling, network: nn.Module, batch: Sequence[int], first: int = 0) -> Predict:
        scale, like = sampling.pipeline.scale, next(network.parameters())
        if not sampling.entries:
            return guided(network, None, None, scale)
        seen = self.conditioning(sampling, batch, first).to(like.device, like.dtype)
        return guided(network, seen.context, seen.unconditional, scale)

    def columns(self, sampling: Sampling, batch: Sequence[int], first: int = 0) -> dict[str, Tensor]:
        if not sampling.entries:
            return {}
        seen = self.conditioning(sampling, batch, first)
        found = {"cs": seen.context, "ucs": seen.unconditional}
        return {key: column for key, column in found.items() if column is not None}

    def conditioning(self, sampling: Sampling, batch: Sequence[int], first: int = 0) -> Conditioning:
        """What the images of these indices are conditioned on."""
        entries, guides = sampling.entries, sampling.pipeline.scale != 1
        conditioner = Conditioner(self.whole, lambda i: entries[(i - first) % len(entries)], sampling.nothing, guides)
        return conditioner(batch)

    def decode(self, x: Tensor) -> Tensor:
        return to_images(self.whole.decode_first_stage(x).float())

    def warnings(self, sampling: Sampling) -> list[str]:
        encoder = self.whole.cond_stage_model
        if not hasattr(encoder, "count_tokens"):
            return []
        counts = {prompt: encoder.count_tokens(prompt) for prompt in dict.fromkeys(sampling.entries)}
        seen = f"the text encoder sees {encoder.max_length}"
        return [f"{p!r} has {n} tokens, {seen}" for p, n in counts.items() if n > encoder.max_length]

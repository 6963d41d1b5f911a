"""A model of any family, chosen by flags, with the way it samples: what the commands share that take all families."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from qdiff.api.sampling import record_batches
from qdiff.calibration.trajectories import Trajectories
from qdiff.cli.models.conditioning import asked_of_calibration, digest_of
from qdiff.cli.parser import number, whole
from qdiff.families import Adapter
from qdiff.families.open import latent_model, pixel_model
from qdiff.families.options import Entry, SamplingOptions
from qdiff.families.source import Predict, Sampling, Source
from qdiff.utils.errors import flags_named
from qdiff.utils.team import Team

PIXEL_SAMPLERS = ("generalized", "ddpm_noisy", "dpm_solver")
LATENT_SAMPLERS = ("ddim", "plms", "dpm_solver", "ddpm")
OF_LATENT_MODELS = ("scale", "prompt", "from_file", "classes", "uncond_class", "H", "W")
OF_PIXEL_MODELS = ("use_pretrained", "ckpt", "skip_type")
NO_WEIGHTS = "no float weights: give --use_pretrained, or --ckpt FILE with weights of your own"
FLAGS = {
    "steps": "--timesteps",
    "sampler": "--sample_type",
    "eta": "--eta",
    "scale": "--scale",
    "height": "--H",
    "width": "--W",
    "labels": "--classes",
    "no_label": "--uncond_class",
    "prompts": "--prompt",
}


def add_model_flags(parser: argparse.ArgumentParser, timesteps: int, skip_type: str) -> None:
    """-r, --config, --use_pretrained, --ckpt; the sampler's flags; conditioning of latent models."""
    group = parser.add_argument_group("model")
    group.add_argument("-r", "--resume_base", type=Path, metavar="PATH", help="latent model: checkpoint or its folder")
    group.add_argument("--config", type=Path, help="configuration (default for latent models: the one beside)")
    group.add_argument("--use_pretrained", action="store_true", help="pixel model: the weights of the configuration")
    group.add_argument("--ckpt", type=Path, help="pixel model: float weights of your own, instead of those")
    group = parser.add_argument_group("sampling")
    kinds = f"pixel models: {', '.join(PIXEL_SAMPLERS)}; latent models: {', '.join(LATENT_SAMPLERS)}"
    group.add_argument("--sample_type", help=f"sampler (default: the first). {kinds}")
    spacing = f"pixel model: spacing of the timesteps (default: {skip_type})"
    group.add_argument("--skip_type", choices=("uniform", "quad"), help=spacing)
    group.add_argument("--timesteps", type=whole(1), default=timesteps, help="sampler steps")
    group.add_argument("--eta", type=number(0, 1), default=0.0, help="share of DDPM noise, 0 (DDIM) to 1")
    group = parser.add_argument_group("conditioning of latent models")
    group.add_argument("--scale", type=number(0, 100), help="guidance scale; not 1: pairs of cs and ucs (default: 1)")
    group.add_argument("--prompt", help="what the samples show")
    group.add_argument("--from-file", type=Path, metavar="FILE", help="a prompt per line, which samples take in turn")
    group.add_argument("--classes", nargs="+", metavar="LABEL", help="labels and ranges, taken in turn (default: all)")
    group.add_argument("--uncond_class", type=int, help="the label of no class (default: the last one; -1: none)")
    group.add_argument("--H", type=whole(1), help="height in pixels (default: the model's own)")
    group.add_argument("--W", type=whole(1), help="width in pixels (default: the model's own)")
    parser.set_defaults(default_skip_type=skip_type)


@dataclass(frozen=True)
class LoadedModel:
    """A float model with its weights, and how it samples with its own network or a quantized one.

    origin: provenance of the weights. record: (batches of image indices, team) -> float sampling states of each batch
    of this process's part. start: image indices -> the sampler that makes their x or latents. predictor: (network,
    image indices) -> what answers the sampler. decode: x or latents -> images [N, C, H, W] in [0, 1].
    """

    network: nn.Module
    origin: dict[str, str]
    record: Callable[[Sequence[range], Team], Iterator[tuple[range, Trajectories]]]
    start: Callable[[range], Any]
    predictor: Callable[[nn.Module, range], Predict]
    decode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ChosenModel:
    """What the flags ask for, checked: a model and how it samples; nothing is loaded yet."""

    source: Source
    sampling: Sampling

    @property
    def family(self) -> str:
        """ "pixel", "latent" or "text", as in MethodOptions."""
        return self.source.kind

    @property
    def adapter(self) -> Adapter:
        """What the toolkit knows about the network."""
        return self.source.adapter

    @property
    def pipeline(self) -> Any:
        """How it samples."""
        return self.sampling.pipeline

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The prompts or labels that samples take in turn."""
        return self.sampling.entries

    @property
    def where(self) -> dict[str, str]:
        """What names the model."""
        return self.source.where

    @property
    def batch_size(self) -> int | None:
        """The configuration's own, None where it has none."""
        return self.source.batch_size

    @property
    def steps(self) -> int:
        """Sampler steps."""
        return self.sampling.steps

    def path(self) -> Any:
        """How errors add up while sampling; None for a sampler that is not linear."""
        return self.sampling.path()

    def weights(self) -> Path:
        """The file of the float weights."""
        return self.source.weights()

    def build(self) -> nn.Module:
        """The float network, its weights of no matter."""
        return self.source.build()

    def plain_config(self) -> dict[str, Any]:
        """The configuration's content."""
        plain = OmegaConf.to_container(self.source.config, resolve=True)
        plain.pop("config_file", None)
        return plain

    def load(self, device: torch.device) -> LoadedModel:
        """The float model on a device."""
        model, sampling = self.source.load(device), self.sampling
        network = model.network
        asked = {"asked_for": digest_of(sampling.entries)} if self.family != "pixel" else {}
        return LoadedModel(
            network,
            model.origin | asked,
            lambda indices, team: record_batches(model, sampling, network, indices, team),
            lambda batch: model.start(sampling, batch, network),
            lambda quantized, batch: model.predictor(sampling, quantized, batch),
            model.decode,
        )


def choose_model(args: argparse.Namespace) -> ChosenModel:
    """What the flags ask for. Raises ValueError naming the flag at fault."""
    latent = args.resume_base is not None
    if not latent and args.config is None:
        raise ValueError("--config, -r: name a pixel model by --config, or a latent one by -r")
    for flag in OF_PIXEL_MODELS if latent else OF_LATENT_MODELS:
        if getattr(args, flag) not in (None, False):
            kind = "pixel" if latent else "latent"
            raise ValueError(f"--{flag.replace('_file', '-file')}: for {kind} models only")
    known = LATENT_SAMPLERS if latent else PIXEL_SAMPLERS
    args.sample_type = args.sample_type or known[0]
    if args.sample_type not in known:
        raise ValueError(f"--sample_type {args.sample_type}: expected one of {', '.join(known)} for this model")
    args.skip_type = args.skip_type or args.default_skip_type
    shared = {"steps": args.timesteps, "sampler": args.sample_type, "eta": args.eta, "seed": args.seed}
    with flags_named(FLAGS):
        if not latent:
            source = pixel_model(args.config, args.ckpt, pretrained=args.use_pretrained, no_weights=NO_WEIGHTS)
            return ChosenModel(source, source.sampling(SamplingOptions(skip_type=args.skip_type, **shared)))
        source = latent_model(args.resume_base, args.config)
        asked = asked_of_calibration(args, source.config)
        options = SamplingOptions(height=args.H, width=args.W, **shared, **asked)
        return ChosenModel(source, source.sampling(options))

"""A model of any family, chosen by flags, with the way it samples: what the scripts share that take all families."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ddim.linear import LinearPath
from ddim.samplers import Sampler
from qdiff.calibration.trajectories import Trajectories
from qdiff.cli.commandline import number, whole
from qdiff.cli.runs.sampling import record_batches
from qdiff.families import Adapter
from qdiff.utils.team import Team

PIXEL_SAMPLERS = ("generalized", "ddpm_noisy", "dpm_solver")
LATENT_SAMPLERS = ("ddim", "plms", "dpm_solver", "ddpm")
OF_LATENT_MODELS = ("scale", "prompt", "from_file", "classes", "uncond_class", "H", "W")
OF_PIXEL_MODELS = ("use_pretrained", "ckpt", "skip_type")

Predict = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W], t [N]) -> eps, guided where guidance is asked for


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
    start: Callable[[range], Sampler]
    predictor: Callable[[nn.Module, range], Predict]
    decode: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ChosenModel:
    """What the flags ask for, checked; nothing is loaded yet.

    family: "pixel", "latent" or "text", as in MethodOptions. pipeline: of ddim.pipeline or ldm.pipeline. entries: the
    prompts or labels that samples take in turn. batch_size: the configuration's own, None where it has none. weights:
    finds the file of the float weights. build: the float network, its weights of no matter.
    """

    family: str
    adapter: Adapter
    config: Any  # DictConfig
    pipeline: Any
    where: dict[str, str]  # what names the model
    entries: tuple[str | int, ...]
    batch_size: int | None
    weights: Callable[[], Path]
    build: Callable[[], nn.Module]
    load: Callable[[torch.device], LoadedModel]

    @property
    def steps(self) -> int:
        """Sampler steps."""
        return len(self.pipeline.timesteps())

    def path(self) -> LinearPath | None:
        """How errors add up while sampling; None for a sampler that is not linear."""
        try:
            return self.pipeline.path()
        except ValueError:
            return None

    def plain_config(self) -> dict[str, Any]:
        """The configuration's content."""
        plain = OmegaConf.to_container(self.config, resolve=True)
        plain.pop("config_file", None)
        return plain


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
    return _latent_model(args) if latent else _pixel_model(args)


def _pixel_model(args: argparse.Namespace) -> ChosenModel:
    from ddim.noise import ImageNoise
    from ddim.pretrained import build_network, find_pretrained
    from ddim.samplers import make_sampler, to_images
    from qdiff.cli.models.pixel import ADAPTER, load_float_model, make_pipeline, read_config, sampler_of

    args.skip_type = args.skip_type or args.default_skip_type
    config = read_config(args)
    pipeline = make_pipeline(args, config)
    steps = len(pipeline.timesteps())

    def load(device: torch.device) -> LoadedModel:
        model = load_float_model(args, config)
        network = model.network.to(device)
        sample = sampler_of(pipeline, network)

        def start(batch: range) -> Sampler:
            noise = ImageNoise(pipeline.seed, batch, pipeline.shape, device)
            how = {"steps": pipeline.steps, "skip_type": pipeline.skip_type, "eta": pipeline.eta}
            return make_sampler(pipeline.sampler, noise(), betas=pipeline.betas, noise=noise, **how)

        return LoadedModel(
            network,
            model.describe(),
            lambda indices, team: record_batches(sample, steps, indices, team=team),
            start,
            lambda quantized, batch: quantized,
            to_images,
        )

    return ChosenModel(
        "pixel",
        ADAPTER,
        config,
        pipeline,
        {"config": str(args.config)},
        (),
        config.sampling.batch_size,
        lambda: args.ckpt or find_pretrained(config),
        lambda: build_network(config),
        load,
    )


def _latent_model(args: argparse.Namespace) -> ChosenModel:
    from ldm.pretrained import build_network, find_checkpoint, find_config, load_model
    from qdiff.cli.models.conditioning import asked_of_calibration, digest_of, is_conditional, number_of_classes
    from qdiff.cli.models.latent import ADAPTER, latent_size, make_pipeline, origin_of
    from qdiff.cli.models.latent_config import read_config

    checkpoint = find_checkpoint(args.resume_base)
    config = read_config(args.config or find_config(checkpoint))
    entries, nothing, scale = asked_of_calibration(args, config)
    options = {"steps": args.timesteps, "eta": args.eta, "scale": scale, "seed": args.seed}
    flag = f"--timesteps {args.timesteps}"
    pipeline = make_pipeline(config, latent_size(args, config), flag, sampler=args.sample_type, **options)

    def load(device: torch.device) -> LoadedModel:
        model = load_model(config, checkpoint).to(device)
        origin = origin_of(checkpoint) | {"asked_for": digest_of(entries)}
        return _loaded_latent(model, pipeline, entries, nothing, origin)

    return ChosenModel(
        "text" if is_conditional(config) and number_of_classes(config) is None else "latent",
        ADAPTER,
        config,
        pipeline,
        {"checkpoint": str(checkpoint)},
        entries,
        None,
        lambda: checkpoint,
        lambda: build_network(config),
        load,
    )


def _loaded_latent(model, pipeline, entries: tuple, nothing: str | int, origin: dict) -> LoadedModel:
    """A latent model, whose images take the entries in turn from 0 on, as its calibration images do from theirs."""
    from ddim.noise import ImageNoise
    from ddim.samplers import to_images
    from ldm.pipeline import Conditioning
    from ldm.samplers import guided, make_sampler
    from qdiff.cli.models.conditioning import Conditioner, calibration_conditioner
    from qdiff.cli.models.latent import record_latents

    network = model.model.diffusion_model
    like = next(network.parameters())
    calibrating = calibration_conditioner(model, entries, nothing, pipeline.scale)
    asked = Conditioner(model, lambda i: entries[i % len(entries)], nothing, pipeline.scale != 1) if entries else None

    def start(batch: range) -> Sampler:
        noise = ImageNoise(pipeline.seed, batch, pipeline.shape, like.device, like.dtype)
        how = {"steps": pipeline.steps, "betas": pipeline.betas, "eta": pipeline.eta}
        return make_sampler(pipeline.sampler, noise(), noise=noise, **how)

    def predictor(quantized: nn.Module, batch: range) -> Predict:
        if asked is None:
            return guided(quantized, None, None, pipeline.scale)
        seen: Conditioning = asked(batch).to(like.device, like.dtype)
        return guided(quantized, seen.context, seen.unconditional, pipeline.scale)

    return LoadedModel(
        network,
        origin,
        lambda indices, team: record_latents(pipeline, network, calibrating, indices, team),
        start,
        predictor,
        lambda x: to_images(model.decode_first_stage(x).float()),
    )

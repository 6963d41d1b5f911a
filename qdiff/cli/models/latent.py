"""What the scripts of the latent models share: the float model, conditioning, a run from its plan to its images."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ddim.pretrained import sha256
from ddim.samplers import to_images
from ldm.models.diffusion.models import LatentDiffusion
from ldm.pipeline import Pipeline
from ldm.pretrained import build_network, load_model
from ldm.samplers import sampler_timesteps
from ldm.schedules import betas_of
from qdiff.calibration.trajectories import Trajectories, concatenate
from qdiff.cli.commandline import print_plan, start_log, warn_without_effect
from qdiff.cli.models.conditioning import Conditioner, Entry, calibration_conditioner, digest_of, is_conditional
from qdiff.cli.quantize import Inputs, QuantizationPlan, calibrate_and_write, read_inputs, warn_of_other_sampler
from qdiff.cli.runs.outputs import Kept, describe_kept
from qdiff.cli.runs.sampling import (
    ALONE,
    FIRST_CALIBRATION_IMAGE,
    Sample,
    batches,
    describe_runtime,
    open_run,
    prepared,
    record_batches,
    sample_batches,
    warn_of_start,
)
from qdiff.evaluation.runs import LABELS_NAME, PROMPTS_NAME
from qdiff.families import adapter_for
from qdiff.utils.files import write_text
from qdiff.utils.team import Team

logger = logging.getLogger(__name__)
ADAPTER = adapter_for("ldm")


def downsampling(config: DictConfig) -> int:
    """Pixels per latent along an axis."""
    params = config.model.params.first_stage_config.get("params") or {}
    return 2 ** (len(params["ddconfig"]["ch_mult"]) - 1) if "ddconfig" in params else 1


def latent_size(args: argparse.Namespace, config: DictConfig) -> tuple[int, int]:
    """(h, w) of the latents. Raises ValueError where --H, --W, --C or --f do not fit the model."""
    params = config.model.params
    own_sizes = {"C": params.channels, "f": downsampling(config)}
    for flag, own in own_sizes.items():
        given = getattr(args, flag, None)
        if given not in (None, own):
            raise ValueError(f"--{flag} {given}: the model has {own}")
    factor = downsampling(config)
    step = factor * 2 ** (len(params.unet_config.params.channel_mult) - 1)
    size = []
    for flag, given in (("H", args.H), ("W", args.W)):
        pixels = params.image_size * factor if given is None else given
        if pixels % step:
            raise ValueError(f"--{flag} {pixels}: expected a multiple of {step} for this model")
        size.append(pixels // factor)
    return size[0], size[1]


def make_pipeline(config: DictConfig, size: tuple[int, int], steps_flag: str, **options) -> Pipeline:
    """The sampling pipeline of a configuration for latents of `size` (h, w).

    Raises ValueError for wrong options, naming the flag that gave `steps` where it is to blame.
    """
    params = config.model.params
    betas = betas_of(params)
    try:
        sampler_timesteps(options["sampler"], steps=options["steps"], num_timesteps=len(betas))
    except ValueError as error:
        raise ValueError(f"{steps_flag}: {error}") from error
    return Pipeline((params.channels, *size), betas, **options)


def origin_of(checkpoint: Path) -> dict[str, str]:
    """Provenance of weights: file name and SHA-256."""
    return {"source": checkpoint.name, "source_sha256": sha256(checkpoint)}


@dataclass(frozen=True)
class LatentPlan:
    """What a run will do. `entries` hold the prompt or label of every image and are empty for unconditional models;
    those of the calibration images are taken in turn from `calibration_entries`."""

    args: argparse.Namespace
    config: DictConfig
    checkpoint: Path
    pipeline: Pipeline
    device: torch.device
    quantization: QuantizationPlan
    parent: Path  # of the run's folder, which is named after date and time
    images: int
    batch_size: int
    picture: str  # path of an image in the run's folder, with its index as {}
    entries: tuple[Entry, ...] = ()
    calibration_entries: tuple[Entry, ...] = ()
    nothing: Entry = ""
    fixed_code: bool = False  # the images of every batch start from the same noise
    autocast: bool = False

    def path_of(self, folder: Path, index: int) -> Path:
        """Where an image lies."""
        return folder / self.picture.format(index)

    def kept(self, folder: Path) -> Kept:
        """What the run in `folder` keeps of its images."""
        return Kept(self.args, folder, partial(self.path_of, folder), tuple(self.indices()), self.device)

    def paths(self, folder: Path) -> list[Path]:
        """Where all images lie."""
        return [self.path_of(folder, index) for index in range(self.images)]

    def indices(self) -> list[range]:
        """The batches of image indices."""
        return list(batches(0, self.images, self.batch_size))

    def describe(self) -> dict:
        """Plain data for --dry_run, and to know the run again that is to be gone on with."""
        recipe = self.quantization.recipe
        return {
            "checkpoint": str(self.checkpoint),
            "images": self.images,
            "batch_size": self.batch_size,
            "latents": list(self.pipeline.shape),
            **self.pipeline.describe(),
            "fixed_code": self.fixed_code,
            "autocast": self.autocast,
            "asked_for": digest_of(self.entries),
            "calibrated_on": None if recipe is None else digest_of(self.calibration_entries),
            **self.quantization.describe(),
            **describe_runtime(self.args),
            **describe_kept(self.args, Path(self.picture).parent.as_posix()),
            "config": OmegaConf.to_container(self.config, resolve=True),
        }


def latents_of(
    pipeline: Pipeline, network: nn.Module, conditioner: Conditioner | None, codes: int | None = None
) -> Sample:
    """Latents of a batch of image indices; images start from the noise of their place in the batch of `codes`."""

    def sample(batch: range, observe: Callable) -> Tensor:
        conditioning = None if conditioner is None else conditioner(batch)
        starts = None if codes is None else [index % codes for index in batch]
        return pipeline.sample(network, batch, conditioning, observe, starts)

    return sample


def record_latents(
    pipeline: Pipeline,
    network: nn.Module,
    conditioner: Conditioner | None,
    indices: Sequence[range],
    team: Team = ALONE,
) -> Iterator[tuple[range, Trajectories]]:
    """(image indices, float sampling states with their conditioning) of each batch of seeds, of the team's part."""

    def conditioning(batch: range) -> dict[str, Tensor]:
        if conditioner is None:
            return {}
        found = conditioner(batch)
        columns = {"cs": found.context, "ucs": found.unconditional}
        return {key: column for key, column in columns.items() if column is not None}

    sample, steps = latents_of(pipeline, network, conditioner), len(pipeline.timesteps())
    return record_batches(sample, steps, indices, conditioning, team)


def execute(plan: LatentPlan, team: Team, wanted: Callable[[Path], list[Path]] | None = None) -> Path | None:
    """Carry out a plan: calibrate or load, sample, write the images. Returns the run's folder, None for --dry_run.

    An unfinished run of the same plan is gone on with: its calibration is not done again, nor are its full batches.
    wanted: folder -> the files without which a run is unfinished (default: the images).
    """
    plan = replace(plan, device=team.device or plan.device)
    args, quantization, pipeline = plan.args, plan.quantization, plan.pipeline
    if args.dry_run:
        print_plan(plan.describe() | {"folder": str(plan.parent / "<date-time>")}, quantization.recipe)
        return None
    conditional = is_conditional(plan.config)
    build = partial(build_network, plan.config)
    inputs = read_inputs(
        *(quantization, ADAPTER, build, pipeline.shape, pipeline.timesteps(), conditional, pipeline.path)
    )
    needed = inputs.loaded is None or quantization.recipe is not None  # a packed network may stand in for the float one
    model = load_model(plan.config, plan.checkpoint, network=needed).to(plan.device)
    recipe = quantization.recipe or inputs.recipe  # of what is loaded, flags decide how much is used
    description = plan.describe() | {"recipe": None if recipe is None else recipe.to_dict()}
    wanted = wanted or plan.paths
    with open_run(plan.parent, description, wanted, args.resume_calibration, team) as (folder, continued):
        start_log(folder, args.verbose, team.rank)
        if continued and team.leads:
            there = plan.kept(folder).count()
            print(f"going on with {folder}: {there} of {plan.images} images are there")
        if plan.entries and team.leads:
            name = PROMPTS_NAME if isinstance(plan.entries[0], str) else LABELS_NAME
            write_text(folder / name, "".join(f"{entry}\n" for entry in plan.entries))
        label = inputs.label(quantization)
        logger.info("%s model from %s", label, plan.checkpoint)
        warn_without_effect(args)
        warn_of_start(pipeline)
        network = quantized_network(plan, inputs, model, folder, team)
        warn_of_other_sampler(network, pipeline.timesteps())
        del inputs  # what runs may take less memory than what was loaded
        if args.ptq:
            release_network(model)
        network = prepared(network, ADAPTER, args, plan.device, team)
        write_images(plan, model, network, folder, team)
        if team.leads:
            kept = plan.kept(folder)
            print(*kept.finish(), f"{plan.images} images of the {label} model in {kept.place}", sep="\n")
    return folder


def release_network(model: LatentDiffusion) -> None:
    """Give up the float network; first stage and conditioning stay."""
    model.model.diffusion_model = nn.Identity()


def quantized_network(plan: LatentPlan, inputs: Inputs, model: LatentDiffusion, folder: Path, team: Team) -> nn.Module:
    """The network that samples: float, loaded, or calibrated."""
    network = model.model.diffusion_model
    if plan.quantization.recipe is None:
        return network if inputs.loaded is None else inputs.loaded

    def record(count: int) -> Trajectories:
        conditioner = calibration_conditioner(model, plan.calibration_entries, plan.nothing, plan.pipeline.scale)
        indices = list(batches(FIRST_CALIBRATION_IMAGE, count, plan.batch_size))
        found = record_latents(plan.pipeline, network, conditioner, indices, team)
        return concatenate(team.gather([part for _, part in found], len(indices)))

    provenance = {"sampling": plan.pipeline.describe(), **origin_of(plan.checkpoint)}
    return calibrate_and_write(
        *(plan.quantization, inputs, ADAPTER, network, record, folder, provenance, team, plan.pipeline.path)
    )


@torch.no_grad()
def write_images(plan: LatentPlan, model: LatentDiffusion, network: nn.Module, folder: Path, team: Team) -> None:
    """Sample and write every batch of which an image is missing. Returns when all processes have."""
    kept, conditioner = plan.kept(folder), None
    if plan.entries:
        conditioner = Conditioner(model, plan.entries.__getitem__, plan.nothing, plan.pipeline.scale != 1)
        _warn_of_long_prompts(model, plan.entries)
    latents = latents_of(plan.pipeline, network, conditioner, plan.batch_size if plan.fixed_code else None)

    def sample(batch: range, observe: Callable) -> Tensor:
        with _precision(plan):
            return to_images(model.decode_first_stage(latents(batch, observe)).float())

    steps, todo = len(plan.pipeline.timesteps()), kept.missing(team)
    for batch, images in sample_batches(sample, steps, todo, "sampling", team=team):
        kept.write(batch, images)
    team.wait()


def _warn_of_long_prompts(model: LatentDiffusion, entries: Sequence[Entry]) -> None:
    encoder = model.cond_stage_model
    if not hasattr(encoder, "count_tokens"):
        return
    for prompt in dict.fromkeys(entries):
        if (tokens := encoder.count_tokens(prompt)) > encoder.max_length:
            logger.warning("%r has %d tokens, the text encoder sees %d", prompt, tokens, encoder.max_length)


def _precision(plan: LatentPlan) -> AbstractContextManager:
    """Half precision products on a GPU where asked for; CPUs gain nothing by them."""
    if plan.autocast and plan.device.type == "cuda":
        return torch.autocast(plan.device.type, torch.float16)
    return nullcontext()

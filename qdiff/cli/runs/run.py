"""A sampling run of any family, from its plan to its images: the same for every script that samples."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from qdiff.api.sampling import Observer, batches, record, sample_batches
from qdiff.cli.command import print_plan, start_log
from qdiff.cli.models.conditioning import digest_of
from qdiff.cli.quantize import Inputs, QuantizationPlan, calibrate_and_write, read_inputs, warn_of_other_sampler
from qdiff.cli.recipe_flags import warn_without_effect
from qdiff.cli.runs.outputs import Kept, KeptOptions, describe_kept
from qdiff.cli.runs.sampling import describe_runtime, open_run, prepared, warn_of_start
from qdiff.evaluation.runs import LABELS_NAME, PROMPTS_NAME
from qdiff.families.source import FloatModel, Sampling, Source, sample
from qdiff.utils.files import write_text
from qdiff.utils.team import Team

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPlan:
    """What a run will do.

    sampling: with the prompt or label of every image, where the model takes them; calibrating: with those that the
    calibration images take in turn. parent: of the run's folder, which is named after date and time. picture: path of
    an image in the run's folder, with its index as {}. fixed_code: the images of every batch start from the same noise.
    notes: lines of warning.
    """

    args: argparse.Namespace
    source: Source
    sampling: Sampling
    calibrating: Sampling
    device: torch.device
    quantization: QuantizationPlan
    parent: Path
    images: int
    batch_size: int
    picture: str
    fixed_code: bool = False
    autocast: bool = False
    notes: tuple[str, ...] = ()

    @property
    def pipeline(self) -> Any:
        """How images are sampled."""
        return self.sampling.pipeline

    def path_of(self, folder: Path, index: int) -> Path:
        """Where an image lies."""
        return folder / self.picture.format(index)

    def kept(self, folder: Path) -> Kept:
        """What the run in `folder` keeps of its images."""
        return Kept(
            KeptOptions.of(self.args), folder, partial(self.path_of, folder), tuple(self.indices()), self.device
        )

    def paths(self, folder: Path) -> list[Path]:
        """Where all images lie."""
        return [self.path_of(folder, index) for index in range(self.images)]

    def indices(self) -> list[range]:
        """The batches of image indices."""
        return list(batches(0, self.images, self.batch_size))

    def describe(self) -> dict[str, Any]:
        """Plain data for --dry_run, and to know the run again that is to be gone on with."""
        common = {"images": self.images, "batch_size": self.batch_size}
        rest = {
            **self.quantization.describe(),
            **describe_runtime(self.args),
            **describe_kept(KeptOptions.of(self.args), Path(self.picture).parent.as_posix()),
        }
        config = OmegaConf.to_container(self.source.config, resolve=True)
        if self.source.kind == "pixel":
            weights = {"weights": str(self.args.ckpt or self.source.config.get("pretrained"))}
            sequence = {"sequence": self.args.sequence}
            return self.source.where | common | self.pipeline.describe() | sequence | rest | weights | {"model": config}
        recipe = self.quantization.recipe
        asked = {
            "fixed_code": self.fixed_code,
            "autocast": self.autocast,
            "asked_for": digest_of(self.sampling.entries),
            "calibrated_on": None if recipe is None else digest_of(self.calibrating.entries),
        }
        latents = {"latents": list(self.pipeline.shape)}
        return self.source.where | common | latents | self.pipeline.describe() | asked | rest | {"config": config}


Images = Callable[[RunPlan, FloatModel, nn.Module, Path, Team], None]  # samples and writes what is missing


def execute(
    plan: RunPlan, team: Team, wanted: Callable[[Path], list[Path]] | None = None, write: Images | None = None
) -> Path | None:
    """Carry out a plan: calibrate or load, sample, write the images. Returns the run's folder, None for --dry_run.

    An unfinished run of the same plan is gone on with: its calibration is not done again, nor are its full batches.
    wanted: folder -> the files without which a run is unfinished (default: the images). write: see `write_images`.
    """
    plan = replace(plan, device=team.device or plan.device)
    args, quantization, pipeline = plan.args, plan.quantization, plan.pipeline
    if args.dry_run:
        shown = {"device": str(plan.device), "folder": str(plan.parent / "<date-time>")}
        print_plan(plan.describe() | shown, quantization.recipe)
        return None
    conditional = bool(plan.sampling.entries)
    inputs = read_inputs(
        quantization,
        plan.source.adapter,
        plan.source.build,
        pipeline.shape,
        pipeline.timesteps(),
        conditional,
        pipeline.path,
    )
    needed = inputs.loaded is None or quantization.recipe is not None  # a packed network may stand in for the float one
    model = plan.source.load(plan.device, network=needed)
    recipe = quantization.recipe or inputs.recipe  # of what is loaded, flags decide how much is used
    description = plan.describe() | {"recipe": None if recipe is None else recipe.to_dict()}
    wanted = wanted or plan.paths
    with open_run(plan.parent, description, wanted, args.resume_calibration, team) as (folder, continued):
        start_log(folder, args.verbose, team.rank)
        _tell_of_start(plan, folder, continued, inputs.label(quantization), needed, team)
        network = _network(plan, inputs, model, folder, team)
        warn_of_other_sampler(network, pipeline.timesteps())
        label = inputs.label(quantization)
        del inputs  # what runs may take less memory than what was loaded
        if args.ptq:
            model.without_network()
        network = prepared(network, plan.source.adapter, args, plan.device, team)
        (write or write_images)(plan, model, network, folder, team)
        if team.is_main:
            kept = plan.kept(folder)
            print(*kept.finish(), f"{plan.images} images of the {label} model in {kept.place}", sep="\n")
    return folder


def _tell_of_start(plan: RunPlan, folder: Path, continued: bool, label: str, needed: bool, team: Team) -> None:
    """What the log and the screen say before the work, and the prompts or labels of a run, as a file."""
    if continued and team.is_main:
        there = plan.kept(folder).count()
        print(f"going on with {folder}: {there} of {plan.images} images are there")
    entries = plan.sampling.entries
    if entries and team.is_main:
        name = PROMPTS_NAME if isinstance(entries[0], str) else LABELS_NAME
        write_text(folder / name, "".join(f"{entry}\n" for entry in entries))
    pixel_alone = plan.source.kind == "pixel" and not needed  # whose float weights nobody has to have
    logger.info("%s model from %s", label, plan.args.cali_ckpt if pixel_alone else plan.source.weights())
    for note in plan.notes:
        logger.warning(note)
    warn_without_effect(plan.quantization.options)
    warn_of_start(plan.pipeline)


def _network(plan: RunPlan, inputs: Inputs, model: FloatModel, folder: Path, team: Team) -> nn.Module:
    """The network that samples: float, loaded, or calibrated."""
    if plan.quantization.recipe is None:
        return model.network if inputs.loaded is None else inputs.loaded
    return calibrate_and_write(
        plan.quantization,
        inputs,
        plan.source.adapter,
        model.network,
        lambda count: record(model, plan.calibrating, model.network, count, plan.batch_size, team),
        folder,
        {"sampling": plan.pipeline.describe(), **model.origin},
        team,
        plan.pipeline.path,
    )


@torch.no_grad()
def write_images(
    plan: RunPlan,
    model: FloatModel,
    network: nn.Module,
    folder: Path,
    team: Team,
    observe: Callable[[range], Observer | None] | None = None,
) -> None:
    """Sample and write every batch of which an image is missing. Returns when all processes have.

    observe: batch -> who is shown its network calls.
    """
    kept = plan.kept(folder)
    for line in model.warnings(plan.sampling):
        logger.warning(line)

    def images(batch: range, watch: Observer) -> Tensor:
        codes = [index % plan.batch_size for index in batch] if plan.fixed_code else None
        with _precision(plan):
            return model.decode(sample(model, plan.sampling, network, batch, watch, codes=codes))

    for batch, found in sample_batches(images, plan.sampling.steps, kept.missing(team), "sampling", observe, team):
        kept.write(batch, found)
    team.wait()


def _precision(plan: RunPlan) -> AbstractContextManager:
    """Half precision products on a GPU where asked for; CPUs gain nothing by them."""
    if plan.autocast and plan.device.type == "cuda":
        return torch.autocast(plan.device.type, torch.float16)
    return nullcontext()

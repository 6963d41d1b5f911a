"""Calibrate a pixel diffusion model (CIFAR-10, LSUN), or load a calibrated one, and sample images.

Takes the command lines of the Q-Diffusion repository. Writes <logdir>/samples/<date-time>/ with run.log, img/0.png,
1.png, ... and after a calibration ckpt.safetensors (packed) and ckpt.pth (the original's format).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ddim.images import save_png
from ddim.pipeline import Pipeline
from ddim.pretrained import build_network
from qdiff.cli.commandline import (
    add_quantization_flags,
    add_run_flags,
    add_runtime_flags,
    add_team_flags,
    check_runtime_flags,
    make_parser,
    print_plan,
    start_log,
    warn_without_effect,
    whole,
)
from qdiff.cli.models.pixel import (
    ADAPTER,
    add_model_flags,
    add_sampling_flags,
    load_float_model,
    make_pipeline,
    read_config,
    record,
    sampler_of,
)
from qdiff.cli.quantize import (
    QuantizationPlan,
    calibrate_and_write,
    plan_quantization,
    read_inputs,
    warn_of_other_sampler,
)
from qdiff.cli.runs.outputs import Kept, add_kept_flags, check_kept_flags, describe_kept
from qdiff.cli.runs.sampling import batches, describe_runtime, open_run, prepared, sample_batches, warn_of_start
from qdiff.utils.devices import choose_device
from qdiff.utils.fabric_team import start_team
from qdiff.utils.team import Team

logger = logging.getLogger(__name__)
FOLDER = "img"  # of the images in a run's folder


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    add_model_flags(parser)
    add_sampling_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-l", "--logdir", default="none", help="output folder; none means outputs/ddim")
    group.add_argument("--max_images", type=whole(1), default=50000, help="number of images")
    group.add_argument("--sequence", action="store_true", help="also keep the sampling sequence of the first batch")
    group.add_argument("--cond", action="store_true", help="no effect: these models are unconditional")
    add_quantization_flags(parser)
    add_runtime_flags(parser)
    add_kept_flags(parser)
    add_run_flags(parser)
    add_team_flags(parser)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Plan:
    """What a run will do; `folder` becomes the run's own, named after date and time, when the run starts."""

    args: argparse.Namespace
    config: DictConfig
    pipeline: Pipeline
    device: torch.device
    quantization: QuantizationPlan
    folder: Path

    def describe(self) -> dict:
        """Plain data for --dry_run."""
        return {
            "config": str(self.args.config),
            "images": self.args.max_images,
            "batch_size": self.config.sampling.batch_size,
            **self.pipeline.describe(),
            "sequence": self.args.sequence,
            **self.quantization.describe(),
            **describe_runtime(self.args),
            **describe_kept(self.args, FOLDER),
            "weights": str(self.args.ckpt or self.config.get("pretrained")),
            "model": OmegaConf.to_container(self.config, resolve=True),
        }

    def kept(self, folder: Path) -> Kept:
        """The files of the run in `folder`."""
        indices = batches(0, self.args.max_images, self.config.sampling.batch_size)
        path_of = lambda index: folder / FOLDER / f"{index}.png"  # noqa: E731
        return Kept(self.args, folder, path_of, tuple(indices), self.device)


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the flags and turn them into a plan. Raises ValueError naming the flag at fault."""
    config = read_config(args)
    pipeline = make_pipeline(args, config)
    quantization = plan_quantization(args, len(pipeline.timesteps()), f"--timesteps {args.timesteps}")
    device = choose_device(args.device)
    check_runtime_flags(args, device)
    check_kept_flags(args, pipeline.shape)
    folder = Path("outputs/ddim" if args.logdir == "none" else args.logdir) / "samples"
    return Plan(args, config, pipeline, device, quantization, folder)


def sample(plan: Plan, network: nn.Module, team: Team) -> None:
    """Write img/0.png, 1.png, ..., and with --sequence the states of the first batch after every step.

    Batches of which all images are there are not sampled again. Returns when all processes have done theirs.
    """
    files = plan.kept(plan.folder)
    indices = files.missing(team)
    kept: list[torch.Tensor] = []

    def observe(batch: range):
        return (lambda call: kept.append(call.x.cpu())) if plan.args.sequence and batch.start == 0 else None

    steps, sampler = len(plan.pipeline.timesteps()), sampler_of(plan.pipeline, network)
    for batch, images in sample_batches(sampler, steps, indices, "sampling", observe, team):
        files.write(batch, images)
    if kept:
        (plan.folder / "sequence").mkdir(exist_ok=True)
    for step, states in enumerate(kept):
        for index, state in enumerate(states):
            save_png(((state + 1) / 2).clamp(0, 1), plan.folder / "sequence" / f"{index}_{step:04d}.png")
    team.wait()


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    plan = make_plan(args)
    if args.dry_run:
        shown = plan.describe() | {"device": str(plan.device), "folder": str(plan.folder / "<date-time>")}
        print_plan(shown, plan.quantization.recipe)
        return
    with start_team(args, plan.device) as team:
        execute(replace(plan, device=team.device or plan.device), team)


def execute(plan: Plan, team: Team) -> None:
    """Carry out a plan: calibrate or load, sample, write the images. An unfinished run of the plan is gone on with."""
    args, quantization, pipeline = plan.args, plan.quantization, plan.pipeline
    inputs = read_inputs(
        *(quantization, ADAPTER, lambda: build_network(plan.config)),
        *(pipeline.shape, pipeline.timesteps()),
        path=pipeline.path,
    )
    model = load_float_model(args, plan.config) if quantization.loads is None else None
    recipe = quantization.recipe or inputs.recipe  # of what is loaded, flags decide how much is used
    description = plan.describe() | {"recipe": None if recipe is None else recipe.to_dict()}
    wanted = lambda folder: plan.kept(folder).all_files()  # noqa: E731
    with open_run(plan.folder, description, wanted, args.resume_calibration, team) as (folder, continued):
        plan = replace(plan, folder=folder)
        start_log(plan.folder, args.verbose, team.rank)
        if continued and team.leads:
            there = plan.kept(folder).count()
            print(f"going on with {folder}: {there} of {args.max_images} images are there")
        label = inputs.label(quantization)
        logger.info("%s model from %s", label, args.cali_ckpt if model is None else model.source)
        if args.cond:
            logger.warning("--cond: no effect, pixel models are unconditional")
        warn_without_effect(args)
        warn_of_start(pipeline)
        network = inputs.loaded
        if model is not None:
            network = model.network.to(plan.device)
        if quantization.recipe is not None:
            provenance = {"sampling": pipeline.describe(), **model.describe()}
            batch_size = plan.config.sampling.batch_size
            network = calibrate_and_write(
                *(quantization, inputs, ADAPTER, network),
                lambda count: record(pipeline, model.network, count, batch_size, team),
                plan.folder,
                provenance,
                team,
                pipeline.path,
            )
        warn_of_other_sampler(network, pipeline.timesteps())
        inputs = model = None  # what runs may take less memory than what was calibrated or loaded
        network = prepared(network, ADAPTER, args, plan.device, team)
        sample(plan, network, team)
        if team.leads:
            kept = plan.kept(plan.folder)
            print(*kept.finish(), f"{args.max_images} images of the {label} model in {kept.place}", sep="\n")

#!/usr/bin/env python
"""Calibrate a pixel diffusion model (CIFAR-10, LSUN), or load a calibrated one, and sample images.

Takes the command lines of the Q-Diffusion repository. Writes <logdir>/samples/<date-time>/ with run.log, img/0.png,
1.png, ... and after a calibration ckpt.safetensors (packed) and ckpt.pth (the original's format).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from pixel_model import (
    ADAPTER,
    FloatModel,
    add_model_flags,
    add_sampling_flags,
    batches,
    load_float_model,
    make_pipeline,
    read_config,
    record,
    sample_batches,
)
from torch import nn

from ddim.images import save_png
from ddim.pipeline import Pipeline
from ddim.pretrained import build_network
from qdiff.calibration.runner import Calibration, calibrate
from qdiff.calibration.selectors import select
from qdiff.calibration.trajectories import Trajectories, load_trajectories
from qdiff.commandline import (
    BarProgress,
    add_quantization_flags,
    add_run_flags,
    choose_device,
    chosen_recipe,
    load_calibrated,
    make_parser,
    print_plan,
    run_main,
    start_log,
    timestamp,
    write_calibrated,
)
from qdiff.methods import for_given_weights
from qdiff.spec import Recipe

logger = logging.getLogger(__name__)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    add_model_flags(parser)
    add_sampling_flags(parser)
    group = parser.add_argument_group("output")
    group.add_argument("-l", "--logdir", default="none", help="output folder; none means outputs/ddim")
    group.add_argument("--max_images", type=int, default=50000, help="number of images")
    group.add_argument("--sequence", action="store_true", help="also keep the sampling sequence of the first batch")
    group.add_argument("--cond", action="store_true", help="no effect: these models are unconditional")
    add_quantization_flags(parser)
    add_run_flags(parser)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Plan:
    """What a run will do. `recipe` is None when nothing is calibrated; `loads` is the checkpoint that is resumed."""

    args: argparse.Namespace
    config: DictConfig
    pipeline: Pipeline
    recipe: Recipe | None
    loads: Path | None
    folder: Path

    def describe(self) -> dict:
        """Plain data for --dry_run."""
        return {
            "config": str(self.args.config),
            "images": self.args.max_images,
            **self.pipeline.describe(),
            "device": str(choose_device(self.args.device)),
            "calibrated_checkpoint": None if self.args.cali_ckpt is None else str(self.args.cali_ckpt),
            "calibration_data": None if self.recipe is None else str(self.args.cali_data_path or "made by this run"),
            "folder": str(self.folder),
        }


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the flags against one another and turn them into a plan. Raises ValueError naming the flag at fault."""
    config = read_config(args)
    if args.max_images < 1:
        raise ValueError(f"--max_images {args.max_images}: expected at least 1")
    if (args.resume or args.resume_w) and args.cali_ckpt is None:
        raise ValueError(f"--resume{'_w' * args.resume_w}: needs --cali_ckpt FILE, the calibrated checkpoint")
    if args.resume_w and not args.quant_act:
        raise ValueError("--resume_w: calibrates activations, so it needs --quant_act")
    if not args.ptq and (args.cali_ckpt is not None or args.recipe is not None or args.method is not None):
        raise ValueError("--cali_ckpt, --recipe and --method quantize: give --ptq with them")
    calibrates = args.ptq and (args.cali_ckpt is None or args.resume_w)
    recipe = chosen_recipe(args) if args.ptq else None
    if args.resume_w:
        recipe = for_given_weights(recipe)
    logdir = Path("outputs/ddim" if args.logdir == "none" else args.logdir)
    return Plan(
        args,
        config,
        make_pipeline(args, config),
        recipe if calibrates else None,
        args.cali_ckpt if args.ptq and not calibrates else None,
        logdir / "samples" / timestamp(),
    )


def calibration_data(plan: Plan) -> Trajectories | None:
    """The states that --cali_data_path names, checked; None when this run makes its own."""
    if plan.args.cali_data_path is None:
        return None
    trajectories = load_trajectories(plan.args.cali_data_path, plan.pipeline.shape)
    select(trajectories, plan.recipe.selector)
    return trajectories


def calibrated(
    plan: Plan, model: FloatModel, trajectories: Trajectories | None, weights: nn.Module | None
) -> nn.Module:
    """Calibrate the float model by the plan's recipe and write both checkpoints."""
    args, recipe = plan.args, plan.recipe
    network = model.network.to(choose_device(args.device))
    if trajectories is None:
        trajectories = record(plan.pipeline, network, recipe.selector.per_step, plan.config.sampling.batch_size)
    run: Calibration = calibrate(
        network,
        ADAPTER,
        recipe,
        select(trajectories, recipe.selector),
        args.seed,
        trajectories.timesteps,
        BarProgress(),
        weights_from=weights,
    )
    provenance = {"seed": args.seed, "sampling": plan.pipeline.describe(), **model.describe()}
    write_calibrated(plan.folder, run, trajectories.timesteps, provenance)
    return run.network


def sample(plan: Plan, network: nn.Module) -> None:
    """Write img/0.png, 1.png, ..., and with --sequence the states of the first batch after every step."""
    (plan.folder / "img").mkdir(exist_ok=True)
    indices = list(batches(0, plan.args.max_images, plan.config.sampling.batch_size))
    kept: list[torch.Tensor] = []

    def observe(batch: range):
        return (lambda call: kept.append(call.x.cpu())) if plan.args.sequence and batch.start == 0 else None

    for batch, images in sample_batches(plan.pipeline, network, indices, "sampling", observe):
        for index, image in zip(batch, images, strict=True):
            save_png(image, plan.folder / "img" / f"{index}.png")
        logger.info("images %d to %d", batch.start, batch.stop - 1)
    if kept:
        (plan.folder / "sequence").mkdir(exist_ok=True)
    for step, states in enumerate(kept):
        for index, state in enumerate(states):
            save_png(((state + 1) / 2).clamp(0, 1), plan.folder / "sequence" / f"{index}_{step:04d}.png")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    plan = make_plan(args)
    if args.dry_run:
        print_plan(plan.describe(), plan.recipe)
        return
    loaded = None
    if args.ptq and args.cali_ckpt is not None:  # before anything is written, so that a bad file leaves no trace
        loaded, _ = load_calibrated(args, lambda: build_network(plan.config), ADAPTER)
    model = load_float_model(args, plan.config) if plan.loads is None else None
    trajectories = calibration_data(plan) if plan.recipe is not None else None
    start_log(plan.folder, args.verbose)
    if args.cond:
        logger.warning("--cond: no effect, pixel models are unconditional")
    if plan.recipe is not None:
        network = calibrated(plan, model, trajectories, loaded)
    else:
        network = loaded if loaded is not None else model.network
    sample(plan, network.to(choose_device(args.device)))
    print(f"{args.max_images} images in {plan.folder / 'img'}")


if __name__ == "__main__":
    run_main(main)

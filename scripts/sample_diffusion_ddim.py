#!/usr/bin/env python
"""Calibrate a pixel diffusion model (CIFAR-10, LSUN), or load a calibrated one, and sample images.

Takes the command lines of the Q-Diffusion repository. Writes <logdir>/samples/<date-time>/ with run.log, img/0.png,
1.png, ... and after a calibration ckpt.safetensors (packed) and ckpt.pth (the original's format).
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from qdiff.calibration.runner import Calibration, calibrate, take_weights
from qdiff.calibration.selectors import select
from qdiff.calibration.trajectories import Trajectories, load_trajectories
from qdiff.commandline import (
    BarProgress,
    add_quantization_flags,
    add_run_flags,
    bits_label,
    choose_device,
    chosen_recipe,
    load_calibrated,
    make_parser,
    new_folder,
    print_plan,
    run_main,
    start_log,
    warn_without_effect,
    whole,
    write_calibrated,
)
from qdiff.methods import for_given_weights
from qdiff.spec import Recipe
from qdiff.surgery import insert_quantizers

logger = logging.getLogger(__name__)
# Flags without effect on the float model, so that a forgotten --ptq does not go unnoticed.
QUANTIZING = ("cali_ckpt", "recipe", "method", "resume", "resume_w", "quant_act", "weight_bit")


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
    add_run_flags(parser)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Plan:
    """What a run will do. `recipe` is None when nothing is calibrated; `loads` is the checkpoint that is resumed;
    `folder` becomes the run's own, named after date and time, when the run starts."""

    args: argparse.Namespace
    config: DictConfig
    pipeline: Pipeline
    device: torch.device
    recipe: Recipe | None
    loads: Path | None
    folder: Path

    def describe(self) -> dict:
        """Plain data for --dry_run."""
        return {
            "config": str(self.args.config),
            "images": self.args.max_images,
            **self.pipeline.describe(),
            "device": str(self.device),
            "calibrated_checkpoint": None if self.args.cali_ckpt is None else str(self.args.cali_ckpt),
            "calibration_data": None if self.recipe is None else str(self.args.cali_data_path or "made by this run"),
            "folder": str(self.folder / "<date-time>"),
        }


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the flags against one another and turn them into a plan. Raises ValueError naming the flag at fault."""
    config = read_config(args)
    for flag in QUANTIZING:
        if not args.ptq and getattr(args, flag):
            raise ValueError(f"--{flag}: quantizes, so it needs --ptq")
    if args.resume and args.resume_w:
        raise ValueError("--resume, --resume_w: one loads everything, the other the weights; give one of them")
    if (args.resume or args.resume_w) and args.cali_ckpt is None:
        raise ValueError(f"--resume{'_w' * args.resume_w}: needs --cali_ckpt FILE, the calibrated checkpoint")
    if args.resume_w and not args.quant_act:
        raise ValueError("--resume_w: calibrates activations, so it needs --quant_act")
    calibrates = args.ptq and (args.cali_ckpt is None or args.resume_w)
    recipe = chosen_recipe(args) if args.ptq else None
    if args.resume_w:
        recipe = for_given_weights(recipe)
    pipeline = make_pipeline(args, config)
    if calibrates and args.cali_data_path is None and recipe.selector.steps > (steps := len(pipeline.timesteps())):
        raise ValueError(f"--cali_st {recipe.selector.steps}: --timesteps {args.timesteps} makes only {steps} steps")
    return Plan(
        args,
        config,
        pipeline,
        choose_device(args.device),
        recipe if calibrates else None,
        args.cali_ckpt if args.ptq and not calibrates else None,
        Path("outputs/ddim" if args.logdir == "none" else args.logdir) / "samples",
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
    network = model.network.to(plan.device)
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


def check_structure(
    plan: Plan, model: FloatModel, trajectories: Trajectories | None, weights: nn.Module | None
) -> None:
    """Raise ValueError where the recipe or the given weights do not fit the network, before the work begins."""
    timesteps = plan.pipeline.timesteps() if trajectories is None else trajectories.timesteps
    network = insert_quantizers(copy.deepcopy(model.network), plan.recipe, ADAPTER, timesteps)
    if weights is None:
        return
    try:
        take_weights(network, weights)
    except ValueError as error:
        reason = f"contradicts the flags (--weight_bit, --split) or the recipe: {error}"
        raise ValueError(f"--resume_w {plan.args.cali_ckpt}: {reason}") from error


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    plan = make_plan(args)
    if args.dry_run:
        print_plan(plan.describe(), plan.recipe)
        return
    # Whatever can fail is read before anything is written, so that a bad file leaves no trace.
    loaded, loaded_recipe = None, None
    if args.ptq and args.cali_ckpt is not None:
        loaded, loaded_recipe = load_calibrated(args, lambda: build_network(plan.config), ADAPTER)
    model = load_float_model(args, plan.config) if plan.loads is None else None
    trajectories = None
    if plan.recipe is not None:
        trajectories = calibration_data(plan)
        check_structure(plan, model, trajectories, loaded)
    plan = replace(plan, folder=new_folder(plan.folder))
    start_log(plan.folder, args.verbose)
    label = bits_label(plan.recipe or loaded_recipe)
    logger.info("%s model from %s", label, args.cali_ckpt if model is None else model.source)
    if args.cond:
        logger.warning("--cond: no effect, pixel models are unconditional")
    warn_without_effect(args)
    if plan.recipe is not None:
        network = calibrated(plan, model, trajectories, loaded)
    else:
        network = loaded if loaded is not None else model.network
    sample(plan, network.to(plan.device))
    print(f"{args.max_images} images of the {label} model in {plan.folder / 'img'}")


if __name__ == "__main__":
    run_main(main)

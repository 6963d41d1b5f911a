"""Calibrate a model of any family, and write the result: packed, in Q-Diffusion's format, and as a report.

Writes <out>/ckpt.safetensors, ckpt.pth (where the original's format can say it), report.html and run.log. The same
command goes on with a calibration that was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from qdiff.api.models import BATCH
from qdiff.api.sampling import record
from qdiff.cli.command import print_plan, start_log
from qdiff.cli.flags import add_run_flags, add_team_flags
from qdiff.cli.models.any_family import ChosenModel, add_model_flags, choose_model
from qdiff.cli.parser import make_parser
from qdiff.cli.quantize import CHECKPOINT_NAME, QuantizationPlan, calibrate_and_write, plan_quantization, read_inputs
from qdiff.cli.recipe_flags import add_quantization_flags, bits_label, warn_without_effect
from qdiff.cli.runs.sampling import warn_of_start
from qdiff.cli.team import start_team
from qdiff.utils.devices import choose_device
from qdiff.utils.files import sole_user
from qdiff.utils.team import Team


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    add_model_flags(parser, timesteps=50, skip_type="quad")
    parser.add_argument("--out", type=Path, required=True, help="folder of the result")
    parser.add_argument("--batch_size", type=int, help="samples at once (default: the model's own)")
    add_quantization_flags(parser)
    add_run_flags(parser)
    add_team_flags(parser)
    args = parser.parse_args(argv)
    args.ptq = True
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.cali_ckpt is not None and not args.resume_w:
        raise ValueError(f"--cali_ckpt {args.cali_ckpt}: is calibrated already; --resume_w takes its weights alone")
    model = choose_model(args)
    args.family = model.family
    plan, device = plan_quantization(args, model.steps, f"--timesteps {args.timesteps}"), choose_device(args.device)
    if args.dry_run:
        print_plan({**model.where, **model.pipeline.describe(), **plan.describe(), "out": str(args.out)}, plan.recipe)
        return
    with start_team(args, device) as team:
        execute(args, model, plan, team.device or device, team)


def execute(
    args: argparse.Namespace, model: ChosenModel, plan: QuantizationPlan, device: torch.device, team: Team
) -> None:
    """Calibrate into --out, or say that it has been done."""
    pipeline, folder = model.pipeline, args.out
    conditional = bool(model.entries)
    inputs = read_inputs(
        plan, model.adapter, model.build, pipeline.shape, pipeline.timesteps(), conditional, pipeline.path
    )
    float_model = model.source.load(device)
    folder.mkdir(parents=True, exist_ok=True)
    with sole_user(folder) if team.is_main else nullcontext():
        start_log(folder, args.verbose, team.rank)
        warn_without_effect(plan.options)
        warn_of_start(pipeline)
        batch_size = args.batch_size or model.batch_size or BATCH
        calibrate_and_write(
            plan,
            inputs,
            model.adapter,
            float_model.network,
            lambda count: record(float_model, model.sampling, float_model.network, count, batch_size, team),
            folder,
            {"sampling": pipeline.describe(), **float_model.origin},
            team,
            pipeline.path,
        )
    if team.is_main:
        print(f"{folder / CHECKPOINT_NAME}: {bits_label(plan.recipe)}, by {plan.recipe.name}")

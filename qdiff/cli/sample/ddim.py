"""Calibrate a pixel diffusion model (CIFAR-10, LSUN), or load a calibrated one, and sample images.

Takes the command lines of the Q-Diffusion repository. Writes <logdir>/samples/<date-time>/ with run.log, img/0.png,
1.png, ... and after a calibration ckpt.safetensors (packed) and ckpt.pth (the original's format).
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from qdiff.cli.flags import add_run_flags, add_runtime_flags, add_team_flags, check_runtime_flags
from qdiff.cli.models.pixel import add_model_flags, add_sampling_flags, chosen_pixel_model
from qdiff.cli.parser import make_parser, whole
from qdiff.cli.quantize import plan_quantization
from qdiff.cli.recipe_flags import add_quantization_flags
from qdiff.cli.runs.outputs import KeptOptions, add_kept_flags, check_kept_flags
from qdiff.cli.runs.run import RunPlan, execute, write_images
from qdiff.cli.team import start_team
from qdiff.families.source import FloatModel
from qdiff.utils.devices import choose_device
from qdiff.utils.images import save_png
from qdiff.utils.team import Team

logger = logging.getLogger(__name__)


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


def make_plan(args: argparse.Namespace) -> RunPlan:
    """Check the flags and turn them into a plan. Raises ValueError naming the flag at fault."""
    model = chosen_pixel_model(args)
    quantization = plan_quantization(args, model.steps, f"--timesteps {args.timesteps}")
    device = choose_device(args.device)
    check_runtime_flags(args, device)
    check_kept_flags(KeptOptions.of(args), model.pipeline.shape)
    return RunPlan(
        args,
        model.source,
        model.sampling,
        model.sampling,
        device,
        quantization,
        Path("outputs/ddim" if args.logdir == "none" else args.logdir) / "samples",
        images=args.max_images,
        batch_size=model.batch_size,
        picture="img/{}.png",
        notes=("--cond: no effect, pixel models are unconditional",) * args.cond,
    )


def sample(plan: RunPlan, model: FloatModel, network: nn.Module, folder: Path, team: Team) -> None:
    """Write img/0.png, 1.png, ..., and with --sequence the states of the first batch after every step.

    Batches of which all images are there are not sampled again. Returns when all processes have done theirs.
    """
    states: list[torch.Tensor] = []

    def observe(batch: range):
        return (lambda call: states.append(call.x.cpu())) if plan.args.sequence and batch.start == 0 else None

    write_images(plan, model, network, folder, team, observe)
    if states:
        (folder / "sequence").mkdir(exist_ok=True)
    for step, batch in enumerate(states):
        for index, state in enumerate(batch):
            save_png(((state + 1) / 2).clamp(0, 1), folder / "sequence" / f"{index}_{step:04d}.png")


def main(argv: Sequence[str] | None = None) -> None:
    plan = make_plan(parse_args(argv))
    with start_team(plan.args, plan.device) as team:
        execute(plan, team, lambda folder: plan.kept(folder).all_files(), sample)

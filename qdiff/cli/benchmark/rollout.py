"""benchmark.py rollout: what one iteration over a group of M denoising steps takes, by M and way of differentiating."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qdiff.api.sampling import record
from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.rollout import FloatRuns, GroupRollout, Predictor, Rollouts, groups_of
from qdiff.calibration.selectors import select
from qdiff.calibration.store import Store
from qdiff.cli.flags import add_run_flags
from qdiff.cli.models.any_family import NO_WEIGHTS
from qdiff.cli.models.pixel import add_model_flags
from qdiff.cli.parser import whole
from qdiff.evaluation.memory import LiveBytes
from qdiff.families import adapter_for
from qdiff.families.open import pixel_model
from qdiff.families.options import SamplingOptions
from qdiff.methods import MethodOptions, make_recipe
from qdiff.nn.layers import act_quantizers, learnable_scales
from qdiff.recipes.overrides import apply_overrides
from qdiff.utils.devices import choose_device
from qdiff.utils.errors import flags_named

MIB = 2**20
ROLLOUT_COLUMNS = [
    ("gradient", "gradient", "s"),
    ("steps", "steps in the group (M)", "d"),
    ("mib", "peak of tensors (MiB)", ".1f"),
    ("ratio", "peak / peak of M = 1", ".3f"),
    ("seconds", "s", ".2f"),
]


def add_rollout_command(commands: argparse._SubParsersAction) -> None:
    """The subcommand and its flags."""
    parser = commands.add_parser("rollout", help="memory and time of learning over groups of denoising steps")
    add_model_flags(parser)
    parser.add_argument("--batch_size", type=whole(1), default=4, help="trajectories at once")
    parser.add_argument("--group_sizes", type=whole(1, 100), nargs="+", default=[1, 2, 5, 10], metavar="M")
    ways = ("two_pass", "exact", "unrolled")
    parser.add_argument("--gradients", nargs="+", choices=ways, default=list(ways), help="ways of differentiating")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    add_run_flags(parser)


def rollout(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way and group size: the tensors that one iteration makes and holds at once, and its time."""
    source = pixel_model(args.config, args.ckpt, pretrained=args.use_pretrained, no_weights=NO_WEIGHTS)
    with flags_named({"steps": "--group_sizes"}):
        sampling = source.sampling(SamplingOptions(steps=max(args.group_sizes), seed=args.seed))
    model = source.load(choose_device(args.device))
    network = model.network
    trajectories = record(model, sampling, network, args.batch_size, args.batch_size)
    rollouts, rows = Rollouts(trajectories, sampling.pipeline.path()), []
    for size in args.group_sizes:
        group = _first_group(network, rollouts, size, args)
        scales = learnable_scales(list(act_quantizers(group.predict.network).values()))
        rows += [_measured(group, scales, gradient, size) for gradient in args.gradients]
    smallest = min(args.group_sizes)
    base = {row["gradient"]: row["mib"] for row in rows if row["steps"] == smallest}
    rows.sort(key=lambda row: (args.gradients.index(row["gradient"]), row["steps"]))
    return [row | {"ratio": row["mib"] / base[row["gradient"]]} for row in rows]


def _first_group(network: torch.nn.Module, rollouts: Rollouts, size: int, args: argparse.Namespace) -> GroupRollout:
    """The first group of a W4A8 network with a parameter set for every `size` steps."""
    steps = rollouts.trajectories.steps
    options = MethodOptions(4, 8, True, 8, True, selector_steps=steps, per_step=min(2, args.batch_size))
    adapter = adapter_for("ddim")
    recipe = apply_overrides(make_recipe("nearest", options), [f"step_groups.size={size}"])
    data = select(rollouts.trajectories, recipe)
    quantized = calibrate(network, adapter, recipe, data, args.seed, rollouts.trajectories.timesteps).network
    teacher, predict = (Predictor(n, adapter, rollouts) for n in (network, quantized))
    store = Store(predict.parameter.device)
    runs = FloatRuns(teacher, rollouts, args.batch_size, store, args.batch_size)
    return GroupRollout(predict, runs, groups_of(rollouts.path, quantized.step_table)[0])


def _measured(group: GroupRollout, scales: Sequence[torch.nn.Parameter], gradient: str, size: int) -> dict[str, Any]:
    index = torch.arange(group.runs.samples, device=group.predict.parameter.device)
    for scale in scales:
        scale.requires_grad_(True).grad = None
    group.backward(index, gradient)  # gradients are there, libraries have chosen their kernels
    with LiveBytes() as meter:
        group.backward(index, gradient)
    started = time.perf_counter()
    group.backward(index, gradient).item()
    seconds = time.perf_counter() - started
    return {"gradient": gradient, "steps": size, "mib": meter.peak / MIB, "seconds": seconds}

"""Record float sampling states for calibration: one sampling run keeps every step of as many seeds as asked.

Pixel models by --config as in sample_diffusion_ddim.py; latent models by -r, with prompts or classes where they take
them. Writes a folder of native shards, one per batch, or with an --out that ends in .pt or .pth the original toolkit's
file. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from qdiff.api.models import unfinished_shards
from qdiff.api.sampling import FIRST_CALIBRATION_IMAGE, batches
from qdiff.calibration.trajectories import (
    load_trajectories,
    original_layout,
    save_shard,
    shard_path,
)
from qdiff.cli.command import print_plan, start_log
from qdiff.cli.flags import add_run_flags, add_team_flags
from qdiff.cli.models.any_family import ChosenModel, LoadedModel, add_model_flags, choose_model
from qdiff.cli.parser import make_parser, whole
from qdiff.cli.runs.sampling import warn_of_start
from qdiff.cli.team import start_team
from qdiff.utils.devices import choose_device
from qdiff.utils.files import save_pickle, sole_user
from qdiff.utils.team import Team

logger = logging.getLogger(__name__)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    add_model_flags(parser, timesteps=100, skip_type="uniform")
    group = parser.add_argument_group("calibration data")
    group.add_argument("--n_samples", type=whole(1), default=256, help="number of seeds")
    group.add_argument("--batch_size", type=whole(1), default=64, help="seeds sampled at once; one shard each")
    group.add_argument("--out", type=Path, required=True, help="folder for shards, or a .pt file")
    add_run_flags(parser)
    add_team_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, device = choose_model(args), choose_device(args.device)
    if args.out.suffix in (".pt", ".pth") and args.out.exists():
        raise FileExistsError(f"--out {args.out}: exists already; remove it, or choose another name")
    if args.dry_run:
        print_plan({**model.where, **model.pipeline.describe(), "n_samples": args.n_samples, "out": str(args.out)})
        return
    with start_team(args, device) as team:
        execute(args, model, team.device or device, team)


def execute(args: argparse.Namespace, model: ChosenModel, device: torch.device, team: Team) -> None:
    """Record the states of all seeds that have no shard yet."""
    one_file = args.out.suffix in (".pt", ".pth")
    folder = args.out.with_name(f".{args.out.name}.parts") if one_file else args.out
    loaded = model.load(device)
    origin = {"family": model.adapter.family, "config": model.adapter.config_of(loaded.network)} | loaded.origin
    provenance = origin | model.pipeline.describe() | {"batch_size": args.batch_size, "n_samples": args.n_samples}
    indices = list(batches(FIRST_CALIBRATION_IMAGE, args.n_samples, args.batch_size))
    folder.mkdir(parents=True, exist_ok=True)
    with sole_user(folder) if team.is_main else nullcontext():
        record(args, model, loaded, team, folder, provenance, indices)


def record(
    args: argparse.Namespace,
    model: ChosenModel,
    loaded: LoadedModel,
    team: Team,
    folder: Path,
    provenance: dict,
    indices: list[range],
) -> None:
    """Write the shards that are missing in `folder`; one file of them all where --out asks for it."""
    one_file = folder != args.out
    todo = team.broadcast(unfinished_shards(folder, provenance, indices) if team.is_main else None)
    start_log(folder, args.verbose, team.rank)
    warn_of_start(model.pipeline)
    for batch, part in loaded.record(list(todo), team):
        save_shard(part, shard_path(folder, todo[batch]), provenance)
        logger.info("%s: %d samples, %d steps", shard_path(folder, todo[batch]).name, part.samples, part.steps)
    team.wait()
    if not team.is_main:
        return
    if one_file:
        save_pickle(original_layout(load_trajectories(folder)), args.out)
        shutil.rmtree(folder)
    print(f"{args.out}: {args.n_samples} samples of {model.steps} steps")

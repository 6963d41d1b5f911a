#!/usr/bin/env python
"""Record float sampling states for calibration: one sampling run keeps every step of as many seeds as asked.

Writes a folder of native shards, one per batch, or with an --out that ends in .pt or .pth the original toolkit's file.
A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from pixel_model import (
    ADAPTER,
    FIRST_CALIBRATION_IMAGE,
    add_model_flags,
    add_sampling_flags,
    batches,
    load_float_model,
    make_pipeline,
    read_config,
    record_batches,
)

from qdiff.calibration.trajectories import (
    load_trajectories,
    original_layout,
    save_shard,
    shard_path,
    shard_provenance,
)
from qdiff.commandline import add_run_flags, choose_device, make_parser, print_plan, run_main, start_log, whole
from qdiff.files import save_pickle

logger = logging.getLogger(__name__)


def parse_args(argv: Sequence[str] | None):
    parser = make_parser(__doc__.splitlines()[0])
    add_model_flags(parser)
    add_sampling_flags(parser, timesteps=100)
    group = parser.add_argument_group("calibration data")
    group.add_argument("--n_samples", type=whole(1), default=256, help="number of seeds")
    group.add_argument("--batch_size", type=whole(1), default=64, help="seeds sampled at once; one shard each")
    group.add_argument("--out", type=Path, required=True, help="folder for shards, or a .pt file")
    add_run_flags(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    config = read_config(args)
    pipeline, device = make_pipeline(args, config), choose_device(args.device)
    one_file = args.out.suffix in (".pt", ".pth")
    if one_file and args.out.exists():
        raise FileExistsError(f"--out {args.out}: exists already; remove it, or choose another name")
    folder = args.out.with_name(f".{args.out.name}.parts") if one_file else args.out
    plan = {"config": str(args.config), **pipeline.describe(), "n_samples": args.n_samples, "out": str(args.out)}
    if args.dry_run:
        print_plan(plan)
        return
    model = load_float_model(args, config)
    provenance = {"family": ADAPTER.family, "config": ADAPTER.config_of(model.network)} | pipeline.describe()
    provenance |= model.describe() | {"batch_size": args.batch_size, "n_samples": args.n_samples}
    todo = unfinished(folder, provenance, list(batches(FIRST_CALIBRATION_IMAGE, args.n_samples, args.batch_size)))
    start_log(folder, args.verbose)
    network = model.network.to(device)
    for batch, part in record_batches(pipeline, network, list(todo)):
        save_shard(part, shard_path(folder, todo[batch]), provenance)
        logger.info("%s: %d samples, %d steps", shard_path(folder, todo[batch]).name, part.samples, part.steps)
    if one_file:
        save_pickle(original_layout(load_trajectories(folder)), args.out)
        shutil.rmtree(folder)
    print(f"{args.out}: {args.n_samples} samples of {len(pipeline.timesteps())} steps")


def unfinished(folder: Path, provenance: dict, indices: list[range]) -> dict[range, int]:
    """The batches that have no shard yet, with their shard number.

    Raises ValueError naming a shard that was made with other settings, and the first that differs.
    """
    todo = {}
    for number, batch in enumerate(indices):
        path = shard_path(folder, number)
        if not path.exists():
            todo[batch] = number
            continue
        found = shard_provenance(path)
        for key, value in provenance.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{path}: made with {key} {found.get(key)!r}, this run has {value!r}; choose another --out"
                )
    return todo


if __name__ == "__main__":
    run_main(main)

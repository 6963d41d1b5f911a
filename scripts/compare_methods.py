#!/usr/bin/env python
"""Calibrate one model by several methods on the same float states and compare what they make of the same seeds.

Writes comparison.png (rows: methods, columns: seeds), results.json, results.md and one packed checkpoint per method.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pixel_model import (
    ADAPTER,
    FloatModel,
    add_model_flags,
    add_sampling_flags,
    load_float_model,
    make_pipeline,
    read_config,
    record,
    sample_images,
)
from torch import Tensor

from ddim.pipeline import Pipeline
from qdiff.calibration.runner import RunOptions, calibrate
from qdiff.calibration.selectors import select
from qdiff.calibration.trajectories import Trajectories
from qdiff.checkpoints import save_checkpoint
from qdiff.commandline import (
    add_run_flags,
    add_team_flags,
    choose_device,
    describe_device,
    make_parser,
    print_plan,
    run_main,
    start_log,
    whole,
)
from qdiff.evaluation.cost import float_bytes, stored_bytes
from qdiff.evaluation.fidelity import METRIC, fd_cifar10
from qdiff.evaluation.picture import comparison_picture
from qdiff.evaluation.similarity import pooled_psnr_db, to_uint8
from qdiff.evaluation.table import markdown_table
from qdiff.fabric import start_team
from qdiff.files import write_text
from qdiff.methods import METHODS, MethodOptions, make_recipe
from qdiff.parallel import Team
from qdiff.progress import BarProgress
from qdiff.spec import Recipe

logger = logging.getLogger(__name__)
MIB = 2**20
COLUMNS = [
    ("label", "method", "s"),
    ("bits", "W/A", "s"),
    ("psnr_db", "PSNR to float (dB)", ".2f"),
    ("fd", METRIC, ".2f"),
    ("mib", "size (MiB)", ".2f"),
    ("calibration_minutes", "calibration (min)", ".2f"),
    ("sampling_seconds", "sampling (s)", ".1f"),
]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    add_model_flags(parser)
    add_sampling_flags(parser, timesteps=50, skip_type="quad")
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--methods",
        nargs="+",
        default=["nearest", "gptq", "quick"],
        metavar="METHOD[:ITERATIONS]",
        help=f"of {', '.join(METHODS)}; iterations per unit where a method learns",
    )
    group.add_argument("--weight_bit", type=whole(2, 8), nargs="+", default=[4], help="bits of weights, one run each")
    group.add_argument("--act_bit", type=whole(2, 32), default=8, help="bits of activations; 32 leaves them float")
    group.add_argument("--sm_abit", type=whole(2, 16), default=8, help="bits of softmax outputs")
    group.add_argument("--a_sym", action="store_true", help="symmetric activations")
    group.add_argument("--split", action="store_true", help="split shortcuts fed by concatenated features")
    group.add_argument("--cali_st", type=whole(1), default=10, help="sampler steps to calibrate on")
    group.add_argument("--cali_n", type=whole(1), default=16, help="samples of each of those steps")
    group.add_argument("--n_samples", type=whole(2), default=16, help="images to compare")
    group.add_argument("--outdir", type=Path, default=Path("outputs/comparison"), help="output folder")
    add_run_flags(parser)
    add_team_flags(parser)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Entry:
    """One method at one bit width."""

    label: str
    method: str
    recipe: Recipe

    @property
    def slug(self) -> str:
        """The name of the entry's files."""
        return f"{self.label.replace(':', '-')}_w{self.recipe.weights.bits}a{self.act_bits}"

    @property
    def act_bits(self) -> int:
        """Bits of activations, 32 for float ones."""
        return 32 if self.recipe.activations is None else self.recipe.activations.bits


def entries(args: argparse.Namespace) -> list[Entry]:
    """What --methods and --weight_bit ask for. Raises ValueError naming the flag at fault."""
    if 8 < args.act_bit < 32:
        raise ValueError(f"--act_bit {args.act_bit}: expected 2 to 8, or 32 for float activations")
    options = MethodOptions(
        act_bits=None if args.act_bit == 32 else args.act_bit,
        act_symmetric=args.a_sym,
        softmax_bits=args.sm_abit,
        split=args.split,
        selector_steps=args.cali_st,
        per_step=args.cali_n,
    )
    found = []
    for bits in args.weight_bit:
        for label in args.methods:
            method, colon, iterations = label.partition(":")
            if method not in METHODS or colon and not (iterations.isdecimal() and int(iterations) > 0):
                valid = ", ".join(METHODS)
                raise ValueError(f"--methods {label}: expected METHOD or METHOD:ITERATIONS, METHOD one of {valid}")
            chosen = replace(options, weight_bits=bits)
            if iterations:  # the two stages of q-diffusion keep their published proportion
                chosen = replace(chosen, iterations=int(iterations), act_iterations=math.ceil(int(iterations) / 4))
            found.append(Entry(label, method, make_recipe(method, chosen)))
    return list({entry.slug: entry for entry in found}.values())


@dataclass
class Comparison:
    """What all entries share: the float model, its sampling states, and its images."""

    args: argparse.Namespace
    pipeline: Pipeline
    model: FloatModel
    trajectories: Trajectories
    reference: Tensor  # [N, C, H, W] in [0, 1]
    team: Team

    def row(self, label: str, method: str, bits: tuple[int, int], images: Tensor, size: int, **more) -> dict:
        """One row of the results, which the leading process writes."""
        if not self.team.leads:
            return {}
        psnr = pooled_psnr_db(images, self.reference)
        return {
            "method": method,
            "label": label,
            "weight_bits": bits[0],
            "act_bits": bits[1],
            "psnr_db": None if math.isinf(psnr) else round(psnr, 3),
            "fd": round(fd_cifar10(to_uint8(images)), 4) if images.shape[1:] == (3, 32, 32) else None,
            "bytes": size,
            **more,
        }

    def run(self, entry: Entry) -> tuple[dict, Tensor]:
        """Calibrate, save, sample and measure one entry."""
        args, started = self.args, time.monotonic()
        data = select(self.trajectories, entry.recipe.selector)
        provenance = {"seed": args.seed, "sampling": self.pipeline.describe(), **self.model.describe()}
        plan = provenance | {"recipe": entry.recipe.to_dict(), "states": data.digest()}
        run = calibrate(
            *(self.model.network, ADAPTER, entry.recipe, data, args.seed, self.trajectories.timesteps),
            BarProgress() if self.team.leads else None,
            options=RunOptions(record=args.outdir / f"{entry.slug}.unfinished", plan=plan, team=self.team),
        )
        calibrated = time.monotonic()
        path = args.outdir / f"{entry.slug}.safetensors"
        if self.team.leads:
            save_checkpoint(path, run.network, ADAPTER, entry.recipe, self.trajectories.timesteps, provenance)
            run.record.remove()
        before = time.monotonic()
        title, batch_size = f"{entry.label} images", self.model.config.sampling.batch_size
        images = sample_images(self.pipeline, run.network, args.n_samples, batch_size, title, self.team)
        seconds = {
            "calibration_seconds": round(calibrated - started, 1),
            "sampling_seconds": round(time.monotonic() - before, 1),
        }
        bits = (entry.recipe.weights.bits, entry.act_bits)
        size = stored_bytes(path) if self.team.leads else 0
        return self.row(entry.label, entry.method, bits, images, size, **seconds), images


def write_results(outdir: Path, rows: list[dict], pictures: list[tuple[dict, Tensor]], seconds: float) -> str:
    """Write results.json, results.md and comparison.png; return the table."""
    shown = [
        {
            **row,
            "bits": f"{row['weight_bits']}/{row['act_bits']}",
            "mib": row["bytes"] / MIB,
            "calibration_minutes": row["calibration_seconds"] / 60 if "calibration_seconds" in row else None,
        }
        for row in rows
    ]
    table = markdown_table(shown, COLUMNS)
    write_text(outdir / "results.json", json.dumps({"seconds": round(seconds, 1), "rows": rows}, indent=1) + "\n")
    write_text(outdir / "results.md", table + "\n")
    captions = [
        f"W{row['weight_bits']}A{row['act_bits']}"
        + ("" if row["psnr_db"] is None else f", {row['psnr_db']:.1f} dB")
        + f"\n{row['bytes'] / MIB:.1f} MiB"
        for row, _ in pictures
    ]
    images = [(row["label"], image) for row, image in pictures]
    comparison_picture(images, outdir / "comparison.png", captions=captions)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    config = read_config(args)
    pipeline, todo, device = make_pipeline(args, config), entries(args), choose_device(args.device)
    if args.cali_st > (steps := len(pipeline.timesteps())):
        raise ValueError(f"--cali_st {args.cali_st}: --timesteps {args.timesteps} makes only {steps} steps")
    if args.dry_run:
        print_plan({**pipeline.describe(), "runs": {entry.slug: entry.recipe.to_dict() for entry in todo}})
        return
    model = load_float_model(args, config)
    with start_team(args, device) as team:
        start_log(args.outdir, args.verbose, team.rank)
        network = model.network.to(team.device or device)
        compare(args, pipeline, replace(model, network=network), todo, team)


def compare(args: argparse.Namespace, pipeline: Pipeline, model: FloatModel, todo: list[Entry], team: Team) -> None:
    """Record float states, calibrate and measure each entry, and write the results so far after each."""
    started, network, size = time.monotonic(), model.network, model.config.sampling.batch_size
    trajectories = record(pipeline, network, args.cali_n, size, team)
    sampling = time.monotonic()
    reference = sample_images(pipeline, network, args.n_samples, size, "float images", team)
    seconds = round(time.monotonic() - sampling, 1)
    comparison = Comparison(args, pipeline, model, trajectories, reference, team)
    first = comparison.row("float", "float", (32, 32), reference, float_bytes(network), sampling_seconds=seconds)
    pictures = [(first, reference)]
    for entry in todo:
        pictures.append(comparison.run(entry))
        logger.info("%s", pictures[-1][0])
        if team.leads:
            rows = [row for row, _ in pictures]
            table = write_results(args.outdir, rows, pictures, time.monotonic() - started)
    if team.leads:
        print(f"\n{table}\n\n{args.outdir / 'comparison.png'}, on {describe_device(network)}")


if __name__ == "__main__":
    run_main(main)

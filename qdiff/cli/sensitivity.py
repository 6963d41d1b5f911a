"""Measure what quantizing each unit alone costs, and choose bits for every unit under a budget.

Any model: pixel models by --config, latent models by -r. Writes sensitivity.png (units by sampler steps),
sensitivity.csv, sensitivity.json, report.html, and recipe.yml: a mixed-precision recipe that --recipe of the other
scripts takes.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qdiff.api.sampling import FIRST_CALIBRATION_IMAGE, batches
from qdiff.calibration.rollout import Rollouts
from qdiff.calibration.selectors import select
from qdiff.calibration.trajectories import concatenate
from qdiff.cli.command import print_plan, start_log
from qdiff.cli.flags import add_run_flags
from qdiff.cli.models.any_family import ChosenModel, add_model_flags, choose_model
from qdiff.cli.parser import make_parser, number, whole
from qdiff.cli.runs.sampling import warn_of_start
from qdiff.evaluation.allocation import allocate, bit_operations, mixed_recipe
from qdiff.evaluation.heatmap import Panel, heat_map
from qdiff.evaluation.report import REPORT_NAME, write
from qdiff.evaluation.report_sensitivity import sensitivity_report
from qdiff.evaluation.sensitivity import Sensitivity, UnitCosts, measure, unit_costs
from qdiff.evaluation.table import markdown_table
from qdiff.methods import METHODS, MethodOptions, make_recipe
from qdiff.recipes.recipe import Recipe
from qdiff.utils.devices import choose_device
from qdiff.utils.files import sole_user, write_text
from qdiff.utils.team import Team

logger = logging.getLogger(__name__)
MIB, BATCH = 2**20, 16
COLUMNS = [
    ("unit", "unit", "s"),
    ("bits", "bits", "d"),
    ("stored_kib", "stored (KiB)", ".1f"),
    ("uniform_rms", "RMS at the end, uniform bits", ".3g"),
    ("rms", "RMS at the end, chosen bits", ".3g"),
]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    add_model_flags(parser, timesteps=20, skip_type="quad")
    group = parser.add_argument_group("measurement")
    group.add_argument("--bits", type=whole(2, 8), nargs="+", default=[2, 3, 4, 5, 6, 8], help="weight widths to try")
    group.add_argument("--act_bit", type=whole(2, 32), default=8, help="bits of activations; 32 leaves them float")
    group.add_argument("--sm_abit", type=whole(2, 16), default=8, help="bits of softmax outputs")
    group.add_argument("--a_sym", action="store_true", help="symmetric activations")
    group.add_argument("--split", action="store_true", help="split shortcuts fed by concatenated features")
    group.add_argument("--cali_st", type=whole(1), default=10, help="sampler steps to find ranges on")
    group.add_argument("--cali_n", type=whole(1), default=8, help="samples of each of those steps")
    group.add_argument("--n_samples", type=whole(1), default=4, help="float samples whose every step is measured")
    group = parser.add_argument_group("choice of bits")
    group.add_argument(
        "--weight_bit", type=whole(2, 8), default=4, help="uniform width that the choice is held against"
    )
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--budget_mib", type=number(0, 1e9), help="size of the weights (default: the uniform width's)")
    budget.add_argument("--budget_gbops", type=number(0, 1e12), help="bit operations of one evaluation, in 10^9")
    group.add_argument("--method", choices=tuple(METHODS), default="quick", help="method of the recipe that is written")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/sensitivity"), help="output folder")
    add_run_flags(parser)
    return parser.parse_args(argv)


def recipe_of(args: argparse.Namespace, model: ChosenModel, method: str, bits: int) -> Recipe:
    """The method's recipe with the flags' grids."""
    options = MethodOptions(
        weight_bits=bits,
        act_bits=None if args.act_bit == 32 else args.act_bit,
        act_symmetric=args.a_sym,
        softmax_bits=args.sm_abit,
        split=args.split,
        selector_steps=args.cali_st,
        per_step=args.cali_n,
        family=model.family,
    )
    return make_recipe(method, options)


def check(args: argparse.Namespace, model: ChosenModel) -> None:
    """Raise ValueError naming the flag at fault."""
    if 8 < args.act_bit < 32:
        raise ValueError(f"--act_bit {args.act_bit}: expected 2 to 8, or 32 for float activations")
    if args.weight_bit not in args.bits:
        raise ValueError(f"--weight_bit {args.weight_bit}: expected one of --bits {' '.join(map(str, args.bits))}")
    if args.cali_st > model.steps:
        raise ValueError(f"--cali_st {args.cali_st}: --timesteps makes only {model.steps} steps")
    if model.path() is None:
        raise ValueError(f"--sample_type {args.sample_type}: clips, so errors do not add up to one at the end")


def measure_model(args: argparse.Namespace, model: ChosenModel) -> Sensitivity:
    """Record float states and measure every unit at every width."""
    loaded = model.load(choose_device(args.device))
    count = max(args.n_samples, args.cali_n)
    indices = list(batches(FIRST_CALIBRATION_IMAGE, count, BATCH))
    trajectories = concatenate([part for _, part in loaded.record(indices, Team())])
    recipes = {bits: recipe_of(args, model, "nearest-lp", bits) for bits in sorted(set(args.bits))}
    data = select(trajectories, recipes[args.weight_bit], loaded.network, model.adapter, args.seed)
    rollouts = Rollouts(trajectories, model.path())
    costs = unit_costs(loaded.network, model.adapter, recipes, data, trajectories.timesteps)
    costs_and_budget(args, costs, list(recipes))  # refused now, not after all units have been measured
    with tqdm(total=len(costs.units), desc="units", unit="unit", dynamic_ncols=True) as bar:

        def tick(unit: str) -> None:
            bar.set_postfix_str(unit, refresh=False)
            bar.update()

        found = (loaded.network, model.adapter, recipes, data, rollouts, args.n_samples, args.seed)
        return measure(*found, tick)


def costs_and_budget(
    args: argparse.Namespace, found: UnitCosts | Sensitivity, widths: Sequence[int]
) -> tuple[np.ndarray, int]:
    """([U, B] of what the flags limit, what they allow in all). Raises ValueError naming the flag where it is too
    little."""
    if args.budget_gbops is not None:
        costs = np.array([[bit_operations(int(p), bits, args.act_bit) for bits in widths] for p in found.products])
        flag, given, budget, unit = "--budget_gbops", args.budget_gbops, int(args.budget_gbops * 1e9), 1e9
    else:
        costs, flag, given, unit = found.stored.numpy(), "--budget_mib", args.budget_mib, MIB
        budget = int(costs[:, widths.index(args.weight_bit)].sum() if given is None else given * MIB)
    cheapest = costs.min(1).sum()
    if cheapest > budget:
        raise ValueError(f"{flag} {given:g}: expected at least {cheapest / unit:.4g}, all units at the fewest bits")
    return costs, budget


def choose_bits(args: argparse.Namespace, found: Sensitivity) -> list[int]:
    """The width of every unit."""
    costs, budget = costs_and_budget(args, found, found.bits)
    return [found.bits[column] for column in allocate(found.end.numpy(), costs, budget)]


def rows_of(args: argparse.Namespace, found: Sensitivity, bits: list[int]) -> list[dict[str, Any]]:
    """A row for each unit."""
    uniform, rows = found.bits.index(args.weight_bit), []
    for u, (unit, width) in enumerate(zip(found.units, bits, strict=True)):
        column = found.bits.index(width)
        rows.append(
            {
                "unit": unit,
                "bits": width,
                "stored_kib": found.stored[u, column].item() / 1024,
                "uniform_rms": found.end[u, uniform].sqrt().item(),
                "rms": found.end[u, column].sqrt().item(),
            }
        )
    return rows


def write_results(args: argparse.Namespace, model: ChosenModel, found: Sensitivity, bits: list[int]) -> str:
    """Write all files into --outdir. Returns the table."""
    table = [
        {
            "unit": unit,
            "bits": width,
            "stored_bytes": found.stored[u, b].item(),
            "products": found.products[u].item(),
            "rms_at_the_end": found.end[u, b].sqrt().item(),
            **{f"rms_at_t_{t:g}": e for t, e in zip(found.timesteps, found.single[u, b].sqrt().tolist(), strict=True)},
        }
        for u, unit in enumerate(found.units)
        for b, width in enumerate(found.bits)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in table for key in row)))
    writer.writeheader()
    writer.writerows(table)
    write_text(args.outdir / "sensitivity.csv", text.getvalue())
    chosen = dict(zip(found.units, bits, strict=True))
    about = {
        **model.where,
        "act_bits": args.act_bit,
        "weight_bit": args.weight_bit,
        "timesteps": list(found.timesteps),
        "chosen": chosen,
        "rows": table,
    }
    write_text(args.outdir / "sensitivity.json", json.dumps(about, indent=1) + "\n")
    mixed = mixed_recipe(recipe_of(args, model, args.method, args.weight_bit), found, bits)
    write_text(args.outdir / "recipe.yml", mixed.to_yaml())
    draw(args, found)
    write(sensitivity_report(about, args.outdir / "run.log"), args.outdir / REPORT_NAME)
    return markdown_table(rows_of(args, found, bits), COLUMNS)


def draw(args: argparse.Namespace, found: Sensitivity) -> None:
    """sensitivity.png, at the uniform width."""
    column = found.bits.index(args.weight_bit)
    single, end = found.single[:, column].sqrt(), found.end[:, column].sqrt()
    steps = [f"{t:g}" for t in found.timesteps]
    carried = torch.cat([single * found.carried.abs(), end[:, None]], 1)
    panels = [
        Panel("of the prediction", single.numpy(), steps),
        Panel("carried to the end", carried.numpy(), [*steps, "all"]),
    ]
    acts = "" if args.act_bit == 32 else f"A{args.act_bit}"
    title = f"RMS error when one unit alone is quantized, W{args.weight_bit}{acts}"
    heat_map(panels, found.units, title, args.outdir / "sensitivity.png")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model = choose_model(args)
    check(args, model)
    if args.dry_run:
        print_plan({**model.where, "steps": model.steps, "bits": sorted(set(args.bits)), "samples": args.n_samples})
        return
    args.outdir.mkdir(parents=True, exist_ok=True)
    with sole_user(args.outdir):
        work(args, model)


def work(args: argparse.Namespace, model: ChosenModel) -> None:
    """Measure, choose, write and print."""
    start_log(args.outdir, args.verbose)
    warn_of_start(model.pipeline)
    found = measure_model(args, model)
    bits = choose_bits(args, found)
    print(write_results(args, model, found, bits))
    uniform = found.bits.index(args.weight_bit)
    columns = [found.bits.index(width) for width in bits]
    rows = torch.arange(len(bits))
    sizes = [found.stored[:, uniform].sum().item() / MIB, found.stored[rows, columns].sum().item() / MIB]
    errors = [found.end[:, uniform].sum().sqrt().item(), found.end[rows, columns].sum().sqrt().item()]
    print(f"\nuniform W{args.weight_bit}: {sizes[0]:.2f} MiB, RMS at the end {errors[0]:.3g} (units' errors added up)")
    print(f"chosen bits: {sizes[1]:.2f} MiB, RMS at the end {errors[1]:.3g}\n{args.outdir / 'recipe.yml'}")

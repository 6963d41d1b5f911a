"""Measure speed as ratios taken in one process against a named baseline.

simulate: one network evaluation of the simulated quantized model against the float model's.
memory: peak memory of loading a latent model, quantizing it to nearest, saving and loading it packed.
rollout: memory and time of an iteration over a group of denoising steps, by the group's size.
run: latency, throughput, memory and file size of float, compiled and quantized networks, by runtime.
calibrate: iterations of every unit, capture, ranges and peak memory; with --against plain, ratios to a plain loop.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qdiff.api.sampling import record
from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.selectors import select
from qdiff.cli.benchmark.calibration import (
    UNIT_COLUMNS,
    WORK_COLUMNS,
    add_calibrate_command,
    benchmark_calibration,
    present,
)
from qdiff.cli.benchmark.memory import MEMORY_COLUMNS, add_memory_command, memory
from qdiff.cli.benchmark.rollout import ROLLOUT_COLUMNS, add_rollout_command, rollout
from qdiff.cli.benchmark.run import RUN_COLUMNS, add_run_command, benchmark_runs, rows_of
from qdiff.cli.benchmark.timing import in_turn
from qdiff.cli.command import print_plan
from qdiff.cli.flags import add_run_flags
from qdiff.cli.models.pixel import add_model_flags, chosen_pixel_model
from qdiff.cli.parser import make_parser, whole
from qdiff.evaluation.table import markdown_table
from qdiff.methods import MethodOptions, make_recipe
from qdiff.utils.devices import choose_device
from qdiff.utils.files import write_text

COLUMNS = [("what", "what", "s"), ("milliseconds", "ms", ".1f"), ("ratio", "time / float time", ".2f")]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    simulate = commands.add_parser("simulate", help="simulated against float, one network evaluation")
    add_model_flags(simulate)
    simulate.add_argument("--batch_size", type=whole(1), default=16, help="images at once")
    simulate.add_argument("--repeats", type=whole(1), default=15, help="timed evaluations of each, in turn")
    simulate.add_argument("--weight_bit", type=whole(2, 8), default=4, help="bits of weights")
    simulate.add_argument("--act_bit", type=whole(2, 8), default=8, help="bits of activations")
    simulate.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    add_run_flags(simulate)
    add_memory_command(commands)
    add_rollout_command(commands)
    add_calibrate_command(commands)
    add_run_command(commands)
    return parser.parse_args(argv)


@torch.no_grad()
def simulate(args: argparse.Namespace) -> list[dict]:
    """Rows for the float network and the simulated ones: weights alone, and with activations."""
    args.sample_type, args.timesteps, args.skip_type, args.eta = "generalized", 4, "quad", 0.0
    chosen, device = chosen_pixel_model(args), choose_device(args.device)
    model, pipeline, adapter = chosen.source.load(device), chosen.pipeline, chosen.adapter
    network = model.network
    trajectories = record(model, chosen.sampling, network, 4, 4)
    generator = torch.Generator().manual_seed(args.seed)
    x = torch.randn((args.batch_size, *pipeline.shape), generator=generator).to(device)
    t = torch.randint(0, len(pipeline.betas), (args.batch_size,), generator=generator).to(device)
    networks = {"float": network}
    for label, act_bits in ((f"W{args.weight_bit}", None), (f"W{args.weight_bit}A{args.act_bit}", args.act_bit)):
        options = MethodOptions(args.weight_bit, act_bits, True, 8, True, selector_steps=4, per_step=4)
        recipe = make_recipe("nearest", options)
        data = select(trajectories, recipe)
        networks[f"simulated {label}"] = calibrate(network, adapter, recipe, data, args.seed).network
    runs = {name: (lambda network=network: network(x, t)) for name, network in networks.items()}
    times = in_turn(runs, args.repeats, device)
    return [{"what": n, "milliseconds": ms, "ratio": ms / times["float"]} for n, ms in times.items()]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    device = torch.device("cpu") if args.command == "memory" else choose_device(args.device)
    about = {
        "command": args.command,
        "config": str(args.config),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    if args.command in ("simulate", "rollout"):
        about["batch_size"] = args.batch_size
    if args.command == "run":
        about |= {"model": str(args.resume_base or args.config), "batch_size": args.batch_size}
        about |= {"rows": " ".join(rows_of(args, device)), "attention": args.attention or "as the file has it"}
    if args.command == "calibrate":
        about |= {"states": args.cali_st * args.cali_n, "products": args.products}
    if args.dry_run:
        print_plan(about)
        return
    if args.json is not None:  # a folder that cannot be made is known before the measurement
        args.json.parent.mkdir(parents=True, exist_ok=True)
    found = measure(args, device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    show(found)
    if args.json is not None:
        write_text(args.json, json.dumps(about | found, indent=1) + "\n")


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The command's tables, and other numbers, by name."""
    if args.command == "calibrate":
        return benchmark_calibration(args, device)
    if args.command == "run":
        return benchmark_runs(args, device)
    if args.command == "rollout":
        return {"rollouts": rollout(args)}
    return {"rows": simulate(args) if args.command == "simulate" else memory(args)}


def show(found: dict[str, Any]) -> None:
    """Print what was measured."""
    tables = {
        "rows": [*COLUMNS, *MEMORY_COLUMNS[1:]],
        "rollouts": ROLLOUT_COLUMNS,
        "units": UNIT_COLUMNS,
        "work": WORK_COLUMNS,
        "runs": RUN_COLUMNS,
    }
    for name, value in found.items():
        if name in tables:
            print(markdown_table(value, present(value, tables[name])))
        elif isinstance(value, list):
            print(*value, sep="\n")
        else:
            print(f"{name}: {value}")

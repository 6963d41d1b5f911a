"""The flags that commands share about a run: seed, device, processes, runtime."""

from __future__ import annotations

import argparse

import torch

from qdiff.cli.parser import whole
from qdiff.deploy.runtime import PREFERENCES, RUNTIMES, check_runtime


def add_run_flags(parser: argparse.ArgumentParser, seed: int | None = 1234) -> None:
    """--seed, --device, --verbose, --dry_run."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        default=seed,
        required=seed is None,
        help="every random draw comes from it",
    )
    group.add_argument("--device", default=None, help="where to run, e.g. cpu, cuda, cuda:1 (default: a GPU if any)")
    group.add_argument("--verbose", action="store_true", help="log more, and show tracebacks")
    group.add_argument("--dry_run", action="store_true", help="print the plan and stop")


def add_team_flags(parser: argparse.ArgumentParser) -> None:
    """--devices, --num_nodes."""
    group = parser.add_argument_group("several processes", "Images are the same however many there are.")
    group.add_argument("--devices", type=whole(1), default=1, metavar="N", help="GPUs of a machine, or CPU processes")
    machines = "machines, which share the output folder; start the same command on each, by torchrun or srun"
    group.add_argument("--num_nodes", type=whole(1), default=1, metavar="M", help=machines)


def add_runtime_flags(parser: argparse.ArgumentParser) -> None:
    """--runtime, --prefer; what they ask for is checked by `check_runtime_flags`."""
    group = parser.add_argument_group("running", "How the quantized model computes (docs/running.md).")
    kinds = "float arithmetic on the grids, products of integers, ONNX Runtime, or the fastest here by measurement"
    group.add_argument("--runtime", choices=RUNTIMES, default=RUNTIMES[0], help=kinds)
    group.add_argument("--prefer", choices=PREFERENCES, default=PREFERENCES[0], help="what --runtime auto looks for")


def check_runtime_flags(args: argparse.Namespace, device: torch.device) -> None:
    """Raise ValueError naming the flag where --runtime, --prefer and --ptq are at odds, or the runtime is not here."""
    if args.runtime != "simulate" and not args.ptq:
        raise ValueError(f"--runtime {args.runtime}: runs a quantized model, so it needs --ptq")
    if args.prefer != PREFERENCES[0] and args.runtime != "auto":
        raise ValueError(f"--prefer {args.prefer}: tells --runtime auto what to look for, found {args.runtime}")
    check_runtime(args.runtime, device, args.prefer)

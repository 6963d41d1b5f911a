"""benchmark.py memory: each stage of a latent model's way to a packed file in a process of its own, and its peak."""

from __future__ import annotations

import argparse
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.selectors import CalibrationSet
from qdiff.checkpoints.native import load_checkpoint, save_checkpoint
from qdiff.cli.flags import add_run_flags
from qdiff.cli.parser import whole
from qdiff.families import adapter_for
from qdiff.families.ldm.training import (
    LatentDiffusion,
    find_checkpoint,
    find_config,
    instantiate_from_config,
    load_config,
    load_model,
    without_lightning,
)
from qdiff.methods import MethodOptions, make_recipe
from qdiff.utils.files import save_safetensors

GIB, MIB = 2**30, 2**20
MEMORY_COLUMNS = [
    ("what", "what", "s"),
    ("seconds", "s", ".0f"),
    ("peak_gib", "peak (GiB)", ".2f"),
    ("file_mib", "file (MiB)", ".0f"),
]


def add_memory_command(commands: argparse._SubParsersAction) -> None:
    """The `memory` subcommand's flags."""
    parser = commands.add_parser("memory", help="peak memory of load, quantize and save, load packed")
    parser.add_argument("-r", "--resume_base", type=Path, help="checkpoint or its folder (default: random weights)")
    parser.add_argument("--config", type=Path, help="configuration (default: the one beside the checkpoint)")
    parser.add_argument("--weight_bit", type=whole(2, 8), default=4, help="bits of weights")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    add_run_flags(parser)


def write_random_checkpoint(config_path: Path, path: Path, seed: int) -> None:
    """A checkpoint of a configuration's sizes with float16 noise for weights."""
    config = load_config(config_path)
    with torch.device("meta"):
        model: LatentDiffusion = instantiate_from_config(without_lightning(config.model))
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator) if tensor.dim() else torch.ones(())
            state[name] = (0.02 * noise if tensor.dim() > 1 else noise.abs()).half()
    save_safetensors(state, path, {})


def load_float(config_path: Path, checkpoint: Path) -> LatentDiffusion:
    """The first stage of the way: the whole float model."""
    return load_model(load_config(config_path), checkpoint)


def quantize_and_save(config_path: Path, checkpoint: Path, packed: Path, bits: int) -> None:
    """Load the float model, round its U-Net to nearest, and write the packed file."""
    network = load_float(config_path, checkpoint).model.diffusion_model
    recipe = make_recipe("nearest", MethodOptions(weight_bits=bits, split=True))
    nothing = CalibrationSet(torch.empty(0), torch.empty(0), torch.empty(0))  # weights alone need no states
    run = calibrate(network, adapter_for("ldm"), recipe, nothing, seed=0)
    save_checkpoint(packed, run.network, adapter_for("ldm"), recipe, None, {})


def _measured(work: Callable, arguments: tuple, results: multiprocessing.Queue) -> None:
    started = time.monotonic()
    work(*arguments)
    results.put((time.monotonic() - started, peak_resident()))


def peak_resident() -> int:
    """Bytes of this process resident at most, mapped pages of files included."""
    status = Path("/proc/self/status")
    if status.is_file():  # unlike ru_maxrss, it does not begin with what the process was forked from
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf8"))
        if found is not None:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_own_process(work: Callable, *arguments) -> dict[str, float]:
    """Seconds and peak resident memory, mapped pages of files included, of work(*arguments) in a new process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_measured, args=(work, arguments, results))
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(f"{work.__name__} ended with exit code {process.exitcode}")
    seconds, peak = results.get()
    return {"seconds": seconds, "peak_gib": peak / GIB}


def memory(args: argparse.Namespace) -> list[dict]:
    """Rows of the table. Raises ValueError where neither a checkpoint nor a configuration is named."""
    if args.resume_base is None and args.config is None:
        raise ValueError("-r, --config: name a checkpoint, or a configuration for random weights")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, packed = Path(folder) / "random.safetensors", Path(folder) / "packed.safetensors"
        if args.resume_base is None:
            config = args.config
            in_own_process(write_random_checkpoint, config, checkpoint, args.seed)
        else:
            checkpoint = find_checkpoint(args.resume_base)
            config = args.config or find_config(checkpoint)
        label = f"W{args.weight_bit}"
        rows = [
            {"what": "nothing but the libraries"} | in_own_process(abs, 0),
            {"what": "load the float model"} | in_own_process(load_float, config, checkpoint),
            {"what": f"load, quantize to {label}, save packed"}
            | in_own_process(quantize_and_save, config, checkpoint, packed, args.weight_bit),
            {"what": f"load packed {label}"} | in_own_process(load_checkpoint, packed),
        ]
        rows[1]["file_mib"] = checkpoint.stat().st_size / MIB
        rows[3]["file_mib"] = packed.stat().st_size / MIB
    return rows

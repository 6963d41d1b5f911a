"""benchmark.py run: what one evaluation of a network takes, float, compiled, simulated, and by every runtime."""

from __future__ import annotations

import argparse
import copy
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.calibrate import calibrate
from qdiff.checkpoints.native import read_about, save_checkpoint
from qdiff.cli.benchmark.memory import in_own_process
from qdiff.cli.benchmark.subject import Subject, load_subject
from qdiff.cli.benchmark.timing import in_turn
from qdiff.cli.flags import add_run_flags
from qdiff.cli.models.network_only import ModelOptions, add_named_model_flags, named_model
from qdiff.cli.parser import whole
from qdiff.cli.recipe_flags import bits_label
from qdiff.deploy.deferred import weight_bytes
from qdiff.deploy.layers import ATTENTION_POLICIES
from qdiff.deploy.runtime import PREFERENCES, load
from qdiff.evaluation.cost import float_bytes
from qdiff.methods import MethodOptions, make_recipe
from qdiff.recipes.recipe import Recipe

FLOATS = ("float32", "half", "float32-compiled", "half-compiled")
QUANTIZED = ("simulate", "integer", "onnx", "auto")
ROWS = FLOATS + QUANTIZED
HALVES = ("float16", "bfloat16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
KIB, MIB = 2**10, 2**20
STATES = (2, 2)  # steps, and states of each, whose ranges activations get: they hardly matter for time
RUN_COLUMNS = [
    ("what", "what", "s"),
    ("milliseconds", "ms", ".1f"),
    ("per_second", "images/s", ".1f"),
    ("to_float32", "throughput / float32", ".2f"),
    ("to_compiled", "throughput / fastest compiled", ".2f"),
    ("weights_mib", "weights (MiB)", ".2f"),
    ("peak_mib", "peak (MiB)", ".0f"),
    ("file_mib", "file (MiB)", ".2f"),
    ("file_ratio", "float32 file / file", ".2f"),
    ("note", "note", "s"),
]


def add_run_command(commands: argparse._SubParsersAction) -> None:
    """The `run` subcommand's flags."""
    parser = commands.add_parser("run", help="float, compiled and quantized networks side by side, by runtime")
    add_named_model_flags(parser)
    group = parser.add_argument_group("the quantized network", "A file, or rounded to nearest here, by noise.")
    group.add_argument("--cali_ckpt", type=Path, metavar="FILE", help="a packed checkpoint of the model")
    group.add_argument("--weight_bit", type=whole(2, 8), nargs="+", help="bits of weights, rows each (default: 8 4)")
    group.add_argument("--act_bit", type=whole(2, 8), help="bits of activations (default: 8)")
    group.add_argument("--sm_abit", type=whole(2, 16), help="bits of softmax outputs (default: 8)")
    group.add_argument("--a_sym", action="store_true", help="symmetric activations")
    group.add_argument("--split", action="store_true", help="split shortcuts fed by concatenated features")
    group.add_argument("--attention", choices=ATTENTION_POLICIES, help="how attention runs in integers")
    group = parser.add_argument_group("what is measured")
    here = "(default: all that the device has; on a CPU without integer, the slow reference)"
    group.add_argument("--runtimes", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)} {here}")
    halves = "(default: float16 on a GPU, bfloat16 on a CPU)"
    group.add_argument("--half", nargs="+", choices=HALVES, help=f"what half precision is {halves}")
    group.add_argument(
        "--compile_modes", nargs="+", choices=COMPILE_MODES, default=["default"], help="of torch.compile"
    )
    group.add_argument("--prefer", choices=PREFERENCES, default=PREFERENCES[0], help="what auto looks for")
    group.add_argument("--batch_size", type=whole(1), default=16, help="images at once")
    group.add_argument("--repeats", type=whole(1), default=15, help="timed evaluations of each, in turn")
    memory = "on a CPU: also the peak of loading and one evaluation, in a process of its own"
    group.add_argument("--memory", action="store_true", help=memory)
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    add_run_flags(parser)


def rows_of(args: argparse.Namespace, device: torch.device) -> tuple[str, ...]:
    """The rows that are asked for, in the order of ROWS. Raises ValueError for flags that are at odds."""
    if args.cali_ckpt is not None:
        given = [name for name in ("weight_bit", "act_bit", "sm_abit", "a_sym", "split") if getattr(args, name)]
        if given:
            raise ValueError(f"--{given[0]}: {args.cali_ckpt} brings its own recipe; give one of them")
    if args.memory and device.type != "cpu":
        raise ValueError(f"--memory: measures processes on the CPU, found {device}, whose peak is always measured")
    asked = args.runtimes
    if asked is None:
        asked = set(ROWS) - ({"integer"} if device.type == "cpu" else {"onnx"})
    return tuple(row for row in ROWS if row in asked or row == "float32")


@dataclass
class Row:
    """One network under measurement. start: makes it and the call that evaluates it once; file: bytes on disk."""

    what: str
    kind: str  # "float", "compiled" or "quantized"
    start: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]
    file: int
    alone: tuple  # what `evaluate_alone` is given; () where it does not measure the row
    found: dict[str, Any] = field(default_factory=dict)
    evaluate: Callable[[], Tensor] | None = None

    def prepare(self, device: torch.device, verbose: bool = False) -> None:
        """Make the network and evaluate it; what does not work is noted (verbose: traced), and the others go on."""
        before = _allocated(device)
        try:
            network, self.evaluate = self.start()
            self.evaluate()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                self.evaluate()
                torch.cuda.synchronize(device)
                self.found["peak_mib"] = (torch.cuda.max_memory_allocated(device) - before) / MIB
            if (held := weight_bytes(network)) is not None:
                self.found["weights_mib"] = held / MIB
        except Exception as error:  # compilers, kernels and packages fail in their own ways
            if verbose:
                traceback.print_exc()
            self.evaluate, self.found = None, {"note": f"does not run: {_first_line(error)}"}


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0][:150]


@dataclass(frozen=True)
class Bench:
    """What the rows are made of. files: packed checkpoints by the label of their bits; heard: what auto reports."""

    args: argparse.Namespace
    device: torch.device
    subject: Subject
    inputs: tuple[Tensor, ...]
    files: dict[str, Path]
    heard: list[str]

    def rows(self, asked: Sequence[str]) -> list[Row]:
        """Rows in the order of the table."""
        halves = self.args.half or [HALVES[self.device.type == "cpu"]]
        types = {"float32": ("float32",), "half": tuple(halves)}
        found = []
        for name in asked:
            precision, _, compiled = name.partition("-")
            for dtype in types.get(precision, ()):
                modes = (self.args.compile_modes or COMPILE_MODES[:1]) if compiled else (None,)
                found += [self._float_row(dtype, mode) for mode in modes]
            if name in QUANTIZED:
                found += [self._quantized_row(name, label, path) for label, path in self.files.items()]
        return found

    def _float_row(self, dtype: str, mode: str | None) -> Row:
        kind = "eager" if mode is None else "compiled" if mode == "default" else f"compiled ({mode})"
        size = float_bytes(self.subject.network) * getattr(torch, dtype).itemsize // torch.float32.itemsize
        plain = mode is None and dtype == "float32"
        start = partial(self._start_plain) if plain else partial(self._start_float, getattr(torch, dtype), mode)
        alone = (dtype, None) if mode is None else ()
        return Row(f"{dtype} {kind}", "float" if mode is None else "compiled", start, size, alone)

    def _start_plain(self) -> tuple[nn.Module, Callable[[], Tensor]]:
        return self.subject.network, partial(self.subject.network, *self.inputs)

    def _start_float(self, dtype: torch.dtype, mode: str | None) -> tuple[nn.Module, Callable[[], Tensor]]:
        """Channels last, attention by scaled-dot-product attention as ever."""
        network = copy.deepcopy(self.subject.network).to(dtype=dtype, memory_format=torch.channels_last)
        inputs = [cast(tensor, dtype) for tensor in self.inputs]
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
        runs = network if mode is None else torch.compile(network, mode=mode, fullgraph=True)
        return network, partial(runs, *inputs)

    def _quantized_row(self, runtime: str, label: str, path: Path) -> Row:
        def start() -> tuple[nn.Module, Callable[[], Tensor]]:
            network = self._load(path, runtime)
            return network, partial(network, *self.inputs)

        return Row(f"{runtime} {label}", "quantized", start, path.stat().st_size, (runtime, path))

    def _load(self, path: Path, runtime: str) -> nn.Module:
        options = {"prefer": self.args.prefer, "attention": self.args.attention, "report": self.heard.append}
        return load(path, runtime, device=self.device, **options)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In dtype, unless it holds timesteps or labels."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def packed_files(args: argparse.Namespace, subject: Subject, folder: Path) -> dict[str, Path]:
    """Packed checkpoints by the label of their bits: the one of --cali_ckpt, or new ones, rounded to nearest."""
    if args.cali_ckpt is not None:
        about = read_about(args.cali_ckpt)
        named_model(ModelOptions.of(args)).check(args.cali_ckpt, about["family"], about["config"])
        return {bits_label(Recipe.from_dict(about["recipe"])): args.cali_ckpt}
    found = {}
    for bits in dict.fromkeys(args.weight_bit or (8, 4)):
        options = MethodOptions(bits, args.act_bit or 8, args.a_sym, args.sm_abit or 8, args.split)
        recipe = make_recipe("nearest", options)
        run = calibrate(subject.network, subject.adapter, recipe, subject.states(*STATES, args.seed), args.seed)
        path = folder / f"{bits_label(recipe)}.safetensors"
        save_checkpoint(path, run.network, subject.adapter, recipe, None, {})
        found[bits_label(recipe)] = path
    return found


@torch.no_grad()
def benchmark_runs(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The table's rows, and what auto chose."""
    asked = rows_of(args, device)
    with tempfile.TemporaryDirectory() as folder:
        subject, heard = load_subject(args, device), []
        needed = any(row in QUANTIZED for row in asked)
        files = packed_files(args, subject, Path(folder)) if needed else {}
        inputs = tuple(
            tensor.to(device) for tensor in named_model(ModelOptions.of(args)).inputs(args.batch_size, args.seed)
        )
        bench = Bench(args, device, subject, inputs, files, heard)
        rows = bench.rows(asked)
        for row in rows:
            row.prepare(device, args.verbose)
        if (broken := rows[0].found.get("note")) is not None:  # the baseline
            raise ValueError(f"{rows[0].what} {broken}")
        times = in_turn({row.what: row.evaluate for row in rows if row.evaluate}, args.repeats, device)
        found = {"runs": table(rows, times, args.batch_size)} | ({"auto": heard} if heard else {})
        if args.memory:
            found["libraries_peak_mib"] = in_own_process(abs, 0)["peak_gib"] * KIB
            for row, numbers in zip(rows, found["runs"], strict=True):
                if row.evaluate is not None and row.alone:
                    numbers["peak_mib"] = in_own_process(evaluate_alone, args, *row.alone)["peak_gib"] * KIB
    return found


def table(rows: Sequence[Row], times: dict[str, float], batch_size: int) -> list[dict[str, Any]]:
    """The numbers of every row: ratios to the first one, float32 eager, and to the fastest compiled float network."""
    compiled = min((times[row.what] for row in rows if row.kind == "compiled" and row.evaluate), default=None)
    found = []
    for row in rows:
        numbers = {"what": row.what, **row.found, "file_mib": row.file / MIB, "file_ratio": rows[0].file / row.file}
        if row.what in times:
            ms = times[row.what]
            numbers |= {"milliseconds": ms, "per_second": 1e3 * batch_size / ms, "to_float32": times[rows[0].what] / ms}
            numbers |= {} if compiled is None else {"to_compiled": compiled / ms}
        found.append(numbers)
    return found


@torch.no_grad()
def evaluate_alone(args: argparse.Namespace, what: str, path: Path | None) -> None:
    """Load one network on the CPU, float in the dtype `what` or packed by the runtime `what`, and evaluate it once."""
    model = named_model(ModelOptions.of(args))
    if path is None:
        dtype = getattr(torch, what)
        network = model.load().to(dtype)
    else:
        dtype, network = torch.float32, load(path, what, prefer=args.prefer, attention=args.attention)
    network(*(cast(tensor, dtype) for tensor in model.inputs(args.batch_size, args.seed)))

"""benchmark.py calibrate: iterations, capture, ranges and memory of a calibration, and their ratios to a plain one."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.context import Calibration, RunOptions
from qdiff.calibration.frontier import BaselineFrontier, Frontier
from qdiff.calibration.loop import UnitData, UnitTask, optimise, parameter_groups
from qdiff.calibration.selectors import CalibrationSet
from qdiff.calibration.stages import find_activation_ranges, find_weight_ranges
from qdiff.cli.benchmark.plain_calibration import Counter, baseline_optimise, counting
from qdiff.cli.benchmark.subject import Subject, load_subject
from qdiff.cli.benchmark.timing import seconds_of, synchronize
from qdiff.cli.flags import add_run_flags
from qdiff.cli.models.network_only import add_named_model_flags
from qdiff.cli.parser import whole
from qdiff.cli.progress import peak_memory
from qdiff.cli.recipe_flags import PRODUCTS
from qdiff.methods import MethodOptions, make_recipe
from qdiff.nn.layers import quant_layers
from qdiff.recipes.recipe import Recipe
from qdiff.recipes.stages import ActivationRanges, RangeSpec, Reconstruct, WeightRanges
from qdiff.utils.devices import tensor_float32

FINDERS = ("minmax", "shrink")
ROUNDS, WARM_UP = 3, 8  # the fourth iteration captures a graph
LATER = 1000  # iterations that rounds after the first one plan for: the loop looks at its loss a hundred times
UNIT_COLUMNS = [
    ("unit", "unit", "s"),
    ("w_rate", "weights (it/s)", ".1f"),
    ("w_ms", "weights (ms/it)", ".2f"),
    ("w_plain_ms", "plain (ms/it)", ".2f"),
    ("w_ratio", "plain / weights", ".2f"),
    ("a_rate", "activations (it/s)", ".1f"),
    ("a_ms", "activations (ms/it)", ".2f"),
    ("a_plain_ms", "plain (ms/it)", ".2f"),
    ("a_ratio", "plain / activations", ".2f"),
    ("start", "start (s)", ".2f"),
]
WORK_COLUMNS = [
    ("what", "what", "s"),
    ("seconds", "s", ".2f"),
    ("per_unit", "s / unit and 1,024 states", ".2f"),
    ("cpu", "CPU s", ".2f"),
    ("runs", "module runs", "d"),
    ("plain_seconds", "plain (s)", ".2f"),
    ("seconds_ratio", "plain s / s", ".1f"),
    ("plain_cpu", "plain CPU s", ".2f"),
    ("cpu_ratio", "plain CPU s / CPU s", ".1f"),
    ("plain_runs", "plain module runs", "d"),
    ("runs_ratio", "plain runs / runs", ".1f"),
]


def add_calibrate_command(commands: argparse._SubParsersAction) -> None:
    """The `calibrate` subcommand's flags."""
    parser = commands.add_parser("calibrate", help="speed of a calibration's parts, and against a plain one")
    add_named_model_flags(parser)
    states = parser.add_argument_group("calibration states", "Noise: only time is measured.")
    states.add_argument("--cali_st", type=whole(1), default=4, help="sampler steps to calibrate on")
    states.add_argument("--cali_n", type=whole(1), default=16, help="samples of each of those steps")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--units", nargs="+", metavar="NAME", help="units whose iterations are timed (default: all)")
    what.add_argument("--iters", type=whole(1), default=30, help="timed iterations of each unit")
    what.add_argument("--batch_size", type=whole(1), help="of the learned stages (default: 32, with prompts 8)")
    what.add_argument("--weight_bit", type=whole(2, 8), default=4, help="bits of weights")
    what.add_argument("--act_bit", type=whole(2, 8), default=8, help="bits of activations")
    what.add_argument("--ranges", nargs="*", choices=FINDERS, help="finders of weight ranges (default: both)")
    what.add_argument("--products", choices=PRODUCTS, default="float32", help="arithmetic while units learn")
    against = parser.add_argument_group("ratios to a plain loop in this process")
    against.add_argument("--against", choices=("plain",), help="whole prefix for every unit, no graphs, PyTorch's Adam")
    against.add_argument("--method", choices=("quick", "q-diffusion"), help="also compare a whole calibration")
    against.add_argument(
        "--cali_iters", type=whole(1), help="its iterations per unit (q-diffusion: a quarter for scales)"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    add_run_flags(parser)


def spent(work: Callable[[], object], device: torch.device, counter: Counter) -> dict[str, float]:
    """What a call takes: seconds, CPU seconds of this process (which other processes do not lengthen), module runs."""
    started = time.process_time()
    seconds = seconds_of(work, device)
    return {"seconds": seconds, "cpu": time.process_time() - started, "runs": counter.runs}


class Enough(Exception):
    """Ends a loop whose iterations have been timed."""


@dataclass(frozen=True)
class Bench:
    """A quantized network between the stages of `q-diffusion`, with the published batch size and iterations."""

    args: argparse.Namespace
    device: torch.device
    recipe: Recipe
    run: Calibration

    @property
    def stages(self) -> dict[str, Reconstruct]:
        """The learned stages, w for weights and a for activations, with the rounding penalty on from the start."""
        found = [stage for stage in self.recipe.stages if isinstance(stage, Reconstruct)]
        penalty = replace(found[0].penalty, warmup=0.0)
        return {"w": replace(found[0], penalty=penalty), "a": found[1]}

    def units(self) -> list[str]:
        """The units that are timed, in execution order. Raises ValueError naming one that is not there."""
        known = self.run.executed_units()
        for name in self.args.units or []:
            if name not in known:
                raise ValueError(f"--units {name}: expected some of {', '.join(known)}")
        return [name for name in known if self.args.units is None or name in self.args.units]

    def range_rows(self) -> list[dict]:
        """Seconds to find and round to all weight grids by each finder; what the last one finds, stays."""
        rows, asked = [], FINDERS if self.args.ranges is None else self.args.ranges
        for finder in reversed(FINDERS):
            if finder in asked or finder == FINDERS[0]:  # which has to set the grids
                stage = WeightRanges(RangeSpec(finder))
                seconds = seconds_of(lambda s=stage: find_weight_ranges(self.run, s), self.device)
                rows.append({"what": f"weight ranges, {finder}", "seconds": seconds, "finder": finder})
        return [row for row in reversed(rows) if row.pop("finder") in asked]

    def activation_row(self) -> dict:
        """Seconds to find all activation ranges, as the method does."""
        stage = next(stage for stage in self.recipe.stages if isinstance(stage, ActivationRanges))
        seconds = seconds_of(lambda: find_activation_ranges(self.run, stage), self.device)
        states = min(stage.samples, len(self.run.data))
        return {"what": f"activation ranges, {stage.range.finder}, {states} states", "seconds": seconds}

    def capture(self, kind: type[Frontier], network: nn.Module) -> dict[str, float]:
        """What it takes to bring the states of one stream before each unit in turn, and to get the float targets."""
        counter, is_float = Counter(), network is self.run.float_network

        def work() -> None:
            frontier = counting(kind, counter)(network, self.run.adapter, self.run.data, 16, self.run.store)
            for name in self.run.executed_units():
                frontier.seek(name)
                if is_float:
                    frontier.cached_outputs(name)

        return spent(work, self.device, counter)

    def capture_rows(self) -> list[dict]:
        """Capture of both streams, and of the plain way."""
        rows, scale = [], 1024 / len(self.run.data) / len(self.run.executed_units())
        for what, network in (("float", self.run.float_network), ("quantized", self.run.network)):
            row = {"what": f"capture, {what}"} | self.capture(Frontier, network)
            row["per_unit"] = row["seconds"] * scale
            if self.args.against:
                row |= {f"plain_{key}": value for key, value in self.capture(BaselineFrontier, network).items()}
            rows.append(row)
        if self.args.against:
            keys = [key for key in rows[0] if key not in ("what", "per_unit")]
            rows.append({"what": "capture"} | {key: sum(row[key] for row in rows) for key in keys})
        return rows

    def unit_rows(self, key: str) -> list[dict]:
        """Milliseconds an iteration of every unit, in one of the learned stages."""
        stage = self.stages[key]
        frontiers = [self.run.frontier(self.run.float_network)]
        if stage.inputs == "quantized":
            frontiers.append(self.run.frontier(self.run.network))
        return [{"unit": name} | self.unit_times(key, stage, name, frontiers) for name in self.units()]

    def unit_times(self, key: str, stage: Reconstruct, name: str, frontiers: list[Frontier]) -> dict[str, float]:
        """Median milliseconds of some rounds, in turn with the plain loop; {} where the stage has nothing to learn."""
        target, source = frontiers[0].cached_outputs(name), frontiers[-1]
        segment = source.seek(name)

        def arguments(index: Any) -> tuple:
            return source.arguments(segment, index)

        data = UnitData(arguments, arguments, target, source.t, not self.run.store.has_spilled())
        loops = {"": optimise} | ({"_plain": baseline_optimise} if self.args.against else {})
        found: dict[str, list[tuple[float, float]]] = {label: [] for label in loops}
        for turn in range(ROUNDS):  # the first one starts as long a loop as the published one
            timed = stage if turn == 0 else replace(stage, iterations=LATER)
            for label, loop in loops.items():
                times = self._time_loop(loop, timed, name, data)
                if times is None:
                    return {}
                found[label].append(times)
        times = {f"{key}{label}_ms": statistics.median(ms for _, ms in pairs) for label, pairs in found.items()}
        times[f"{key}_rate"] = 1e3 / times[f"{key}_ms"]
        if self.args.against:
            times[f"{key}_ratio"] = times[f"{key}_plain_ms"] / times[f"{key}_ms"]
        return times | ({"start": found[""][0][0]} if key == "w" else {})

    def _time_loop(self, loop: Callable, stage: Reconstruct, name: str, data: UnitData) -> tuple[float, float] | None:
        """(seconds up to the end of the warm-up, milliseconds an iteration after it); None: nothing to learn."""
        unit, count = self.run.segment(name).module, math.ceil(self.args.iters / ROUNDS)
        started, times = time.perf_counter(), []
        groups = parameter_groups(unit, stage, self.run.unrounded_by_layer())
        if not groups:
            return None

        def tick(_: float) -> None:
            nonlocal seen
            seen += 1
            if seen in (WARM_UP, WARM_UP + count):
                synchronize(self.device)
                times.append(time.perf_counter())
            if seen == WARM_UP + count:
                raise Enough

        seen = 0
        stage = replace(stage, iterations=max(stage.iterations, WARM_UP + count))
        products = "bfloat16" if self.args.products == "bfloat16" else "float32"
        generator = self.run.generator(0)
        with suppress(Enough):
            task = UnitTask(unit, data, stage, groups, self.run.network.step_table, products=products)
            loop(task, generator, tick=tick)
        for layer in quant_layers(unit).values():
            layer.finish_rounding()
        return times[0] - started, 1e3 * (times[1] - times[0]) / count


def options_of(args: argparse.Namespace, subject: Subject, **more: Any) -> MethodOptions:
    """A method's options by the flags: symmetric activations and split shortcuts, as published."""
    return MethodOptions(
        args.weight_bit,
        args.act_bit,
        act_symmetric=True,
        split=True,
        selector_steps=args.cali_st,
        per_step=args.cali_n,
        batch_size=args.batch_size or (8 if subject.family == "text" else 32),
        family=subject.family,
        **more,
    )


def compare(args: argparse.Namespace, subject: Subject, data: CalibrationSet) -> tuple[dict, dict]:
    """(row, agreement) of a whole calibration, ours and the plain one, of the same data and seed."""
    shares: dict[str, int] = {}
    if args.cali_iters is not None:
        shares = {"iterations": args.cali_iters, "act_iterations": max(1, args.cali_iters // 4)}
    recipe = make_recipe(args.method, options_of(args, subject, **shares))
    device, runs, row = next(subject.network.parameters()).device, [], {"what": f"whole calibration, {recipe.name}"}
    products = "bfloat16" if args.products == "bfloat16" else "float32"
    for label, kind, loop in (("", Frontier, optimise), ("plain_", BaselineFrontier, baseline_optimise)):
        counter = Counter()
        options = RunOptions(products=products, frontier=counting(kind, counter), optimise=loop)

        def work(options: RunOptions = options) -> None:
            runs.append(calibrate(subject.network, subject.adapter, recipe, data, args.seed, options=options))

        row |= {f"{label}{key}": value for key, value in spent(work, device, counter).items()}
    return row, agreement(*runs)


def agreement(run: Calibration, other: Calibration) -> dict[str, Any]:
    """The share of equal codes; how the units' errors after learning differ, relatively: the median, the largest."""
    theirs = quant_layers(other.network)
    pairs = [(layer.codes, theirs[name].codes) for name, layer in quant_layers(run.network).items()]
    equal = sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    reports = zip(run.reports, other.reports, strict=True)
    off = {(a.stage, a.unit): abs(a.after - b.after) / max(b.after, 1e-30) for a, b in reports}
    worst = max(off, key=off.get)
    found = {"equal_codes": equal, "median_error_difference": statistics.median(off.values())}
    return found | {"largest_error_difference": off[worst], "in_stage": worst[0], "in_unit": worst[1]}


def benchmark_calibration(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The rows of both tables, and what else there is to say, by name."""
    with tensor_float32(args.products == "tf32"):
        if args.method is not None and args.against is None:
            raise ValueError("--method: whole calibrations are only compared; add --against plain")
        subject = load_subject(args, device)
        data = subject.states(args.cali_st, args.cali_n, args.seed)
        recipe = make_recipe("q-diffusion", options_of(args, subject))
        nothing = calibrate(subject.network, subject.adapter, replace(recipe, stages=()), data, args.seed)
        bench = Bench(args, device, recipe, nothing)
        bench.units()  # a wrong name is known before the measurement
        warm = next(data.batches(16)).to(next(subject.network.parameters()))
        with torch.no_grad():
            subject.network(warm.x, warm.t, **subject.adapter.conditioning(subject.network, warm.context))
        ranges, capture, weights = bench.range_rows(), bench.capture_rows(), bench.unit_rows("w")
        work = [*ranges, bench.activation_row(), *capture]
        units = [w | a for w, a in zip(weights, bench.unit_rows("a"), strict=True)]
        found: dict[str, Any] = {"batch_size": bench.stages["w"].batch_size, "units": units}
        found |= {
            "minutes_of_published_iterations_of_these_units": published_minutes(bench, units),
            "peak_bytes": peak_memory(device),
        }
        del bench, nothing
        if args.against and args.method:
            row, found["agreement"] = compare(args, subject, data)
            work.append(row)
    for row in work:
        for key in ("seconds", "cpu", "runs"):
            if f"plain_{key}" in row:
                row[f"{key}_ratio"] = row[f"plain_{key}"] / max(row[key], 1e-9)
    return found | {"work": work}


def published_minutes(bench: Bench, units: list[dict]) -> float:
    """What all published iterations of the timed units would take."""
    total = sum(row.get(f"{key}_ms", 0.0) * stage.iterations for key, stage in bench.stages.items() for row in units)
    return total / 60e3


def present(rows: list[dict], columns: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The columns that some row has a value for."""
    return [column for column in columns if any(column[0] in row for row in rows)]

"""The flags that the scripts share, written once, and what every script does around its work."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from qdiff.calibration.store import MemoryLimits
from qdiff.deploy.runtime import PREFERENCES, RUNTIMES, check_runtime
from qdiff.methods import METHODS, MethodOptions, make_recipe, require_stages
from qdiff.recipes.overrides import apply_overrides
from qdiff.recipes.recipe import COMPAT, Recipe, softmax_spec
from qdiff.utils.files import find_shipped

logger = logging.getLogger(__name__)

# What the original scripts assume where a flag is left out; --method and --recipe bring their own values instead.
ORIGINAL_DEFAULTS = {"selector_steps": 1, "per_step": 1024}
QUANT_MODES = {"qdiff": "q-diffusion", "linear": "nearest"}
PRODUCTS = ("float32", "tf32", "bfloat16")
# Flags whose value a recipe file holds.
HELD_BY_RECIPE = (
    *("method", "running_stat", "rs_sm_only", "a_min_max", "rounding_start", "compat"),
    *("cali_batch_size", "cali_iters", "cali_iters_a", "cali_lr", "cali_p"),
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = action.required or action.default is False or action.default in (None, ())
        return action.help if says_nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Takes flags only as they are spelled, and says in one line what is wrong with them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": HelpFormatter, **options})

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')} (--help lists the flags)\n")


def make_parser(description: str) -> argparse.ArgumentParser:
    """A script's parser."""
    return Parser(description=description)


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of a flag that takes a whole number within bounds."""
    wanted = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    return _bounded(int, low, float("inf") if high is None else high, wanted)


def number(low: float, high: float) -> Callable[[str], float]:
    """The type of a flag that takes a number within bounds."""
    return _bounded(float, low, high, f"a number from {low:g} to {high:g}")


SIZES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory_limits(text: str) -> MemoryLimits:
    """The type of --max_memory: a size for the device and the host each, or two of them."""
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", part.strip(), re.IGNORECASE)
        if found is None:
            raise argparse.ArgumentTypeError(f"expected a size such as 8GB, or two as 20GB,60GB, found {text!r}")
        sizes.append(int(float(found[1]) * SIZES[found[2].upper()]))
    if len(sizes) > 2:
        raise argparse.ArgumentTypeError(f"expected one size or two, for device and host, found {text!r}")
    return MemoryLimits(device=sizes[0], host=sizes[-1])


def _bounded(kind: type, low: float, high: float, wanted: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {wanted}, found {text!r}")
        return value

    return read


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


def add_quantization_flags(parser: argparse.ArgumentParser) -> None:
    """The original scripts' quantization flags, and --method, --recipe, --set, --rounding_start, --compat.

    Flags that a method has its own value for default to None here; help texts say what that means.
    """
    group = parser.add_argument_group("quantization")
    group.add_argument("--ptq", action="store_true", help="quantize; without it the float model samples")
    add_structure_flags(group)
    modes = ", ".join(f"{mode}: {method}" for mode, method in QUANT_MODES.items())
    group.add_argument("--quant_mode", choices=QUANT_MODES, default="qdiff", help=f"methods' original names ({modes})")
    methods = f"calibration method, with its own defaults: {', '.join(METHODS)}"
    group.add_argument("--method", choices=METHODS, metavar="NAME", help=methods)
    group.add_argument("--recipe", type=Path, metavar="FILE", help="a recipe (YAML) in place of a method")
    add_set_flag(group)
    group.add_argument("--running_stat", action="store_true", help="moving averages for activation ranges")
    group.add_argument("--rs_sm_only", action="store_true", help="moving averages for ranges of softmax outputs only")
    group.add_argument("--a_min_max", action="store_true", help="activation ranges by minimum and maximum")
    group.add_argument("--rounding_start", choices=("nearest", "gptq"), help="q-diffusion's start (default: nearest)")
    faults = f"reproduce faults of the original: {', '.join(COMPAT)}"
    group.add_argument("--compat", nargs="*", choices=COMPAT, default=(), metavar="FAULT", help=faults)
    add_calibration_flags(parser.add_argument_group("calibration"))
    add_machine_flags(parser)


def add_structure_flags(group: argparse._ArgumentGroup) -> None:
    """What Q-Diffusion's checkpoints do not say about themselves: --quant_act, bit widths, --a_sym, --split."""
    group.add_argument("--quant_act", action="store_true", help="quantize activations too")
    group.add_argument("--weight_bit", type=whole(2, 8), help="bits of weights, 2 to 8 (default: 8)")
    group.add_argument("--act_bit", type=whole(2, 8), help="bits of activations, 2 to 8 (default: 8)")
    group.add_argument("--sm_abit", type=whole(2, 16), help="bits of softmax outputs, 2 to 16 (default: 8)")
    group.add_argument("--a_sym", action="store_true", help="symmetric activations")
    group.add_argument("--split", action="store_true", help="split shortcuts fed by concatenated features")


def add_set_flag(group: argparse._ArgumentGroup) -> None:
    """--set, whose values `qdiff.recipes.overrides.apply_overrides` takes; None where it is left out."""
    example = "reconstruct.iterations=100 selector.name=density_variety weights.bits=4"
    changes = "change fields of the recipe, last of all; --dry_run shows them; e.g. --set"
    group.add_argument("--set", nargs="+", action="extend", metavar="PATH=VALUE", help=f"{changes} {example}")


def add_calibration_flags(group: argparse._ArgumentGroup) -> None:
    """The --cali_... flags and what to resume from."""
    group.description = "Defaults are those of --quant_mode qdiff; --method and --recipe bring their own."
    group.add_argument("--cali_st", type=whole(1), help="sampler steps to calibrate on (default: 1)")
    group.add_argument("--cali_n", type=whole(1), help="samples of each of those steps (default: 1024)")
    group.add_argument("--cali_batch_size", type=whole(1), help="batch of the learned stages (default: 32)")
    group.add_argument("--cali_iters", type=whole(1), help="iterations per unit for weights (default: 20000)")
    group.add_argument("--cali_iters_a", type=whole(1), help="iterations per unit for activations (default: 5000)")
    group.add_argument("--cali_lr", type=number(1e-9, 1e3), help="learning rate of activation scales (default: 4e-4)")
    group.add_argument("--cali_p", type=number(0.1, 10), help="norm of the activation stage's loss (default: 2.4)")
    group.add_argument("--cali_data_path", type=Path, metavar="PATH", help="calibration data; made here if left out")
    group.add_argument("--cali_ckpt", type=Path, metavar="FILE", help="calibrated checkpoint: ckpt.pth or .safetensors")
    group.add_argument("--resume", action="store_true", help="load --cali_ckpt (meant when --cali_ckpt is given)")
    group.add_argument("--resume_w", action="store_true", help="take weights from --cali_ckpt, calibrate activations")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """How a calibration is carried out: --max_memory, --scratch, --calibration_products, --resume_calibration,
    --tensorboard."""
    group = parser.add_argument_group("calibration on this machine", "None of these changes what comes out.")
    sizes = "memory for calibration states, as 8GB, or DEVICE,HOST as 20GB,60GB; what is beyond goes to disk"
    group.add_argument("--max_memory", type=memory_limits, metavar="SIZE", help=f"{sizes} (default: no limit)")
    group.add_argument("--scratch", type=Path, metavar="DIR", help="where it goes to (default: the run's folder)")
    kinds = "arithmetic of products while units learn; tf32 and bfloat16 are faster on GPUs and less exact"
    group.add_argument("--calibration_products", choices=PRODUCTS, default="float32", help=kinds)
    resumes = "insist on going on with an unfinished run (done by itself where the output folder has one of this plan)"
    group.add_argument("--resume_calibration", action="store_true", help=resumes)
    events = "also write losses and errors for TensorBoard, into tensorboard/ of the run's folder"
    group.add_argument("--tensorboard", action="store_true", help=events)


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
    try:
        check_runtime(args.runtime, device, args.prefer)
    except ValueError as error:
        raise ValueError(f"--{error}") from error


def warn_without_effect(args: argparse.Namespace) -> None:
    """Say which flags about activations do nothing because --quant_act is missing."""
    given = [f"--{name}" for name in ("act_bit", "sm_abit", "a_sym") if getattr(args, name)]
    if args.ptq and not args.quant_act and args.recipe is None and given:
        logger.warning("%s: no effect without --quant_act, activations stay float", ", ".join(given))


def method_options(args: argparse.Namespace) -> MethodOptions:
    """The flags as options; the original scripts' defaults where neither --method nor --recipe is given."""
    given: dict[str, Any] = {
        "weight_bits": args.weight_bit,
        "act_bits": (args.act_bit if args.act_bit is not None else 8) if args.quant_act else None,
        "act_symmetric": args.a_sym,
        "softmax_bits": args.sm_abit,
        "split": args.split,
        "selector_steps": args.cali_st,
        "per_step": args.cali_n,
        "batch_size": args.cali_batch_size,
        "iterations": args.cali_iters,
        "act_iterations": args.cali_iters_a,
        "act_rate": args.cali_lr,
        "loss_p": args.cali_p,
        "running_stat": args.running_stat,
        "softmax_running_stat": args.rs_sm_only,
        "act_range": "minmax" if args.a_min_max else None,
        "family": getattr(args, "family", None),
        "rounding_start": args.rounding_start,
        "compat": tuple(args.compat),
    }
    options = replace(MethodOptions(), **{name: value for name, value in given.items() if value is not None})
    if args.method is None:
        missing = {k: v for k, v in ORIGINAL_DEFAULTS.items() if getattr(options, k) is None}
        options = replace(options, **missing)
    return options


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that --recipe, --method or --quant_mode asks for, changed by --set.

    Bit widths, --a_sym, --split, --cali_st and --cali_n given beside --recipe replace the recipe's. Raises ValueError
    naming what is wrong.
    """
    if args.set and args.cali_ckpt is not None and not args.resume_w:
        raise ValueError(f"--set: changes a calibration, and --cali_ckpt {args.cali_ckpt} is used as it is")
    if args.recipe is None:
        recipe = make_recipe(args.method or QUANT_MODES[args.quant_mode], method_options(args))
    else:
        recipe = _recipe_of_file(args)
    if args.set:
        recipe = apply_overrides(recipe, args.set)
    try:
        require_stages(recipe)
    except ValueError as error:
        sources = [str(args.recipe)] * (args.recipe is not None) + ["--set"] * bool(args.set)
        raise ValueError(f"{' with '.join(sources) or recipe.name}: {error}") from error
    return recipe


def _recipe_of_file(args: argparse.Namespace) -> Recipe:
    """The recipe of --recipe, with what is given beside it. Raises ValueError naming what is wrong."""
    args.recipe = find_shipped(args.recipe)
    if not args.recipe.is_file():
        raise FileNotFoundError(f"--recipe {args.recipe}: no such file")
    for name in HELD_BY_RECIPE:
        if getattr(args, name):
            raise ValueError(f"--{name}: the recipe holds it, so say it in {args.recipe}")
    recipe = Recipe.load(args.recipe)
    if args.quant_act and recipe.activations is None:
        raise ValueError(f"--quant_act: contradicts {args.recipe}, which leaves activations float")
    activations, softmax = recipe.activations, recipe.softmax
    if activations is not None:
        activations = _with(activations, bits=args.act_bit, kind="signed" if args.a_sym else None)
        softmax = softmax if args.sm_abit is None else _with(softmax_spec(recipe), bits=args.sm_abit)
    return replace(
        recipe,
        weights=_with(recipe.weights, bits=args.weight_bit),
        activations=activations,
        softmax=softmax,
        split_shortcuts=recipe.split_shortcuts or args.split,
        selector=_with(recipe.selector, steps=args.cali_st, per_step=args.cali_n),
    )


def _with(spec: Any, **given: Any) -> Any:
    """The spec with those fields replaced that are given."""
    return replace(spec, **{name: value for name, value in given.items() if value is not None})


def bits_label(recipe: Recipe | None) -> str:
    """W4A8 and the like, 32 for activations that stay float; "float" for no recipe."""
    if recipe is None:
        return "float"
    return f"W{recipe.weights.bits}A{32 if recipe.activations is None else recipe.activations.bits}"


def new_folder(parent: Path) -> Path:
    """Create a folder named after date and time in `parent`, with a counter where another run has taken the name."""
    parent.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y-%m-%d-%H-%M-%S")
    folder, attempt = parent / name, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            attempt += 1
            folder = parent / f"{name}-{attempt}"


def printable(text: str, kept: str = "") -> str:
    """The text with control characters and others that do not print, apart from those `kept`, as escapes.

    Names that files hold reach people through messages; a terminal would obey what is in them.
    """
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


class PlainFormatter(logging.Formatter):
    """Lines of a log, with nothing in them that a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), kept="\n\t")


def start_log(folder: Path, verbose: bool, rank: int = 0) -> None:
    """Create the output folder and log into its run.log from here on. Raises OSError where it cannot be written.

    rank: of this process among several; those behind the first log into files of their own, and show errors only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"run.rank{rank}.log" if rank else "run.log"
    handlers = [logging.FileHandler(folder / name, encoding="utf8"), logging.StreamHandler(sys.stderr)]
    handlers[0].setLevel(logging.DEBUG if verbose else logging.INFO)
    handlers[1].setLevel(logging.ERROR if rank else logging.INFO if verbose else logging.WARNING)
    for handler in handlers:
        handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=handlers, force=True)
    logger.info("command: %s", " ".join(sys.argv))
    logger.info("torch %s, %d threads", torch.__version__, torch.get_num_threads())


def print_plan(plan: dict[str, Any], recipe: Recipe | None = None) -> None:
    """Show what a run would do, as YAML; a recipe under its own key can be saved and given back by --recipe."""
    plan = plan if recipe is None else plan | {"recipe": recipe.to_dict()}
    print(yaml.safe_dump(plan, sort_keys=False, width=100), end="")


GOES_ON = ": the same command goes on where it stopped"  # what a script says that can do so after Ctrl-C


def run_main(main: Callable[[Sequence[str] | None], None], interrupted: str = "") -> None:
    """Run a script's main; a user's mistake becomes one line on standard error and exit code 2.

    interrupted: what to add to the word "interrupted" after Ctrl-C, of which the exit code is 130.
    """
    if logging.lastResort is not None:  # it writes warnings from before the log is started
        logging.lastResort.setFormatter(PlainFormatter())
    try:
        main(None)
    except (ValueError, OSError) as error:
        if "--verbose" in sys.argv:
            logger.exception("failed")
        reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
        sys.exit(_complain(" ".join(reason.split())))
    except KeyboardInterrupt:
        print(f"interrupted{interrupted}", file=sys.stderr)
        sys.exit(130)


def _complain(reason: str) -> int:
    """One line on standard error, and in run.log once there is one."""
    reason = printable(reason)
    if logging.getLogger().handlers:
        logger.error(reason)
    else:
        print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
    return 2

"""The flags that make up a recipe, and the recipe that they ask for."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qdiff.calibration.store import MemoryLimits
from qdiff.cli.errors import told
from qdiff.cli.parser import Options, memory_limits, number, whole
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


@dataclass(frozen=True)
class QuantizationOptions(Options):
    """What the quantization flags say, each under the flag's name; None where the method decides.

    family: of the model, "pixel", "latent" or "text". The fields from `seed` on are those of all commands.
    """

    ptq: bool = False
    quant_act: bool = False
    weight_bit: int | None = None
    act_bit: int | None = None
    sm_abit: int | None = None
    a_sym: bool = False
    split: bool = False
    quant_mode: str = "qdiff"
    method: str | None = None
    recipe: Path | None = None
    set: Sequence[str] | None = None
    running_stat: bool = False
    rs_sm_only: bool = False
    a_min_max: bool = False
    rounding_start: str | None = None
    compat: Sequence[str] = ()
    cali_st: int | None = None
    cali_n: int | None = None
    cali_batch_size: int | None = None
    cali_iters: int | None = None
    cali_iters_a: int | None = None
    cali_lr: float | None = None
    cali_p: float | None = None
    cali_data_path: Path | None = None
    cali_ckpt: Path | None = None
    resume: bool = False
    resume_w: bool = False
    max_memory: MemoryLimits | None = None
    scratch: Path | None = None
    calibration_products: str = "float32"
    tensorboard: bool = False
    family: str | None = None
    seed: int = 0
    runtime: str = "simulate"
    prefer: str = "speed"


def warn_without_effect(options: QuantizationOptions) -> None:
    """Say which flags about activations do nothing because --quant_act is missing."""
    given = [f"--{name}" for name in ("act_bit", "sm_abit", "a_sym") if getattr(options, name)]
    if options.ptq and not options.quant_act and options.recipe is None and given:
        logger.warning("%s: no effect without --quant_act, activations stay float", ", ".join(given))


def method_options(options: QuantizationOptions) -> MethodOptions:
    """The flags as options; the original scripts' defaults where neither --method nor --recipe is given."""
    given: dict[str, Any] = {
        "weight_bits": options.weight_bit,
        "act_bits": (options.act_bit if options.act_bit is not None else 8) if options.quant_act else None,
        "act_symmetric": options.a_sym,
        "softmax_bits": options.sm_abit,
        "split": options.split,
        "selector_steps": options.cali_st,
        "per_step": options.cali_n,
        "batch_size": options.cali_batch_size,
        "iterations": options.cali_iters,
        "act_iterations": options.cali_iters_a,
        "act_rate": options.cali_lr,
        "loss_p": options.cali_p,
        "running_stat": options.running_stat,
        "softmax_running_stat": options.rs_sm_only,
        "act_range": "minmax" if options.a_min_max else None,
        "family": options.family,
        "rounding_start": options.rounding_start,
        "compat": tuple(options.compat),
    }
    made = replace(MethodOptions(), **{name: value for name, value in given.items() if value is not None})
    if options.method is None:
        missing = {k: v for k, v in ORIGINAL_DEFAULTS.items() if getattr(made, k) is None}
        made = replace(made, **missing)
    return made


def chosen_recipe(options: QuantizationOptions) -> Recipe:
    """The recipe that --recipe, --method or --quant_mode asks for, changed by --set.

    Bit widths, --a_sym, --split, --cali_st and --cali_n given beside --recipe replace the recipe's. Raises ValueError
    naming what is wrong.
    """
    if options.set and options.cali_ckpt is not None and not options.resume_w:
        raise ValueError(f"--set: changes a calibration, and --cali_ckpt {options.cali_ckpt} is used as it is")
    if options.recipe is None:
        recipe = make_recipe(options.method or QUANT_MODES[options.quant_mode], method_options(options))
    else:
        recipe = _recipe_of_file(options)
    if options.set:
        recipe = apply_overrides(recipe, options.set)
    try:
        require_stages(recipe)
    except ValueError as error:
        sources = [str(options.recipe)] * (options.recipe is not None) + ["--set"] * bool(options.set)
        raise ValueError(f"{' with '.join(sources) or recipe.name}: {told(error)}") from error
    return recipe


def _recipe_of_file(options: QuantizationOptions) -> Recipe:
    """The recipe of --recipe, with what is given beside it. Raises ValueError naming what is wrong."""
    path = find_shipped(options.recipe)
    if not path.is_file():
        raise FileNotFoundError(f"--recipe {path}: no such file")
    for name in HELD_BY_RECIPE:
        if getattr(options, name):
            raise ValueError(f"--{name}: the recipe holds it, so say it in {path}")
    recipe = Recipe.load(path)
    if options.quant_act and recipe.activations is None:
        raise ValueError(f"--quant_act: contradicts {path}, which leaves activations float")
    activations, softmax = recipe.activations, recipe.softmax
    if activations is not None:
        activations = _with(activations, bits=options.act_bit, kind="signed" if options.a_sym else None)
        softmax = softmax if options.sm_abit is None else _with(softmax_spec(recipe), bits=options.sm_abit)
    return replace(
        recipe,
        weights=_with(recipe.weights, bits=options.weight_bit),
        activations=activations,
        softmax=softmax,
        split_shortcuts=recipe.split_shortcuts or options.split,
        selector=_with(recipe.selector, steps=options.cali_st, per_step=options.cali_n),
    )


def _with(spec: Any, **given: Any) -> Any:
    """The spec with those fields replaced that are given."""
    return replace(spec, **{name: value for name, value in given.items() if value is not None})


def bits_label(recipe: Recipe | None) -> str:
    """W4A8 and the like, 32 for activations that stay float; "float" for no recipe."""
    if recipe is None:
        return "float"
    return f"W{recipe.weights.bits}A{32 if recipe.activations is None else recipe.activations.bits}"

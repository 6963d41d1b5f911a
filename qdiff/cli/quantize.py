"""From the quantization flags to a calibrated network: load one, or calibrate one and write it."""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.api.quantize import CalibrationSettings, MakePath, calibrate_network, needs_rollouts
from qdiff.calibration.calibrate import Calibration, check_weights
from qdiff.calibration.rollout import Rollouts
from qdiff.calibration.selectors import check_selection
from qdiff.calibration.store import MemoryLimits
from qdiff.calibration.trajectories import Trajectories, check_times, load_trajectories, save_shard
from qdiff.checkpoints.native import load_checkpoint, save_checkpoint
from qdiff.checkpoints.qdiffusion import (
    load_published,
    original_softmax_bits,
    published_recipe,
    save_published,
)
from qdiff.cli.errors import told
from qdiff.cli.original import original_flags
from qdiff.cli.progress import LOG_NAME, PLOT_NAME, CalibrationLog, check_tensorboard, peak_memory, plot_losses
from qdiff.cli.recipe_flags import QuantizationOptions, bits_label, chosen_recipe, method_options
from qdiff.deploy.convert import load_integer, quantizes_activations
from qdiff.deploy.runtime import keeps_codes
from qdiff.evaluation.report import REPORT_NAME, write
from qdiff.evaluation.report_runs import calibration_report
from qdiff.families import Adapter
from qdiff.families.source import check_same_network
from qdiff.methods import for_given_weights
from qdiff.nn.layers import act_quantizers, quant_layers
from qdiff.nn.surgery import insert_quantizers
from qdiff.recipes.layer_names import matching
from qdiff.recipes.recipe import Recipe, softmax_spec
from qdiff.recipes.stages import Finetune
from qdiff.utils.devices import describe_device
from qdiff.utils.team import Team

logger = logging.getLogger(__name__)
CHECKPOINT_NAME = "ckpt.safetensors"  # in a run's folder; written last, so that it means a finished calibration
RECORD_NAME, STATES_NAME = "calibration", "states.safetensors"  # of an unfinished one
# Flags without effect on the float model, so that a forgotten --ptq does not go unnoticed.
QUANTIZING = ("cali_ckpt", "recipe", "method", "set", "resume", "resume_w", "quant_act", "weight_bit", "tensorboard")


@dataclass(frozen=True)
class QuantizationPlan:
    """What the flags ask for: `recipe` calibrates (None: nothing is calibrated), `loads` is the checkpoint that is
    used as it is."""

    options: QuantizationOptions
    recipe: Recipe | None
    loads: Path | None

    def describe(self) -> dict[str, Any]:
        """Plain data for --dry_run."""
        return {
            "calibrated_checkpoint": None if self.options.cali_ckpt is None else str(self.options.cali_ckpt),
            "calibration_data": None if self.recipe is None else str(self.options.cali_data_path or "made by this run"),
        }


def plan_quantization(args: argparse.Namespace, steps: int, steps_flag: str) -> QuantizationPlan:
    """Check the flags against one another. steps: of the sampler, that `steps_flag` asks for.

    Raises ValueError naming the flag at fault.
    """
    options = QuantizationOptions.of(args)
    for flag in QUANTIZING:
        if not options.ptq and getattr(options, flag):
            raise ValueError(f"--{flag}: quantizes, so it needs --ptq")
    if options.resume and options.resume_w:
        raise ValueError("--resume, --resume_w: one loads everything, the other the weights; give one of them")
    if (options.resume or options.resume_w) and options.cali_ckpt is None:
        raise ValueError(f"--resume{'_w' * options.resume_w}: needs --cali_ckpt FILE, the calibrated checkpoint")
    if options.resume_w and not options.quant_act:
        raise ValueError("--resume_w: calibrates activations, so it needs --quant_act")
    if not options.ptq:
        return QuantizationPlan(options, None, None)
    if options.tensorboard:
        check_tensorboard()
    recipe = chosen_recipe(options)
    if options.cali_ckpt is not None and not options.resume_w:
        return QuantizationPlan(options, None, options.cali_ckpt)
    if options.resume_w:
        recipe = for_given_weights(recipe)
    by_steps = recipe.selector.name != "density_variety"  # which may take many states of a step
    if options.cali_data_path is None and by_steps and recipe.selector.steps > steps:
        raise ValueError(f"--cali_st {recipe.selector.steps}: {steps_flag} makes only {steps} steps")
    return QuantizationPlan(options, recipe, None)


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it writes anything, so that a bad file leaves no trace."""

    loaded: nn.Module | None  # the calibrated network of --cali_ckpt
    recipe: Recipe | None  # its recipe
    trajectories: Trajectories | None  # of --cali_data_path

    def label(self, plan: QuantizationPlan) -> str:
        """W4A8 and the like."""
        return bits_label(plan.recipe or self.recipe)


def read_inputs(
    plan: QuantizationPlan,
    adapter: Adapter,
    build: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    timesteps: Tensor,
    conditional: bool = False,
    path: MakePath | None = None,
) -> Inputs:
    """Read and check the files that the flags name, and whether the recipe fits the network.

    build: makes the float network of the configuration (its weights do not matter); shape: (C, H, W) of its input;
    timesteps: [S] of the sampler, floats where it works between timesteps; conditional: the network takes conditioning;
    path: makes the sampler's path, which recipes that learn over groups of steps need. Raises FileNotFoundError, or
    ValueError naming the flag and the file.
    """
    options, loaded, recipe, trajectories = plan.options, None, None, None
    if options.ptq and options.cali_ckpt is not None:
        loaded, recipe = load_calibrated(options, build, adapter)
    if plan.recipe is None:
        return Inputs(loaded, recipe, None)
    with torch.device("meta"):
        network = build()
    if options.cali_data_path is not None:
        trajectories = load_trajectories(options.cali_data_path, shape)
        fractions = timesteps.is_floating_point()
        check_times(trajectories, adapter.num_timesteps(network), fractions, options.cali_data_path)
        check_selection(trajectories, plan.recipe)
        _check_path(plan, trajectories, path)
        timesteps = trajectories.timesteps
    else:
        _check_path(plan, None, path)
    if trajectories is not None:
        _check_conditioning(trajectories, conditional, adapter.config_of(network), options.cali_data_path)
    insert_quantizers(network, plan.recipe, adapter, timesteps)
    _check_layers(plan.recipe, network, adapter)
    if loaded is not None:
        try:
            check_weights(network, loaded)
        except ValueError as error:
            reason = f"contradicts the flags (--weight_bit, --split) or the recipe: {error}"
            raise ValueError(f"--resume_w {options.cali_ckpt}: {reason}") from error
    return Inputs(loaded, recipe, trajectories)


def _check_path(plan: QuantizationPlan, trajectories: Trajectories | None, path: MakePath | None) -> None:
    """That stages over groups of steps can learn from the sampler, and from the states that were given."""
    if not needs_rollouts(plan.recipe) or path is None:
        return
    try:
        made = path()
    except ValueError as error:
        raise ValueError(f"{plan.recipe.name}: learns over groups of steps: {told(error)}") from error
    if trajectories is not None:
        try:
            Rollouts(trajectories, made)
        except ValueError as error:
            raise ValueError(f"--cali_data_path {plan.options.cali_data_path}: {error}") from error


def _check_layers(recipe: Recipe, network: nn.Module, adapter: Adapter) -> None:
    """That every stage that names layers finds some."""
    roles = adapter.roles(network)
    for stage in recipe.stages:
        if isinstance(stage, Finetune) and not matching(stage.layers, quant_layers(network), roles):
            raise ValueError(f"finetune layers: {', '.join(stage.layers)} match no layer of the network")


def _check_conditioning(trajectories: Trajectories, conditional: bool, config: dict[str, Any], path: Path) -> None:
    """config: of the network. It says the width D of the embeddings [N, L, D] that cross attention takes, or how many
    labels there are."""
    width, classes = config.get("context_dim"), config.get("num_classes")
    if conditional and "cs" not in trajectories.extra:
        raise ValueError(f"{path}: expected calibration data with conditioning (cs, ucs), found none")
    if not conditional and trajectories.extra:
        raise ValueError(f"{path}: has conditioning (cs, ucs), but the network takes none")
    for key, (found, *_) in trajectories.extra.items():
        if width is not None and (found.dim() != 3 or found.shape[-1] != width):
            raise ValueError(f"{path}: expected {key} of shape (N, L, {width}), found {tuple(found.shape)}")
        if width is None and (found.dim() != 1 or found.is_floating_point()):
            raise ValueError(f"{path}: expected {key} to be labels (N), found {found.dtype} {tuple(found.shape)}")
    if width is None and classes is not None:
        labels = [step for column in trajectories.extra.values() for step in column]
        low, high = min(int(step.min()) for step in labels), max(int(step.max()) for step in labels)
        if low < 0 or high >= classes:
            raise ValueError(f"{path}: expected labels 0 ... {classes - 1}, found {low} ... {high}")


def calibrate_and_write(
    plan: QuantizationPlan,
    inputs: Inputs,
    adapter: Adapter,
    float_network: nn.Module,
    record: Callable[[int], Trajectories],
    folder: Path,
    provenance: dict[str, Any],
    team: Team | None = None,
    path: MakePath | None = None,
) -> nn.Module:
    """Calibrate by the plan's recipe; write ckpt.safetensors, ckpt.pth and report.html into `folder`.

    Returns the network. record: count -> float sampling states of that many samples, where the flags name no file of
    them. path: makes the sampler's path (see `ddim.linear`), which stages over groups of steps need. Until the result
    is written, finished units lie in `folder`/calibration, and a run that was killed goes on with the next, or
    with the result if that was written. Of a team's processes the leading one writes; all return the same network.
    """
    options, unfinished, finished, team = plan.options, folder / RECORD_NAME, folder / CHECKPOINT_NAME, team or Team()
    if team.broadcast(finished.exists()):
        logger.info("%s: calibrated before the interruption", finished)
        if team.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        return load_checkpoint(finished).network
    trajectories = inputs.trajectories or _recorded(record, plan.recipe.selector.seeds, unfinished, team)
    provenance = {"seed": options.seed, **provenance}
    device = next(float_network.parameters()).device
    settings = CalibrationSettings(
        seed=options.seed,
        folder=unfinished,
        max_memory=options.max_memory or MemoryLimits(),
        scratch=options.scratch or folder,
        matmul_precision=options.calibration_products,
        progress=CalibrationLog(folder, device, options.tensorboard) if team.is_main else None,
        team=team,
        provenance=provenance | {"weights": str(options.cali_ckpt)},
    )
    run = calibrate_network(float_network, adapter, plan.recipe, trajectories, settings, path, inputs.loaded)
    logger.info("device: %s", describe_device(run.network))
    logger.info("states took at most %s bytes", run.store.peak)
    logger.info("peak memory: %s bytes", peak_memory(device))
    if team.is_main:
        plot_losses(run.reports, folder / PLOT_NAME)
        write_calibrated(folder, run, trajectories.timesteps, provenance)
        (unfinished / STATES_NAME).unlink(missing_ok=True)
        run.record.remove()
        write_report(folder)
    return run.network


def write_report(folder: Path) -> None:
    """Write report.html of a calibration into its folder, from the files that lie there."""
    write(calibration_report(folder / CHECKPOINT_NAME, folder / LOG_NAME, folder / "run.log"), folder / REPORT_NAME)


def warn_of_other_sampler(network: nn.Module, timesteps: Tensor) -> None:
    """Say it where parameter sets per step were calibrated for another sampler than timesteps [S] are of."""
    table = getattr(network, "step_table", None)
    if table is None or not quantizes_activations(network) or table.made_for(timesteps):
        return
    found = f"{table.count} parameter sets for a sampler of {len(table.known)} timesteps"
    logger.warning("the network has %s, this one has %d: each takes the set of the nearest", found, len(timesteps))


def _recorded(record: Callable[[int], Trajectories], count: int, unfinished: Path, team: Team) -> Trajectories:
    """The states of the run that was interrupted, or new ones, kept for that case."""
    path = unfinished / STATES_NAME
    if team.broadcast(path.exists()):
        return team.broadcast(load_trajectories(path) if team.is_main else None)
    trajectories = record(count)
    if team.is_main:
        save_shard(trajectories, path, {})
    return trajectories


def load_calibrated(
    options: QuantizationOptions, build: Callable[[], nn.Module], adapter: Adapter
) -> tuple[nn.Module, Recipe]:
    """The calibrated network that --cali_ckpt names, on the CPU; activations only with --quant_act and no --resume_w.

    build: makes the float network of the configuration (its weights do not matter). The recipe is what the network
    uses: without activations where they stay float. Raises FileNotFoundError, or ValueError naming the flag and the
    file where they contradict each other, or what is wrong with the file.
    """
    path, activations = options.cali_ckpt, options.quant_act and not options.resume_w
    if not path.is_file():
        raise FileNotFoundError(f"--cali_ckpt {path}: no such file")
    if path.suffix == ".safetensors":
        return _load_native(options, path, build, adapter, activations)
    made = method_options(options)
    bits = made.act_bits if activations else None
    network = build()
    flags = (made.weight_bits, bits, made.act_symmetric, made.softmax_bits, made.split)
    network, found = load_published(path, network, adapter, published_recipe(*flags, adapter, network))
    _check_given_flags(options, path, found, adapter, network)  # a file of ours brings its own recipe
    return network, found


def _load_native(
    options: QuantizationOptions, path: Path, build: Callable[[], nn.Module], adapter: Adapter, activations: bool
) -> tuple[nn.Module, Recipe]:
    if keeps_codes(options.runtime, options.prefer):
        found = load_integer(path, activations=activations)
    else:
        found = load_checkpoint(path)
    check_same_network(adapter, build, path, found.adapter.family, found.adapter.config_of(found.network))
    recipe = found.recipe
    if activations and recipe.activations is None:
        raise ValueError(f"--quant_act: contradicts {path}, which holds no activation quantizers")
    if not activations:
        recipe = replace(recipe, activations=None, softmax=None)
        for quantizer in act_quantizers(found.network).values():
            quantizer.enabled = False
    _check_given_flags(options, path, recipe, found.adapter, found.network)
    return found.network, recipe


def _check_given_flags(
    options: QuantizationOptions, path: Path, recipe: Recipe, adapter: Adapter, network: nn.Module
) -> None:
    """A file with its recipe knows its own bits and grids: flags may be left out, those given must agree."""
    held = [("weight_bit", options.weight_bit, (recipe.weights.bits,))]
    if recipe.activations is not None:
        held.append(("act_bit", options.act_bit, (recipe.activations.bits,)))
        softmax_bits = (softmax_spec(recipe).bits, original_softmax_bits(recipe, adapter, network))
        held.append(("sm_abit", options.sm_abit, softmax_bits))
        if options.a_sym and recipe.activations.kind != "signed":
            raise ValueError(f"--a_sym: contradicts {path}, whose activations are not symmetric")
    for flag, given, has in held:
        if given is not None and given not in has:
            raise ValueError(f"--{flag} {given}: contradicts {path}, which has {has[0]} bits")
    if options.split and not recipe.split_shortcuts:
        raise ValueError(f"--split: contradicts {path}, whose shortcuts are not split")


def write_calibrated(folder: Path, run: Calibration, timesteps: Tensor | None, provenance: dict[str, Any]) -> None:
    """Write ckpt.pth, where the original's format can express the result, and ckpt.safetensors into a run's folder."""
    float_weights = {n: run.float_network.get_submodule(n).weight.detach() for n in quant_layers(run.network)}
    try:
        save_published(folder / "ckpt.pth", run.network, run.adapter, run.recipe, float_weights)
        logger.info("the original code reads ckpt.pth with %s", original_flags(run.recipe, run.adapter, run.network))
    except ValueError as error:
        logger.warning("no ckpt.pth: %s", error)
    save_checkpoint(folder / CHECKPOINT_NAME, run.network, run.adapter, run.recipe, timesteps, provenance)

"""Calibration: from a float model and its sampling states to a quantized model that is saved, loaded and run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.api.models import BATCH, Model
from qdiff.api.progress import BarProgress
from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.context import Calibration, Progress, RunOptions, UnitReport
from qdiff.calibration.rollout import Path as SamplerPath
from qdiff.calibration.rollout import Rollouts
from qdiff.calibration.selectors import CalibrationSet, select
from qdiff.calibration.store import MemoryLimits
from qdiff.calibration.trajectories import Trajectories, load_trajectories
from qdiff.checkpoints.native import read_about, save_checkpoint
from qdiff.checkpoints.qdiffusion import load_published, published_recipe
from qdiff.deploy.runtime import has_onnx_runtime, prepare
from qdiff.deploy.runtime import load as load_network
from qdiff.families import Adapter, adapter_for, adapter_of
from qdiff.methods import MethodOptions, make_recipe, require_stages
from qdiff.nn.layers import quant_layers
from qdiff.recipes.overrides import apply_overrides
from qdiff.recipes.recipe import Recipe
from qdiff.recipes.stages import Rollout
from qdiff.utils.devices import tensor_float32
from qdiff.utils.team import Team

logger = logging.getLogger(__name__)
MakePath = Callable[[], SamplerPath]
PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class CalibrationSettings:
    """How a calibration is carried out; but for the seed, none of it changes the result beyond float rounding.

    folder: where finished units are recorded, so that a call that was killed goes on with the next one. max_memory: for
    calibration states; what is beyond goes to `scratch`. matmul_precision: of products while units learn, "float32",
    "tf32" or "bfloat16". progress: told of the work. provenance: plain data that determine the result too; a record of
    another calibration is refused.
    """

    seed: int = 0
    folder: Path | None = None
    max_memory: MemoryLimits = MemoryLimits()
    scratch: Path | None = None
    matmul_precision: str = "float32"
    progress: Progress | None = None
    team: Team = field(default_factory=Team)
    provenance: dict[str, Any] = field(default_factory=dict)


def calibrate_network(
    network: nn.Module,
    adapter: Adapter,
    recipe: Recipe,
    data: Trajectories | CalibrationSet,
    settings: CalibrationSettings,
    path: MakePath | None = None,
    weights_from: nn.Module | None = None,
) -> Calibration:
    """Quantize a copy of a float network by a recipe.

    path: makes the sampler's path (`ddim.linear`), which stages over groups of steps need. weights_from: a calibrated
    network whose weights are taken as they are. Raises ValueError for a recipe that does not fit the network or data.
    """
    if settings.matmul_precision not in PRECISIONS:
        expected = ", ".join(PRECISIONS)
        raise ValueError(f"matmul_precision: expected one of {expected}, found {settings.matmul_precision!r}")
    whole = isinstance(data, Trajectories)
    states = select(data, recipe, network, adapter, settings.seed) if whole else data
    timesteps = data.timesteps if whole else data.t.unique().flip(0)
    determines = {"recipe": recipe.to_dict(), "states": states.digest(), "products": settings.matmul_precision}
    options = RunOptions(
        memory=settings.max_memory,
        scratch=settings.scratch or settings.folder,
        record=settings.folder,
        plan=settings.provenance | determines,
        team=settings.team,
        products="bfloat16" if settings.matmul_precision == "bfloat16" else "float32",
    )
    rollouts = Rollouts(data, path()) if needs_rollouts(recipe) and path is not None and whole else None
    with tensor_float32(settings.matmul_precision == "tf32"):
        return calibrate(
            network,
            adapter,
            recipe,
            states,
            settings.seed,
            timesteps,
            settings.progress,
            weights_from=weights_from,
            options=options,
            rollouts=rollouts,
        )


def needs_rollouts(recipe: Recipe) -> bool:
    """Whether a stage learns over groups of denoising steps."""
    return any(isinstance(stage, Rollout) for stage in recipe.stages)


Data = Trajectories | CalibrationSet | str | Path | Sequence[Tensor]


def quantize(
    model: Model | nn.Module,
    recipe: Recipe | str | Path | None = None,
    *,
    data: Data | None = None,
    method: str = "quick",
    changes: Sequence[str] = (),
    sampling: dict[str, Any] | None = None,
    settings: CalibrationSettings | None = None,
    **options: Any,
) -> QuantizedModel:
    """Calibrate a model.

    model: of `load_model`, or a bare network of a known family, on the device that it is to be calibrated on. recipe: a
    `Recipe`, or a YAML file of one; without it the recipe is that of `method`, and `options` are fields of
    `MethodOptions`: weight_bits, act_bits (None leaves activations float), act_symmetric, split, iterations, ...
    changes: fields of the recipe that are changed last, as "reconstruct.iterations=100". data: of `Model.record`, a
    file or folder of it, a `CalibrationSet`, or tensors (x [N, C, H, W], t [N][, context]); without it the model is
    sampled, as `sampling` says (fields of `SamplingOptions`). settings: see `CalibrationSettings`; without `progress` a
    bar is shown.

    Raises ValueError naming the option, the field of the recipe or the layer at fault.

    ```python
    quantized = qdiff.quantize(model, method="quick", weight_bits=4, act_bits=8, data=data)
    quantized.save("w4a8.safetensors")
    ```
    """
    settings = settings or CalibrationSettings()
    settings = replace(settings, progress=settings.progress or BarProgress())
    own = model if isinstance(model, Model) else None
    network = own.network if own else model
    adapter = adapter_of(network)
    recipe = chosen_recipe(recipe, method, changes, options, own)
    made = own.sampling(**(sampling or {})) if own else None
    data = _read(data, own, recipe, sampling or {})
    about = {} if own is None else {"sampling": made.pipeline.describe(), **own.loaded.origin}
    settings = replace(settings, provenance={"seed": settings.seed, **about, **settings.provenance})
    run = calibrate_network(network, adapter, recipe, data, settings, None if made is None else made.pipeline.path)
    timesteps = data.timesteps if isinstance(data, Trajectories) else None
    result = QuantizedModel(run.network, adapter, recipe, settings.provenance, own)
    result.timesteps, result.reports = timesteps, tuple(run.reports)
    return result


def chosen_recipe(
    recipe: Recipe | str | Path | None,
    method: str,
    changes: Sequence[str],
    options: dict[str, Any],
    model: Model | None,
) -> Recipe:
    """The recipe that `quantize` carries out. Raises ValueError naming what is wrong, TypeError for unknown options."""
    if recipe is None:
        kind = {} if model is None else {"family": model.kind}
        recipe = make_recipe(method, MethodOptions(**{**kind, **options}))
    elif options:
        raise ValueError(f"{next(iter(options))}: the recipe holds it; change it by changes=[...]")
    elif not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    recipe = apply_overrides(recipe, changes) if changes else recipe
    require_stages(recipe)
    return recipe


def _read(
    data: Data | None, model: Model | None, recipe: Recipe, sampling: dict[str, Any]
) -> Trajectories | CalibrationSet:
    if isinstance(data, (Trajectories, CalibrationSet)):
        return data
    if isinstance(data, (str, Path)):
        return load_trajectories(data)
    if data is not None:
        x, t, *context = data
        return CalibrationSet(x, t, torch.zeros(len(x), dtype=torch.long), *context)
    if model is None:
        raise ValueError("data: a bare network cannot be sampled; give its states, (x, t) or (x, t, context)")
    return model.record(recipe.selector.seeds, batch_size=BATCH, **sampling)


class QuantizedModel(nn.Module):
    """A calibrated network with its recipe; called like the float one.

    network: the bare module, as it runs. recipe: what made it. reports: how each unit's learning went, right after a
    calibration. provenance: plain data. model: the float model that it stands in for, which sampling needs.
    """

    def __init__(
        self,
        network: nn.Module,
        adapter: Adapter,
        recipe: Recipe,
        provenance: dict[str, Any],
        model: Model | None = None,
    ) -> None:
        super().__init__()
        self.network, self.adapter, self.recipe, self.provenance = network, adapter, recipe, provenance
        self.model, self.timesteps = model, None
        self.reports: tuple[UnitReport, ...] = ()
        self.running = network

    @property
    def step_table(self) -> nn.Module:
        """Which parameter set each timestep takes."""
        return self.running.step_table

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """The predicted noise [N, C, H, W]. x: [N, C, H, W]; t: [N]; context: what the network is conditioned on."""
        return self.running(x, t) if context is None else self.running(x, t, context)

    def save(self, path: str | Path) -> None:
        """Write packed codes, scales, recipe and provenance to one .safetensors, which loads without the float model.

        Raises ValueError for a model that holds no codes to write: one that was loaded to run in integers alone.
        """
        if not quant_layers(self.network):
            raise ValueError(
                "save: the model was loaded to run in integers; load it with runtime='simulate' to save it"
            )
        save_checkpoint(path, self.network, self.adapter, self.recipe, self.timesteps, self.provenance)

    def export_onnx(self, path: str | Path, dialect: str = "runtime", weight_type: str = "uint8") -> None:
        """Write an ONNX graph of the model's own size, for ONNX Runtime on CPUs ("runtime"), or for any engine
        ("portable"); weight_type: see `qdiff.deploy.onnx.weight_types`. Raises ValueError without the extra [onnx], for
        a packed file's model without its float model, and naming what has no counterpart."""
        if not has_onnx_runtime():
            raise ValueError("export_onnx: needs ONNX, found none: pip install '.[onnx]'")
        if self.model is None:
            raise ValueError("model: a packed file does not say its sizes; give the float model when loading it")
        from qdiff.deploy.onnx.export import export_onnx

        source = self.model.source
        labels = self.adapter.config_of(self.network).get("num_classes") is not None
        context = source.context or (() if labels else None)
        export_onnx(self.network, self.adapter, path, source.shape(), context, dialect, weight_type=weight_type)

    def prepare(self, runtime: str = "auto", **options: Any) -> QuantizedModel:
        """The same model, run as `runtime` has it: "simulate", "integer", "onnx" or "auto"; options: device, prefer,
        attention, report (`qdiff.deploy.runtime.prepare`). Raises ValueError for a runtime that is not to be had."""
        result = QuantizedModel(self.network, self.adapter, self.recipe, self.provenance, self.model)
        result.timesteps, result.reports = self.timesteps, self.reports
        result.running = prepare(self.network, self.adapter, runtime, **options)
        return result

    def sample(self, count: int, *, model: Model | None = None, batch_size: int = BATCH, **options: Any) -> Tensor:
        """Images 0 ... count - 1, [count, C, H, W] in [0, 1]: those that the float model makes of the same options,
        with the quantized network in place of the float one.

        model: the float model, where the quantized one was loaded from a file. Raises ValueError without one.
        """
        model = model or self.model
        if model is None:
            raise ValueError("model: a packed file holds the network alone; give the float model that decodes images")
        return torch.cat([images for _, images in model.images(self.running, count, batch_size, **options)])


def load_original(
    path: str | Path,
    model: Model,
    *,
    weight_bits: int = 8,
    act_bits: int | None = None,
    act_symmetric: bool = False,
    softmax_bits: int = 8,
    split: bool = False,
) -> QuantizedModel:
    """The quantized model of the Q-Diffusion repository's `ckpt.pth`, simulated.

    The file does not say its bit widths and grids; a file of ours does, and what is given has to agree. act_bits None
    leaves activations float. Raises FileNotFoundError, or ValueError naming what contradicts the file.
    """
    network = model.source.build()
    recipe = published_recipe(weight_bits, act_bits, act_symmetric, softmax_bits, split, model.source.adapter, network)
    network, found = load_published(path, network, model.source.adapter, recipe)
    return QuantizedModel(network.to(model.device), model.source.adapter, found, {"source": Path(path).name}, model)


def load(
    path: str | Path,
    runtime: str = "simulate",
    *,
    model: Model | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> QuantizedModel:
    """The quantized model of a packed file, ready to run: called as quantized(x, t), or quantized(x, t, context).

    runtime: "simulate", "integer", "onnx" or "auto". model: the float model that it stands in for, to sample images.
    options: prefer, attention and report of `qdiff.deploy.runtime.load`. Raises FileNotFoundError, or ValueError naming
    the file or the runtime.
    """
    network = load_network(path, runtime, device=device, **options)
    about = read_about(path)
    adapter, recipe = adapter_for(about["family"]), Recipe.from_dict(about["recipe"])
    kept = {key: value for key, value in about.items() if key not in ("config", "recipe", "digest")}
    result = QuantizedModel(network, adapter, recipe, kept, model)
    steps = about.get("timesteps")
    result.timesteps = None if steps is None else torch.tensor(steps, dtype=torch.float64)
    return result

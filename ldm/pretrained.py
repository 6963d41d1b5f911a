"""Configurations in the CompVis layout, and checkpoints found and loaded into the model they describe."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.overrides import TorchFunctionMode

from ddim.checkpoints import Checkpoint, first_names, one_line
from ddim.schedules import cumulative_alphas
from ldm.checkpoints import load_into, open_checkpoint
from ldm.util import instantiate_from_config

if TYPE_CHECKING:
    from ldm.models.diffusion.models import LatentDiffusion
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

logger = logging.getLogger(__name__)

# Where the models of configurations are that do not import Lightning, which has no part in sampling.
WITHOUT_LIGHTNING = {
    "ldm.models.diffusion.ddpm.": "ldm.models.diffusion.models.",
    "ldm.models.autoencoder.": "ldm.models.first_stages.",
}
CHECKPOINT_NAMES = ("model.ckpt", "model.safetensors", "checkpoints/last.ckpt")

# What files hold and the configuration gives: the schedule, and what is derived from it.
SCHEDULE = re.compile(r"betas|\w*alphas_cumprod\w*|posterior_\w+|lvlb_weights|logvar")
OF_NETWORK = ("model.", "model_ema.")  # in a checkpoint, the U-Net and its moving average
# Tensors of published files that sampling has no use for.
UNUSED = re.compile(r"model_ema\..+|first_stage_model\.loss\..+|.+\.position_ids")


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> DictConfig:
    """Reads a configuration with a `model` section {target, params}; `config_file` in it is the path it came from.

    `overrides` are settings in dot-list form, `model.params.timesteps=100`. Raises FileNotFoundError, and ValueError
    for a file that is no such configuration or an override that is no setting.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path}: expected a section `model`, found no sections")
    for override in overrides:
        config = _overridden(config, override)
    _check_config(config, path)
    config.config_file = str(path)
    return config


def _overridden(config: DictConfig, override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"override {override!r}: expected KEY=VALUE, such as model.params.timesteps=100")
    try:
        return OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"override {override!r}: {one_line(error)}") from None


def _check_config(config: DictConfig, path: Path) -> None:
    model = config.get("model")
    if not isinstance(model, DictConfig):
        raise ValueError(f"{path}: missing section model (found {', '.join(map(str, config)) or 'none'})")
    if not isinstance(model.get("target"), str) or not isinstance(model.get("params"), DictConfig):
        raise ValueError(f"{path}: model must have a target and params (found {', '.join(map(str, model)) or 'none'})")


def find_checkpoint(path: str | os.PathLike) -> Path:
    """A checkpoint file itself, or the one in a folder. Raises FileNotFoundError where there is none."""
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint or folder")
    for name in CHECKPOINT_NAMES:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"{path}: no checkpoint in this folder, looked for {', '.join(CHECKPOINT_NAMES)}")


def find_config(checkpoint: str | os.PathLike) -> Path:
    """The `config.yaml` that belongs to a checkpoint: beside it, or in the folder of its training run.

    Raises FileNotFoundError where there is none.
    """
    folder = Path(checkpoint).absolute().parent
    folders = [folder, folder.parent] if folder.name == "checkpoints" else [folder]
    for candidate in folders:
        if (candidate / "config.yaml").is_file():
            return candidate / "config.yaml"
    looked = ", ".join(str(candidate / "config.yaml") for candidate in folders)
    raise FileNotFoundError(f"{checkpoint}: no configuration found for it, looked for {looked}")


def build_network(config: DictConfig, seed: int = 0) -> UNetModel:
    """The U-Net of a configuration alone: float32, evaluation mode, weights drawn with `seed`."""
    with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator only
        torch.default_generator.manual_seed(seed)
        return instantiate_from_config(config.model.params.unet_config).eval()


def load_model(
    config: DictConfig, checkpoint: str | os.PathLike, dtype: torch.dtype = torch.float32, network: bool = True
) -> LatentDiffusion:
    """The model of a configuration with the weights of a checkpoint: evaluation mode, on the CPU, no gradients.

    Weights are read one at a time straight into the model, as `dtype`; buffers keep theirs. If the file holds moving
    averages of the U-Net's weights and the configuration has `use_ema` (the default), these are its weights. With
    `network` False the U-Net is left out, for who has another: neither made nor read. A text encoder's relative folder
    is looked for beside the checkpoint and the configuration first.
    Raises what `open_checkpoint` raises, and ValueError where file and configuration do not fit.
    """
    with open_checkpoint(checkpoint) as source:
        try:
            model = _build_without_weights(_for_sampling(config, Path(checkpoint)), dtype)
        except ValueError as error:
            raise ValueError(f"{config.get('config_file', 'the configuration')}: {error}") from error
        if not network:
            model.model.diffusion_model = nn.Identity()  # made without memory
        ema = config.model.params.get("use_ema", True) and _has_ema(model, source)
        name = f"the model of {config.config_file}" if "config_file" in config else "the model"
        used = load_into(model, source, optional=_is_optional, rename=_renaming(ema), model=name)
        known = used.union(model.state_dict())  # moving averages leave the weights they replace unused
        skipped = () if network else OF_NETWORK
        unknown = [n for n in source if n not in known and not _is_known(n) and not n.startswith(skipped)]
        _check_scale_factor(model, source)
        _warn_of_another_schedule(model, source)
        if unknown:
            logger.warning("%s: ignored %d unknown tensors: %s", source.path, len(unknown), first_names(unknown))
    return model.eval().requires_grad_(False)


def _warn_of_another_schedule(model: LatentDiffusion, source: Checkpoint) -> None:
    """Say it where the file's own schedule is not the configuration's, which counts: by its first tensor of these."""
    own = {"alphas_cumprod": cumulative_alphas(model.betas), "betas": model.betas}
    name = next((name for name in own if name in source), None)
    if name is None:
        return
    stored, expected = source[name], own[name]
    if stored.shape != expected.shape:
        steps = "%s: %s has %d steps, the configuration %d"
        logger.warning(steps, source.path, name, stored.numel(), len(expected))
        return
    rounding = 4 * torch.finfo(stored.dtype).eps * expected.max().item() if stored.is_floating_point() else 0.0
    largest = (stored.double() - expected).abs().max().item()
    if not largest <= rounding + 1e-6:  # schedules made in float32 are off by that much
        differs = "%s differs by up to %.3g from that of the configuration, which is used"
        logger.warning("%s: " + differs, source.path, name, largest)


def _check_scale_factor(model: LatentDiffusion, source: Checkpoint) -> None:
    """Raise ValueError unless latents can be divided by the scale factor, the file's or else the configuration's."""
    scale = model.scale_factor.item()
    if not (math.isfinite(scale) and scale > 0):
        where = f"{source.path}: " if "scale_factor" in source else "model.params."
        raise ValueError(f"{where}scale_factor: expected a finite number above 0, found {scale:g}")


def _for_sampling(config: DictConfig, checkpoint: Path) -> dict[str, Any]:
    """The model section without what only training needs, and with the text encoder's folder found."""
    model = without_lightning(config.model)
    params = model["params"]
    params["use_ema"] = False  # no second copy of the U-Net: moving averages go where the weights go
    parts = [params.get(part) for part in ("first_stage_config", "cond_stage_config", "unet_config")]
    inner = [part.get("params") or {} for part in parts if isinstance(part, dict)]
    for section in (params, *inner):
        section.pop("ckpt_path", None)  # every weight comes from the checkpoint
        section.pop("lossconfig", None)
        if isinstance(section.get("version"), str):
            section["version"] = _find_folder(section["version"], checkpoint, config)
    return model


def without_lightning(section: DictConfig) -> dict[str, Any]:
    """A configuration's section {target, params}, naming the same models, inner ones too, in plain PyTorch."""

    def plain(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        found = {key: plain(inner) for key, inner in value.items()}
        for published, ours in WITHOUT_LIGHTNING.items():
            if str(found.get("target")).startswith(published):
                found["target"] = ours + found["target"].removeprefix(published)
        return found

    return plain(OmegaConf.to_container(section, resolve=True))


def _find_folder(version: str, checkpoint: Path, config: DictConfig) -> str:
    for beside in (checkpoint, config.get("config_file")):
        if beside and (Path(beside).parent / version).is_dir():
            return str(Path(beside).parent / version)
    return version  # relative to the current folder, or a name on the hub


class _WeightsOnMeta(TorchFunctionMode):
    """Layers make their weights by `torch.empty`: these go to the meta device and cost neither memory nor drawing.

    Everything else is computed as ever, so that buffers are right that no file holds.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _build_without_weights(config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    with _WeightsOnMeta():
        model = instantiate_from_config(config)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def _ema_name(name: str) -> str:
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def _has_ema(model: nn.Module, source: Checkpoint) -> bool:
    """Does the file hold moving averages? Raises ValueError if it does for some of the U-Net's weights only."""
    names = [name for name, _ in model.named_parameters() if name.startswith("model.")]
    missing = [_ema_name(name) for name in names if _ema_name(name) not in source]
    if missing and len(missing) < len(names):
        text = f"{len(missing)} of {len(names)} moving averages are missing: {first_names(missing)}"
        raise ValueError(f"{source.path} does not fit the model: {text} (model.params.use_ema=false ignores them)")
    return bool(names) and not missing


def _renaming(ema: bool) -> Callable[[str], Iterable[str]]:
    """Where the file may hold a tensor of the model: as a moving average, as published, as newer CLIP names it."""

    def rename(name: str) -> Iterable[str]:
        if ema and name.startswith("model."):
            yield _ema_name(name)
        if not SCHEDULE.fullmatch(name):  # computed from the configuration, in full precision
            yield name
            yield name.replace(".transformer.text_model.", ".transformer.", 1)

    return rename


def _is_optional(name: str) -> bool:
    return name == "scale_factor" or bool(SCHEDULE.fullmatch(name))


def _is_known(name: str) -> bool:
    return bool(SCHEDULE.fullmatch(name) or UNUSED.fullmatch(name)) or name == "scale_factor"

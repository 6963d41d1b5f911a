"""A trained model as it is handed on: averaged weights in float16 under published names, and their configuration."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddim.network import DDPMUNet
from ldm.models.diffusion.models import DDPM, LatentDiffusion
from ldm.schedules import settings_of

PIXEL_TARGET = f"{DDPMUNet.__module__}.{DDPMUNet.__name__}"
# What ldm.schedules calls a schedule, and what ddim.schedules does.
PIXEL_SCHEDULES = {"sqrt_linear": "linear", "linear": "quad"}
TEXT = "text"  # the folder of the text encoder's files, beside the weights
# Of training alone: a model that is handed on does not need them.
TRAINING_ONLY = (
    *("ckpt_path", "ignore_keys", "load_only_unet", "monitor", "scheduler_config", "lossconfig", "weight_decay"),
    *("ema_decay", "scale_by_std", "conditioning_drop", "cond_stage_trainable", "seed", "loss_type"),
)


def exported_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a trained model, averaged where there is an average, as float16 tensors on the CPU.

    A pixel model's have the names of `ddim`, a latent model's those of CompVis (without `model_ema` and
    `scale_factor`, which is in the configuration), a first stage's its own. Raises ValueError naming a weight that is
    not finite in float16.
    """
    pixel = isinstance(model, DDPM) and isinstance(model.model.diffusion_model, DDPMUNet)
    source = model.model.diffusion_model if pixel else model
    state = {}
    with model.ema_scope() if isinstance(model, DDPM) else torch.no_grad():
        for name, value in source.state_dict().items():
            if name == "scale_factor" or name.startswith(("model_ema.", "loss.")):
                continue
            half = value.detach().to("cpu", torch.float16 if value.is_floating_point() else value.dtype, copy=True)
            if not half.isfinite().all():
                raise ValueError(f"{name} holds values that are not finite in float16: the training has diverged")
            state[name] = half.contiguous()
    return state


def exported_config(config: Mapping[str, Any], scale_factor: float | None = None) -> dict[str, Any]:
    """The configuration of `exported_state`, as plain data, from that of the training ({target, params}).

    A pixel model's has the sections of the DDIM repository and names `model.safetensors` as its weights; others have
    `model: {target, params}`. `scale_factor` replaces the training's. A local folder with a text encoder becomes
    `text`, to be copied beside the weights (see `text_folder`). Raises ValueError for a pixel model's schedule that
    those configurations cannot express.
    """
    params = copy.deepcopy(dict(config["params"]))
    if _is_pixel(params):
        return _pixel_config(params)
    kept = {key: value for key, value in params.items() if key not in TRAINING_ONLY}
    if "unet_config" in kept:
        kept["use_ema"] = False  # the averaged weights are the network's own
    if scale_factor is not None:
        kept["scale_factor"] = float(scale_factor)
    for stage in ("first_stage_config", "cond_stage_config"):
        if isinstance(kept.get(stage), dict):
            inner = kept[stage].get("params") or {}
            kept[stage]["params"] = {key: value for key, value in inner.items() if key not in TRAINING_ONLY}
    if text_folder(config) is not None:
        kept["cond_stage_config"]["params"]["version"] = TEXT
    return {"model": {"target": config["target"], "params": kept}}


def text_folder(config: Mapping[str, Any]) -> Path | None:
    """The local folder that a latent model's text encoder is made from, if there is one."""
    stage = config["params"].get("cond_stage_config")
    version = (stage.get("params") or {}).get("version") if isinstance(stage, Mapping) else None
    return Path(version) if version is not None and Path(version).is_dir() else None


def scale_factor_of(model: nn.Module) -> float | None:
    """A latent model's scale factor; None for others."""
    return model.scale_factor.item() if isinstance(model, LatentDiffusion) else None


def _is_pixel(params: Mapping[str, Any]) -> bool:
    return (params.get("unet_config") or {}).get("target") == PIXEL_TARGET


def _pixel_config(params: dict[str, Any]) -> dict[str, Any]:
    network = dict(params["unet_config"]["params"])
    schedule = settings_of(params)
    name = "given_betas" if "given_betas" in schedule else schedule["beta_schedule"]
    if name not in PIXEL_SCHEDULES:
        expected = ", ".join(PIXEL_SCHEDULES)
        raise ValueError(f"beta_schedule: a pixel model can be exported with {expected}, found {name!r}")
    size = network.pop("image_size")
    network.pop("num_diffusion_timesteps", None)  # a description: training draws from the schedule's
    return {
        "pretrained": "model.safetensors",
        "data": {"dataset": "CIFAR10", "image_size": size, "channels": network["in_channels"], "rescaled": True},
        "model": {"type": "simple", **network},
        "diffusion": {
            "beta_schedule": PIXEL_SCHEDULES[name],
            "beta_start": schedule["linear_start"],
            "beta_end": schedule["linear_end"],
            "num_diffusion_timesteps": schedule["timesteps"],
        },
        "sampling": {"batch_size": 16},
    }

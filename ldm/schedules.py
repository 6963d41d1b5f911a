"""Noise schedules of the latent-diffusion family, under the names its configurations use. Everything in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ddim.limits import TIMESTEPS, check_limits

Schedule = Callable[[float, float, int, float], Tensor]  # (linear_start, linear_end, T, cosine_s) -> [T]


def _linear(start: float, end: float, num: int, cosine_s: float) -> Tensor:
    return torch.linspace(start**0.5, end**0.5, num, dtype=torch.float64) ** 2


def _cosine(start: float, end: float, num: int, cosine_s: float) -> Tensor:
    """arXiv 2102.09672, equation 17: ᾱ is a squared cosine; β stays below 1 at the noisy end."""
    u = torch.arange(num + 1, dtype=torch.float64) / num
    alphas = torch.cos((u + cosine_s) / (1 + cosine_s) * torch.pi / 2) ** 2
    return (1 - alphas[1:] / alphas[:-1]).clamp(0, 0.999)


def _sqrt_linear(start: float, end: float, num: int, cosine_s: float) -> Tensor:
    return torch.linspace(start, end, num, dtype=torch.float64)


def _sqrt(start: float, end: float, num: int, cosine_s: float) -> Tensor:
    return torch.linspace(start, end, num, dtype=torch.float64) ** 0.5


# "linear" is linear in √β, as published; what the pixel models call linear is "sqrt_linear" here.
BETA_SCHEDULES: dict[str, Schedule] = {
    "linear": _linear,
    "cosine": _cosine,
    "sqrt_linear": _sqrt_linear,
    "sqrt": _sqrt,
}


# What counts where a configuration leaves a setting out, or gives none.
DEFAULTS = {
    "timesteps": 1000,  # or the number of given_betas
    "beta_schedule": "linear",
    "linear_start": 1e-4,
    "linear_end": 2e-2,
    "cosine_s": 8e-3,
}
SETTINGS = (*DEFAULTS, "given_betas")


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's parameters say of its schedule, `SETTINGS`, with `DEFAULTS` for what they leave out."""
    return DEFAULTS | {key: params[key] for key in SETTINGS if params.get(key) is not None}


def betas_of(params: Mapping[str, Any]) -> Tensor:
    """β_t [T] float64 of a model's parameters, in every form that a configuration has: `SETTINGS`, each optional.

    Raises ValueError for values that make no schedule, and for `given_betas` of another number than `timesteps`.
    """
    found = settings_of(params)
    check_limits(found, {"timesteps": TIMESTEPS})
    if "given_betas" not in found:
        names = ("beta_schedule", "timesteps", "linear_start", "linear_end", "cosine_s")
        return beta_schedule(*(found[name] for name in names))
    try:
        betas = torch.tensor([float(beta) for beta in found["given_betas"]], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"given_betas: expected a list of numbers, found {found['given_betas']!r:.80}") from error
    if len(betas) != (params.get("timesteps") or len(betas)):
        raise ValueError(f"given_betas: expected {found['timesteps']} numbers as timesteps, found {len(betas)}")
    if len(betas) == 0 or not ((betas > 0) & (betas < 1)).all():
        ends = f"{betas.min().item():g} to {betas.max().item():g}" if len(betas) else "none"
        raise ValueError(f"given_betas: expected numbers strictly between 0 and 1, found {ends}")
    return betas


def beta_schedule(
    name: str, num_timesteps: int, linear_start: float, linear_end: float, cosine_s: float = 8e-3
) -> Tensor:
    """β_t of a latent-diffusion configuration. "cosine" uses cosine_s only, the others the two ends only.

    Returns [T] float64, to be followed by `ddim.schedules.cumulative_alphas`. Raises ValueError for an unknown name,
    for num_timesteps < 1 and for betas that are not strictly between 0 and 1.
    """
    if not isinstance(name, str) or name not in BETA_SCHEDULES:
        raise ValueError(f"unknown beta_schedule {name!r}, expected one of {', '.join(BETA_SCHEDULES)}")
    if num_timesteps < 1:
        raise ValueError(f"timesteps must be at least 1, found {num_timesteps}")
    if name != "cosine" and not (linear_start > 0 and linear_end > 0):
        # Checked before the roots are taken: of a negative number there is none, or a complex one.
        raise ValueError(f"linear_start and linear_end must be positive, found {linear_start} and {linear_end}")
    betas = BETA_SCHEDULES[name](float(linear_start), float(linear_end), num_timesteps, float(cosine_s))
    if not ((betas > 0) & (betas < 1)).all():
        low, high = betas.min().item(), betas.max().item()
        raise ValueError(f"betas must lie strictly between 0 and 1, found {low:g} to {high:g} ({name} schedule)")
    return betas

"""Noise schedules and the timesteps a sampler visits. Everything in float64."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def _linear(start: float, end: float, num: int) -> np.ndarray:
    return np.linspace(start, end, num)


def _quad(start: float, end: float, num: int) -> np.ndarray:
    return np.linspace(start**0.5, end**0.5, num) ** 2


def _const(start: float, end: float, num: int) -> np.ndarray:
    return np.full(num, end)


def _jsd(start: float, end: float, num: int) -> np.ndarray:
    return 1.0 / np.arange(num, 0, -1)  # 1/T, 1/(T-1), ..., 1


def _sigmoid(start: float, end: float, num: int) -> np.ndarray:
    return start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, num)))


BETA_SCHEDULES: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "linear": _linear,
    "quad": _quad,
    "const": _const,
    "jsd": _jsd,
    "sigmoid": _sigmoid,
}


def beta_schedule(name: str, start: float, end: float, num_timesteps: int) -> Tensor:
    """β_t of the DDPM family (arXiv 2006.11239 §4). Returns [T] float64. Raises ValueError for an unknown name."""
    if not isinstance(name, str) or name not in BETA_SCHEDULES:
        raise ValueError(f"unknown beta schedule {name!r}, expected one of {', '.join(BETA_SCHEDULES)}")
    if num_timesteps < 1:
        raise ValueError(f"num_diffusion_timesteps must be at least 1, found {num_timesteps}")
    betas = np.asarray(BETA_SCHEDULES[name](float(start), float(end), num_timesteps), dtype=np.float64)
    if not ((betas >= 0) & (betas <= 1)).all():
        raise ValueError(f"betas must lie in [0, 1], found {betas.min():g} to {betas.max():g} ({name} schedule)")
    return torch.from_numpy(betas)


def cumulative_alphas(betas: Tensor) -> Tensor:
    """ᾱ_t = Π (1 - β_s) over s <= t. betas: [T]. Returns [T] float64."""
    return (1 - betas.double()).cumprod(0)


def _uniform_steps(num_timesteps: int, steps: int) -> np.ndarray:
    return np.arange(0, num_timesteps, num_timesteps // steps)


def _quad_steps(num_timesteps: int, steps: int) -> np.ndarray:
    return (np.linspace(0, (0.8 * num_timesteps) ** 0.5, steps) ** 2).astype(np.int64)


SKIP_TYPES: dict[str, Callable[[int, int], np.ndarray]] = {"uniform": _uniform_steps, "quad": _quad_steps}


def select_timesteps(num_timesteps: int, steps: int, skip_type: str) -> Tensor:
    """The timesteps a sampler visits, descending to 0. Returns [S] int64.

    "uniform": every (T // steps)-th, which is more than `steps` of them where steps does not divide T.
    "quad" (arXiv 2010.02502 appendix D.2): dense near 0, where timesteps can repeat; S is `steps`.
    Raises ValueError for steps outside 1..T and for an unknown skip type.
    """
    if skip_type not in SKIP_TYPES:
        raise ValueError(f"unknown skip type {skip_type!r}, expected one of {', '.join(SKIP_TYPES)}")
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must lie in 1..{num_timesteps}, the timesteps of the model, found {steps}")
    return torch.from_numpy(SKIP_TYPES[skip_type](num_timesteps, steps)[::-1].astype(np.int64))

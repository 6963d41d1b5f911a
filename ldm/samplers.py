"""Samplers of the latent-diffusion family, as coroutines like those of `ddim.samplers`, and guidance."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.samplers import (
    Call,
    Noise,
    NoiseGrid,
    Sampler,
    batch_timestep,
    check_alphas,
    ddim_step,
    dpm_solver_timesteps,
    generalized,
    walk,
)
from ddim.schedules import cumulative_alphas

# DDIM (arXiv 2010.02502) and ancestral sampling (2006.11239)


def ddim(x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, eta: float = 0.0, noise: Noise | None = None) -> Sampler:
    """DDIM that ends at ᾱ₀, not at 1, so that with eta > 0 the last step adds noise too.

    x: [N, C, h, w]; timesteps: [S] descending; alphas_cumprod: [T]. `noise` is needed where eta > 0.
    """
    return generalized(x, timesteps, alphas_cumprod, eta, noise, alpha_end=alphas_cumprod[0].item())


def ddpm(x: Tensor, alphas_cumprod: Tensor, noise: Noise) -> Sampler:
    """Ancestral sampling over all T timesteps, with the mean and the variance β̃ of 2006.11239 equation 7.

    The predicted x0 is not clipped, since latents have no fixed range, and t = 0 adds no noise. Between neighbouring
    timesteps DDIM with η = 1 is just that (2010.02502 §4.1). x: [N, C, h, w]; alphas_cumprod: [T].
    """
    return generalized(x, torch.arange(len(alphas_cumprod) - 1, -1, -1), alphas_cumprod, 1.0, noise)


# PLMS, the pseudo linear multistep method of arXiv 2202.09778

ADAMS_BASHFORTH = {  # order -> weights of the latest ε, the one before it, ...
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def plms(x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Sampler:
    """Every step is a DDIM step (the paper's transfer part) with an ε that past predictions have improved.

    The first step has no past: it is a pseudo improved Euler step of two calls, both with `Call.step` 0. Then follow
    Adams–Bashforth steps of order 2, 3 and from then on 4. Ends at ᾱ₀.
    x: [N, C, h, w]; timesteps: [S] descending; alphas_cumprod: [T].
    """
    following = [*timesteps[1:], torch.tensor(0)]
    history: list[Tensor] = []  # latest first
    for step, (t, alpha, alpha_next) in enumerate(walk(timesteps, alphas_cumprod, alphas_cumprod[0].item())):
        eps = yield Call(step, batch_timestep(t, x), x)
        history = [eps, *history][:4]
        if step == 0:
            ahead = ddim_step(x, eps, alpha, alpha_next)
            eps_ahead = yield Call(step, batch_timestep(following[step], x), ahead)
            eps = (eps + eps_ahead) / 2
        else:
            eps = sum(weight * past for weight, past in zip(ADAMS_BASHFORTH[len(history)], history, strict=True))
        x = ddim_step(x, eps, alpha, alpha_next)
    return x


# DPM-Solver++, arXiv 2211.01095

FEWEST_STEPS_OF_ORDER_2 = 15  # with fewer, the last step is of first order, which is more stable


def dpm_solver(x: Tensor, steps: int, alphas_cumprod: Tensor) -> Sampler:
    """Multistep DPM-Solver++ of order 2 (algorithm 2), time-uniform from T - 1 to 0, with one call per step.

    x: [N, C, h, w]; alphas_cumprod: [T], strictly between 0 and 1.
    """
    grid = NoiseGrid.uniform(steps, alphas_cumprod)
    h = grid.lam.diff()
    previous = None
    for i in range(steps):
        data = yield from grid.data(x, i)
        slope = 0.0
        if previous is not None and (i < steps - 1 or steps >= FEWEST_STEPS_OF_ORDER_2):
            slope = (data - previous) * (h[i] / (2 * h[i - 1])).item()
        x = grid.move(x, i, i + 1, data + slope)
        previous = data
    return x


# Guidance, arXiv 2207.12598


def guided(
    network: Callable[..., Tensor], context: Tensor | None, unconditional: Tensor | None, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Classifier-free guidance: (x, t) -> ε_u + scale·(ε_c - ε_u), from one network call of batch 2N.

    context, unconditional: [N, L, D], or [N] labels. The unconditional half comes first in the batch. Without an
    unconditional one, or with scale 1, the call is plain network(x, t, context), or network(x, t) without a context.
    ε comes in x's precision: guidance amplifies the rounding of a network that computes in a lower one.
    """
    if context is None:
        return lambda x, t: network(x, t).to(x.dtype)
    if unconditional is None or scale == 1:
        return lambda x, t: network(x, t, context).to(x.dtype)
    both = torch.cat([unconditional, context])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        eps = network(torch.cat([x, x]), torch.cat([t, t]), both).to(x.dtype)
        eps_u, eps_c = eps.chunk(2)
        return eps_u + scale * (eps_c - eps_u)

    return predict


# From options to a sampler


@dataclass(frozen=True)
class SamplerKind:
    """How a sampler is made from options, and which timesteps it will visit."""

    timesteps: Callable[[int, int], Tensor]  # (steps, T) -> [S], descending
    start: Callable[[Tensor, Tensor, Tensor, float, Noise | None], Sampler]  # (x, timesteps, ᾱ, eta, noise)
    draws: Callable[[float], bool] = lambda eta: False  # whether noise is drawn with this eta


def strided_timesteps(steps: int, num_timesteps: int) -> Tensor:
    """range(0, T, T // steps) plus one, descending: more than `steps` of them where steps does not divide T.

    Returns [S] int64. Raises ValueError where the plus one leads to T, which the model does not know.
    """
    _check_steps(steps, num_timesteps)
    timesteps = torch.arange(0, num_timesteps, num_timesteps // steps).flip(0) + 1
    if timesteps[0] >= num_timesteps:
        fits = [n for n in range(1, steps) if (num_timesteps - 1) % (num_timesteps // n)]
        advice = f", the next smaller number that fits is {fits[-1]}" if fits else ""
        raise ValueError(
            f"steps {steps} would start at timestep {num_timesteps} (every {num_timesteps // steps}. of "
            f"0..{num_timesteps - 1}, plus one), past the model's last one{advice}"
        )
    return timesteps


def _time_uniform(steps: int, num_timesteps: int) -> Tensor:
    _check_steps(steps, num_timesteps)
    return dpm_solver_timesteps(steps, num_timesteps)


def _all_timesteps(steps: int, num_timesteps: int) -> Tensor:
    return torch.arange(num_timesteps - 1, -1, -1)


def _check_steps(steps: int, num_timesteps: int) -> None:
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must lie in 1..{num_timesteps}, the timesteps of the model, found {steps}")


SAMPLERS: dict[str, SamplerKind] = {
    "ddim": SamplerKind(strided_timesteps, ddim, draws=lambda eta: eta > 0),
    "plms": SamplerKind(strided_timesteps, lambda x, timesteps, alphas, eta, noise: plms(x, timesteps, alphas)),
    "dpm_solver": SamplerKind(
        _time_uniform, lambda x, timesteps, alphas, eta, noise: dpm_solver(x, len(timesteps), alphas)
    ),
    "ddpm": SamplerKind(
        _all_timesteps, lambda x, timesteps, alphas, eta, noise: ddpm(x, alphas, noise), draws=lambda eta: True
    ),
}


def sampler_timesteps(name: str, *, steps: int, num_timesteps: int) -> Tensor:
    """Timestep of the first call of each step of a sampler, descending. Returns [S], int64, or float64 for dpm_solver.

    ddpm visits all T timesteps whatever `steps` says. Raises ValueError for an unknown name or impossible steps.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}, expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name].timesteps(steps, num_timesteps)


def check_eta(name: str, eta: float) -> None:
    """Raises ValueError for an eta outside [0, 1], and for PLMS with an eta other than 0."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], found {eta}")
    if name == "plms" and eta != 0:
        raise ValueError(f"eta must be 0 for plms, which is deterministic, found {eta}")


def make_sampler(name: str, x: Tensor, *, steps: int, betas: Tensor, eta: float, noise: Noise | None) -> Sampler:
    """The sampler that options ask for, started from x: [N, C, h, w]. betas: [T].

    dpm_solver and ddpm do not use eta; noise may be None where none is drawn. PLMS makes two calls with
    `Call.step` 0. Raises ValueError as `sampler_timesteps` and `check_eta` do, and for missing noise or betas whose
    cumulative alphas reach 0 or 1.
    """
    timesteps = sampler_timesteps(name, steps=steps, num_timesteps=len(betas))
    check_eta(name, eta)
    kind = SAMPLERS[name]
    if noise is None and kind.draws(eta):
        raise ValueError(f"{name} with eta {eta} needs a source of noise, found none")
    alphas = cumulative_alphas(betas).cpu()
    check_alphas(name, alphas)
    return kind.start(x, timesteps, alphas, eta, noise)

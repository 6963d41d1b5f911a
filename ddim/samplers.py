"""Samplers as coroutines: they yield the network evaluations they need and know no network.

Coefficients are float64 and are cast once, where they meet x.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.schedules import cumulative_alphas, select_timesteps


@dataclass(frozen=True)
class Call:
    """One network evaluation a sampler asks for."""

    step: int  # sampler step, 0 is the noisiest
    t: Tensor  # [N] timestep given to the network: int64, or float where the sampler works between timesteps
    x: Tensor  # [N, C, H, W]


Sampler = Generator[Call, Tensor, Tensor]  # yields calls, is sent the predicted noise, returns the final x
Noise = Callable[[], Tensor]  # fresh standard normal noise of x's shape at each call


def run(
    sampler: Sampler, network: Callable[[Tensor, Tensor], Tensor], observe: Callable[[Call], None] | None = None
) -> Tensor:
    """Drives a sampler with network(x, t) -> predicted noise. Returns the final x, [N, C, H, W].

    `observe` sees each call before the network does. Gradients follow the caller's mode. Raises ValueError naming the
    step whose prediction has numbers that are not finite: on a GPU after the last step, since to look is to wait.
    """
    eps, checks = None, []
    while True:
        try:
            call = sampler.send(eps)
        except StopIteration as end:
            _require_finite(checks)
            return end.value
        if observe is not None:
            observe(call)
        eps = network(call.x, call.t)
        checks.append((call.step, call.t, eps.detach().isfinite().all()))
        if eps.is_cpu:
            _require_finite(checks[-1:])


def _require_finite(checks: list[tuple[int, Tensor, Tensor]]) -> None:
    """checks: (step, its timesteps [N], whether the prediction is finite []). One transfer for all of them."""
    if not checks or torch.stack([finite for _, _, finite in checks]).all():
        return
    step, t = next((step, t) for step, t, finite in checks if not finite)
    found = "NaN or infinite values"
    raise ValueError(f"sampling: expected finite predictions, found {found} at step {step} (t = {t.max().item():g})")


def to_images(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped. Raises ValueError for numbers that are not finite, which no picture can show."""
    if not x.isfinite().all():
        raise ValueError("sampling: expected finite images, found NaN or infinite values")
    return ((x + 1) / 2).clamp(0, 1)


# DDIM, arXiv 2010.02502


def ddim_coefficients(
    alpha: Tensor | float, alpha_next: Tensor | float, eta: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(a, b, sigma) with x_next = a·x + b·ε + sigma·noise: equations 12 and 16, collected in x and ε.

    alpha, alpha_next: ᾱ of this step and of the next one (1 after the last), of one shape. Returns that shape, float64.
    """
    alpha = torch.as_tensor(alpha, dtype=torch.float64)
    alpha_next = torch.as_tensor(alpha_next, dtype=torch.float64)
    sigma = eta * ((1 - alpha / alpha_next) * (1 - alpha_next) / (1 - alpha)).sqrt()
    a = (alpha_next / alpha).sqrt()
    b = (1 - alpha_next - sigma**2).sqrt() - (alpha_next * (1 - alpha) / alpha).sqrt()
    return a, b, sigma


def ddim_step(
    x: Tensor,
    eps: Tensor,
    alpha: Tensor | float,
    alpha_next: Tensor | float,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """One DDIM step. x, eps, noise: [N, C, H, W]; alpha, alpha_next: [] or, one per image, [N]. Returns x_next.

    Without `noise` the step has its mean only.
    """
    a, b, sigma = (_meet(c, x) for c in ddim_coefficients(alpha, alpha_next, eta))
    x_next = a * x + b * eps
    return x_next if noise is None else x_next + sigma * noise


def generalized(
    x: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    eta: float = 0.0,
    noise: Noise | None = None,
    alpha_end: float = 1.0,
) -> Sampler:
    """DDIM. x: [N, C, H, W]; timesteps: [S] descending; alphas_cumprod: [T]; alpha_end: ᾱ of the result.

    `noise` is needed where eta > 0.
    """
    for step, (t, alpha, alpha_next) in enumerate(walk(timesteps, alphas_cumprod, alpha_end)):
        eps = yield Call(step, batch_timestep(t, x), x)
        # sigma is 0 at the step to alpha_next = 1, so no noise is drawn for it.
        draw = noise() if eta > 0 and alpha_next < 1 else None
        x = ddim_step(x, eps, alpha, alpha_next, eta, draw)
    return x


# Ancestral steps, arXiv 2006.11239


def ddpm_noisy(x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, noise: Noise) -> Sampler:
    """Ancestral sampling (algorithm 2 with σ_t² = β_t) over any descending subset of the timesteps.

    The predicted image is clipped to [-1, 1]; the last step adds no noise. Arguments as for `generalized`.
    """
    for step, (t, alpha, alpha_next) in enumerate(walk(timesteps, alphas_cumprod)):
        eps = yield Call(step, batch_timestep(t, x), x)
        beta = 1 - alpha / alpha_next
        x0 = (_meet(alpha**-0.5, x) * x - _meet((1 / alpha - 1).sqrt(), x) * eps).clamp(-1, 1)
        # Mean of the posterior q(x_next | x, x0), equation 7.
        of_x0 = alpha_next.sqrt() * beta / (1 - alpha)
        of_x = (1 - beta).sqrt() * (1 - alpha_next) / (1 - alpha)
        x = _meet(of_x0, x) * x0 + _meet(of_x, x) * x
        if alpha_next < 1:
            x = x + _meet(beta.sqrt(), x) * noise()
    return x


def walk(timesteps: Tensor, alphas_cumprod: Tensor, alpha_end: float = 1.0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(t, ᾱ, ᾱ of the next step), each [], from the noisiest step on; ᾱ is alpha_end after the last."""
    timesteps = timesteps.cpu()
    alphas = alphas_cumprod.double().cpu()[timesteps]
    return zip(timesteps, alphas, torch.cat([alphas[1:], alphas.new_full((1,), alpha_end)]), strict=True)


def check_alphas(name: str, alphas_cumprod: Tensor) -> None:
    """Raises ValueError where a schedule reaches 0 or 1, which the sampler of that name cannot use."""
    if not ((alphas_cumprod > 0) & (alphas_cumprod < 1)).all():
        low, high = alphas_cumprod.min().item(), alphas_cumprod.max().item()
        raise ValueError(f"{name} needs cumulative alphas strictly between 0 and 1, found {low:g} to {high:g}")


# DPM-Solver++, arXiv 2211.01095 and 2206.00927


def dpm_solver(x: Tensor, steps: int, alphas_cumprod: Tensor, order: int = 3) -> Sampler:
    """Singlestep DPM-Solver++ with `steps` network evaluations. Returns x at timestep 0, the least noisy one.

    The solvers of 2206.00927 (algorithms 1 and 2, orders as in DPM-Solver-fast) for the data prediction of 2211.01095
    (algorithm 1), time-uniform: solver steps and their inner stages all lie on the grid of `dpm_solver_timesteps`.
    log α is piecewise linear between timesteps. x: [N, C, H, W]; alphas_cumprod: [T].

    Raises ValueError for steps < 1, an order other than 1, 2, 3, or a schedule that reaches 0 or 1.
    """
    check_alphas("dpm_solver", alphas_cumprod)
    orders = singlestep_orders(steps, order)
    return _dpm_solver(x, NoiseGrid.uniform(steps, alphas_cumprod), orders)


def dpm_solver_timesteps(steps: int, num_timesteps: int) -> Tensor:
    """Timesteps of the evaluations, descending from T - 1, uniform. Returns [steps] float64."""
    return _uniform_grid(steps, num_timesteps)[:-1]


def _uniform_grid(steps: int, num_timesteps: int) -> Tensor:
    return torch.linspace(num_timesteps - 1, 0, steps + 1, dtype=torch.float64)


def singlestep_orders(steps: int, order: int) -> list[int]:
    """Orders of the solver steps that share `steps` evaluations; low orders come last.

    Order 3 never ends with a step of order 3 (2206.00927 §3.4): 6 evaluations are 3, 2, 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    if order not in (1, 2, 3):
        raise ValueError(f"the order of dpm_solver must be 1, 2 or 3, found {order}")
    full, rest = divmod(steps, order)
    if order == 3 and rest == 0:
        return [3] * (full - 1) + [2, 1]
    return [order] * full + ([rest] if rest else [])


@dataclass(frozen=True)
class NoiseGrid:
    """The schedule at each evaluation and at the end; all [S + 1] float64. What DPM-Solver++ steps are made of."""

    t: Tensor
    alpha: Tensor  # signal and noise level: x_t = alpha·x_0 + sigma·ε
    sigma: Tensor
    lam: Tensor  # log(alpha / sigma)

    @classmethod
    def uniform(cls, steps: int, alphas_cumprod: Tensor) -> "NoiseGrid":
        """From timestep T - 1 to 0 in `steps` equal parts. alphas_cumprod: [T], strictly between 0 and 1."""
        return cls.of(_uniform_grid(steps, len(alphas_cumprod)), alphas_cumprod)

    @classmethod
    def of(cls, t: Tensor, alphas_cumprod: Tensor) -> "NoiseGrid":
        """t: [S + 1] float64 in [0, T - 1]; log α is piecewise linear between timesteps."""
        log_alpha = 0.5 * alphas_cumprod.double().cpu().log()
        left = t.floor().long().clamp(max=max(len(log_alpha) - 2, 0))
        right = (left + 1).clamp(max=len(log_alpha) - 1)
        log_alpha = log_alpha[left] + (t - left) * (log_alpha[right] - log_alpha[left])
        sigma = (-torch.expm1(2 * log_alpha)).sqrt()
        return cls(t, log_alpha.exp(), sigma, log_alpha - sigma.log())

    def data(self, x: Tensor, i: int) -> Generator[Call, Tensor, Tensor]:
        """The predicted image at grid point i."""
        eps = yield Call(i, batch_timestep(self.t[i], x), x)
        return (x - _meet(self.sigma[i], x) * eps) / _meet(self.alpha[i], x)

    def move(self, x: Tensor, i: int, j: int, data: Tensor) -> Tensor:
        """Exact solution from i to j for a constant predicted image (2211.01095, proposition 4.1)."""
        decay = -torch.expm1(self.lam[i] - self.lam[j])
        return _meet(self.sigma[j] / self.sigma[i], x) * x + _meet(self.alpha[j] * decay, x) * data

    def bend(self, i: int, j: int, difference: Tensor, over: Tensor) -> Tensor:
        """What a predicted image that changes by `difference` per `over` in λ adds to `move`."""
        h = self.lam[j] - self.lam[i]
        return _meet(self.alpha[j] * (h + torch.expm1(-h)) / over, difference) * difference


def _dpm_solver(x: Tensor, grid: NoiseGrid, orders: list[int]) -> Sampler:
    i = 0
    for order in orders:
        x = yield from _singlestep(x, grid, i, order)
        i += order
    return x


def _singlestep(x: Tensor, grid: NoiseGrid, i: int, order: int) -> Sampler:
    """One solver step from grid point i to i + order, with the points between as its stages."""
    j = i + order
    data = yield from grid.data(x, i)
    x_j = grid.move(x, i, j, data)
    if order == 1:
        return x_j
    h, h1 = grid.lam[j] - grid.lam[i], grid.lam[i + 1] - grid.lam[i]
    difference = (yield from grid.data(grid.move(x, i, i + 1, data), i + 1)) - data
    if order == 2:
        # 2211.01095 algorithm 1: the constant prediction is replaced by data + difference / (2 r1), r1 = h1 / h.
        weight = -torch.expm1(-h) * h / (2 * h1)
        return x_j + _meet(grid.alpha[j] * weight, x) * difference
    h2 = grid.lam[i + 2] - grid.lam[i]
    middle = grid.move(x, i, i + 2, data) + grid.bend(i, i + 2, difference, over=h1)
    difference = (yield from grid.data(middle, i + 2)) - data
    return x_j + grid.bend(i, j, difference, over=h2)


def _meet(coefficient: Tensor, x: Tensor) -> Tensor:
    """The one cast of a float64 coefficient, [] or [N], to what can multiply x."""
    if coefficient.dim() == 0:
        return coefficient.to(x.dtype)
    return coefficient.to(x).reshape(-1, *[1] * (x.dim() - 1))


def batch_timestep(t: Tensor, x: Tensor) -> Tensor:
    """[] -> [N] on x's device."""
    dtype = torch.promote_types(x.dtype, torch.float32) if t.is_floating_point() else torch.int64
    return torch.full((x.shape[0],), t.item(), dtype=dtype, device=x.device)


# From options to a sampler


@dataclass(frozen=True)
class SamplerKind:
    """How a sampler is made from options, and which timesteps it will visit."""

    timesteps: Callable[[int, str, int], Tensor]  # (steps, skip_type, T) -> [S], descending
    start: Callable[[Tensor, Tensor, Tensor, float, Noise | None], Sampler]  # (x, timesteps, ᾱ, eta, noise)


def _start_generalized(x: Tensor, timesteps: Tensor, alphas: Tensor, eta: float, noise: Noise | None) -> Sampler:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], found {eta}")
    if eta > 0 and noise is None:
        raise ValueError(f"generalized sampling with eta {eta} needs a source of noise, found none")
    return generalized(x, timesteps, alphas, eta, noise)


def _start_ddpm_noisy(x: Tensor, timesteps: Tensor, alphas: Tensor, eta: float, noise: Noise | None) -> Sampler:
    if noise is None:
        raise ValueError("ddpm_noisy needs a source of noise, found none")
    return ddpm_noisy(x, timesteps, alphas, noise)


def _start_dpm_solver(x: Tensor, timesteps: Tensor, alphas: Tensor, eta: float, noise: Noise | None) -> Sampler:
    return dpm_solver(x, len(timesteps), alphas)


def _selected(steps: int, skip_type: str, num_timesteps: int) -> Tensor:
    return select_timesteps(num_timesteps, steps, skip_type)


def _time_uniform(steps: int, skip_type: str, num_timesteps: int) -> Tensor:
    singlestep_orders(steps, 3)
    return dpm_solver_timesteps(steps, num_timesteps)


SAMPLERS: dict[str, SamplerKind] = {
    "generalized": SamplerKind(_selected, _start_generalized),
    "dpm_solver": SamplerKind(_time_uniform, _start_dpm_solver),
    "ddpm_noisy": SamplerKind(_selected, _start_ddpm_noisy),
}


def sampler_timesteps(name: str, *, steps: int, skip_type: str, num_timesteps: int) -> Tensor:
    """Timestep of each `Call.step` of a sampler, descending. Returns [S], int64, or float64 for dpm_solver.

    dpm_solver is always time-uniform. Raises ValueError for an unknown name or skip type, or impossible steps.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}, expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name].timesteps(steps, skip_type, num_timesteps)


def make_sampler(
    name: str, x: Tensor, *, steps: int, skip_type: str, betas: Tensor, eta: float, noise: Noise | None
) -> Sampler:
    """The sampler that options ask for, started from x: [N, C, H, W]. betas: [T].

    Only generalized sampling uses eta; noise may be None where none is drawn. Raises ValueError as
    `sampler_timesteps` does, and for an eta outside [0, 1], missing noise, or a first step without signal.
    """
    timesteps = sampler_timesteps(name, steps=steps, skip_type=skip_type, num_timesteps=len(betas))
    alphas = cumulative_alphas(betas).cpu()
    first = int(timesteps[0])
    if alphas[first] <= 0:
        raise ValueError(f"cumulative alpha is 0 at timestep {first}: sampling cannot start there, choose fewer steps")
    return SAMPLERS[name].start(x, timesteps, alphas, eta, noise)

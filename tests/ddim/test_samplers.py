import math

import numpy as np
import pytest
import torch

from ddim.noise import ImageNoise
from ddim.samplers import (
    SAMPLERS,
    Call,
    ddim_coefficients,
    ddim_step,
    ddpm_noisy,
    dpm_solver,
    generalized,
    make_sampler,
    run,
    sampler_timesteps,
    singlestep_orders,
    to_images,
)
from ddim.schedules import cumulative_alphas, select_timesteps


class GaussianData:
    """Data from N(mean, std²): the exact ε(x, t) and the exact solution of the probability-flow ODE."""

    def __init__(self, alphas_cumprod, mean, std):
        self.log_alpha = 0.5 * alphas_cumprod.log().numpy()
        self.mean, self.std = mean, std

    def alpha_bar(self, t):
        t = torch.as_tensor(t, dtype=torch.float64).numpy()
        return torch.as_tensor(np.exp(2 * np.interp(t, np.arange(len(self.log_alpha)), self.log_alpha)))

    def variance(self, alpha_bar):
        return alpha_bar * self.std**2 + 1 - alpha_bar

    def __call__(self, x, t):
        a = self.alpha_bar(t)[:, None, None, None]
        return (1 - a).sqrt() * (x - a.sqrt() * self.mean) / self.variance(a)

    def solve(self, x, start, end):
        a, b = self.alpha_bar(start), self.alpha_bar(end)
        return b.sqrt() * self.mean + (x - a.sqrt() * self.mean) * (self.variance(b) / self.variance(a)).sqrt()


@pytest.fixture(scope="module")
def smooth_alphas():
    """A long schedule with half the log signal-to-noise ratio from 2 to -3, bent a little: [20001]."""
    u = torch.linspace(0, 1, 20001, dtype=torch.float64)
    return torch.sigmoid(2 * (2 - 5 * (0.7 * u + 0.3 * u**2)))


@pytest.fixture
def x(generator):
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# golden end states


@pytest.mark.parametrize("skip_type", ["quad", "uniform"])
def test_golden_end_states(network, end_states, betas, skip_type):
    options = {"steps": 10, "skip_type": skip_type, "betas": betas, "eta": 0.0, "noise": None}
    out = run(make_sampler("generalized", end_states["ddim_x_T"], **options), network)
    assert out.dtype == torch.float32
    assert relative(out, end_states[f"ddim_{skip_type}10"]) < 1e-4


# DDIM


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("alpha, alpha_next", [(0.1, 0.4), (0.6, 0.6), (0.999, 1.0)])
def test_ddim_step_is_equation_12(x, generator, alpha, alpha_next, eta):
    eps, noise = (torch.randn(x.shape, dtype=x.dtype, generator=generator) for _ in range(2))
    sigma = eta * math.sqrt((1 - alpha_next) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_next)
    predicted = (x - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
    expected = math.sqrt(alpha_next) * predicted + math.sqrt(1 - alpha_next - sigma**2) * eps + sigma * noise
    assert torch.allclose(ddim_step(x, eps, alpha, alpha_next, eta, noise), expected, rtol=0, atol=1e-13)


def test_ddim_coefficients_are_float64_and_follow_the_shape():
    a, b, sigma = ddim_coefficients(torch.tensor([0.1, 0.5]), torch.tensor([0.5, 1.0]), 1.0)
    assert a.dtype == b.dtype == sigma.dtype == torch.float64
    assert a.shape == b.shape == sigma.shape == (2,)
    assert sigma[1] == 0


def test_ddim_step_takes_one_alpha_per_image(x, generator):
    eps = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    alpha, alpha_next = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 0.6, 0.7, 1.0])
    together = ddim_step(x, eps, alpha, alpha_next)
    apart = [ddim_step(x[i : i + 1], eps[i : i + 1], alpha[i], alpha_next[i]) for i in range(4)]
    assert torch.equal(together, torch.cat(apart))


def test_a_repeated_timestep_leaves_x_alone(x):
    assert torch.equal(ddim_step(x, torch.ones_like(x), 0.9, 0.9, 1.0, torch.ones_like(x)), x)


def test_eta_one_has_the_mean_of_ancestral_sampling(x, betas):
    alphas = cumulative_alphas(betas)
    data = GaussianData(alphas, mean=0.0, std=0.1)  # predicted images stay inside [-1, 1], nothing is clipped
    timesteps = select_timesteps(1000, 20, "uniform")

    def silent():
        return torch.zeros_like(x)

    ddim = run(generalized(x, timesteps, alphas, 1.0, silent), data)
    assert relative(run(ddpm_noisy(x, timesteps, alphas, silent), data), ddim) < 1e-12
    assert relative(run(generalized(x, timesteps, alphas), data), ddim) > 0.1


def test_no_noise_is_drawn_where_none_is_added(x, betas):
    count = []

    def noise():
        count.append(1)
        return torch.zeros_like(x)

    alphas, timesteps = cumulative_alphas(betas), torch.tensor([800, 400, 0])
    for sampler, expected in (
        (generalized(x, timesteps, alphas, 0.0, noise), 0),
        (ddpm_noisy(x, timesteps, alphas, noise), 2),
    ):
        count.clear()
        run(sampler, lambda x, t: x)
        assert len(count) == expected


# ancestral sampling


@pytest.mark.parametrize("steps", [20, 250])
def test_ancestral_sampling_has_the_variance_of_its_recursion(betas, generator, steps):
    std, alphas, timesteps = 0.1, cumulative_alphas(betas), select_timesteps(1000, steps, "uniform")
    variance = 1.0
    for i, t in enumerate(timesteps):
        a = alphas[t].item()
        a_next = alphas[timesteps[i + 1]].item() if i + 1 < steps else 1.0
        beta = 1 - a / a_next
        to_image = math.sqrt(a) * std**2 / (a * std**2 + 1 - a)  # E[x0 | x_t] = to_image · x_t
        mean = (math.sqrt(a_next) * beta * to_image + math.sqrt(1 - beta) * (1 - a_next)) / (1 - a)
        variance = mean**2 * variance + (beta if a_next < 1 else 0)
    shape = (64, 3, 16, 16)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    noise = lambda: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    out = run(ddpm_noisy(x, timesteps, alphas, noise), GaussianData(alphas, 0.0, std))
    assert out.var().item() == pytest.approx(variance, rel=0.03)  # 4.7 standard errors of 49152 values
    if steps == 250:
        assert out.var().item() == pytest.approx(std**2, rel=0.15)  # β_t is a little more than the exact variance


def test_ancestral_sampling_clips_the_predicted_image(x, betas):
    alphas = cumulative_alphas(betas)
    out = run(ddpm_noisy(10 * x, torch.tensor([500, 0]), alphas, lambda: x), lambda x, t: -x)
    assert out.abs().max() == 1.0


# DPM-Solver++


def test_singlestep_orders_spend_every_evaluation():
    assert [singlestep_orders(n, 3) for n in (1, 2, 3, 4, 5, 6)] == [[1], [2], [2, 1], [3, 1], [3, 2], [3, 2, 1]]
    assert singlestep_orders(5, 2) == [2, 2, 1] and singlestep_orders(3, 1) == [1, 1, 1]
    assert all(sum(singlestep_orders(n, order)) == n for n in range(1, 30) for order in (1, 2, 3))


def test_first_order_dpm_solver_is_ddim(x, smooth_alphas):
    data = GaussianData(smooth_alphas, 0.3, 0.5)
    out = x
    for t, t_next in zip((20000, 15000, 10000, 5000), (15000, 10000, 5000, 0), strict=True):
        eps = data(out, torch.full((4,), t))
        out = ddim_step(out, eps, smooth_alphas[t], smooth_alphas[t_next])
    assert relative(run(dpm_solver(x, 4, smooth_alphas, order=1), data), out) < 1e-12


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_converges_with_its_order(x, smooth_alphas, order):
    data = GaussianData(smooth_alphas, 0.3, 0.5)
    exact = data.solve(x, 20000, 0)
    # With 3k + 2 evaluations the last step has order 2, whose single local error is of third order too.
    coarse, fine = ((run(dpm_solver(x, n, smooth_alphas, order), data) - exact).abs().max() for n in (20, 62))
    measured = math.log(coarse / fine) / math.log(62 / 20)
    assert order - 0.15 < measured < order + 0.5


@pytest.mark.parametrize("steps, factor", [(8, 5), (20, 50), (62, 500)])
def test_dpm_solver_is_far_more_accurate_than_ddim(x, smooth_alphas, steps, factor):
    data = GaussianData(smooth_alphas, 0.3, 0.5)
    exact = data.solve(x, 20000, 0)
    ddim, third = (relative(run(dpm_solver(x, steps, smooth_alphas, order), data), exact) for order in (1, 3))
    assert third * factor < ddim


def test_dpm_solver_approaches_the_solution_on_the_ddpm_schedule(x, betas):
    alphas = cumulative_alphas(betas)
    data = GaussianData(alphas, 0.3, 0.5)
    errors = [relative(run(dpm_solver(x, n, alphas), data), data.solve(x, 999, 0)) for n in (20, 50, 200)]
    assert errors[0] < 0.06 and errors[1] < 0.01 and errors[2] < 5e-4


@pytest.mark.parametrize("alphas", [[0.5, 0.0], [1.0, 0.5]])
def test_dpm_solver_refuses_a_schedule_without_noise_or_signal(x, alphas):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        dpm_solver(x, 2, torch.tensor(alphas))


# calls and options


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps, skip_type", [(7, "uniform"), (10, "quad"), (1, "quad")])
def test_calls_are_the_timesteps_announced(name, steps, skip_type, betas):
    x = torch.zeros(2, 3, 4, 4)
    calls: list[Call] = []
    noise = ImageNoise(0, range(2), (3, 4, 4), "cpu")
    options = {"steps": steps, "skip_type": skip_type, "betas": betas, "eta": 0.5, "noise": noise}
    run(make_sampler(name, x, **options), lambda x, t: x, calls.append)
    announced = sampler_timesteps(name, steps=steps, skip_type=skip_type, num_timesteps=1000)
    assert [call.step for call in calls] == list(range(len(announced)))
    assert all(call.t.shape == (2,) and call.x.shape == x.shape for call in calls)
    assert torch.stack([call.t[1] for call in calls]).double().tolist() == pytest.approx(announced.tolist(), rel=1e-6)
    assert (announced.diff() <= 0).all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name, network, betas):
    network.double()

    def sample(indices):
        noise = ImageNoise(3, indices, (3, 16, 16), "cpu", torch.float64)
        options = {"steps": 5, "skip_type": "uniform", "betas": betas, "eta": 1.0, "noise": noise}
        return run(make_sampler(name, noise(), **options), network)

    assert relative(torch.cat([sample([0]), sample([1, 2])]), sample([0, 1, 2])) < 1e-10


@pytest.mark.parametrize(
    "name, changes, match",
    [
        ("ddim", {}, "'ddim'.*generalized, dpm_solver, ddpm_noisy"),
        ("generalized", {"steps": 1001}, r"1\.\.1000.*1001"),
        ("generalized", {"eta": 1.5}, r"eta must lie in \[0, 1\], found 1.5"),
        ("generalized", {"eta": 0.5}, "source of noise"),
        ("ddpm_noisy", {}, "source of noise"),
        ("dpm_solver", {"steps": 0}, "at least 1, found 0"),
        ("generalized", {"betas": torch.ones(1000)}, "alpha is 0 at timestep 900"),
    ],
)
def test_impossible_options_are_refused_before_the_first_call(name, changes, match, betas):
    options = {"steps": 10, "skip_type": "uniform", "betas": betas, "eta": 0.0, "noise": None, **changes}
    with pytest.raises(ValueError, match=match):
        make_sampler(name, torch.zeros(1, 3, 4, 4), **options)


def test_an_error_in_the_network_is_not_swallowed(x, betas):
    def network(x, t):
        raise StopIteration("from the network")

    with pytest.raises(StopIteration, match="from the network"):
        run(generalized(x, torch.tensor([10, 0]), cumulative_alphas(betas)), network)


def test_to_images_maps_and_clamps():
    assert to_images(torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


# Numbers that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_prediction_that_is_not_finite_stops_the_run(name, bad):
    """With the step in a line; samplers that clip would hide an infinite one."""
    betas, seen = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), []

    def network(x, t):
        seen.append(t.max().item())
        eps = torch.zeros_like(x)
        if len(seen) == 2:
            eps[1, 0, 0, 0] = bad
        return eps

    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sampler = make_sampler(
        name, x, steps=4, skip_type="uniform", betas=betas, eta=0.0, noise=lambda: torch.zeros(2, 3, 4, 4)
    )
    with pytest.raises(
        ValueError, match=r"^sampling: expected finite predictions, found NaN or infinite values at step"
    ) as error:
        run(sampler, network)
    assert f"(t = {seen[1]:g})" in str(error.value) and len(seen) == 2


def test_an_image_that_is_not_finite_is_no_image():
    with pytest.raises(ValueError, match="^sampling: expected finite images, found NaN or infinite values$"):
        to_images(torch.tensor([0.0, float("inf")]))

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddim.noise import ImageNoise
from ddim.samplers import ddim_step, run
from ddim.schedules import cumulative_alphas
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    dpm_solver,
    guided,
    make_sampler,
    plms,
    sampler_timesteps,
    strided_timesteps,
)
from ldm.schedules import beta_schedule

FIXTURES = Path(__file__).parents[1] / "fixtures"


class GaussianData:
    """Data from N(0, std²): the exact ε(x, t) at whole timesteps and the exact solution of the probability-flow ODE."""

    def __init__(self, alphas_cumprod, std=0.5):
        self.alphas, self.std = alphas_cumprod, std

    def variance(self, t):
        return self.alphas[t] * self.std**2 + 1 - self.alphas[t]

    def __call__(self, x, t):
        t = round(float(t[0]))
        return (1 - self.alphas[t]).sqrt() * x / self.variance(t)

    def solve(self, x, start, end):
        return x * (self.variance(end) / self.variance(start)).sqrt()


@pytest.fixture(scope="module")
def betas():
    return beta_schedule("linear", 1000, 0.00085, 0.012)


@pytest.fixture(scope="module")
def alphas(betas):
    return cumulative_alphas(betas)


@pytest.fixture(scope="module")
def smooth_alphas():
    """A long schedule with half the log signal-to-noise ratio from 2 to -3, bent a little: [8401]."""
    u = torch.linspace(0, 1, 8401, dtype=torch.float64)
    return torch.sigmoid(2 * (2 - 5 * (0.7 * u + 0.3 * u**2)))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def x(generator):
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# golden end states


@pytest.fixture(scope="module")
def end_states():
    return load_file(FIXTURES / "samplers.safetensors")


def load_network(case):
    config = json.loads((FIXTURES / case / "case.json").read_text())["config"]
    network = UNetModel(**config).eval()
    network.load_state_dict(load_file(FIXTURES / case / "fp.safetensors"))
    return network.requires_grad_(False)


@pytest.mark.parametrize("name, expected", [("ddim", "sd_ddim10"), ("plms", "sd_plms10"), ("dpm_solver", "sd_dpm10")])
def test_golden_end_states_with_guidance(end_states, betas, name, expected):
    network = load_network("sd_split_w8a8_sm16")
    predict = guided(network, end_states["sd_cond"], end_states["sd_uncond"], 7.5)
    sampler = make_sampler(name, end_states["sd_x_T"], steps=10, betas=betas, eta=0.0, noise=None)
    out = run(sampler, predict)
    assert out.dtype == torch.float32
    assert relative(out, end_states[expected]) < 1e-5


def test_golden_end_state_without_conditioning(end_states):
    betas = beta_schedule("linear", 1000, 0.0015, 0.0195)
    sampler = make_sampler("ddim", end_states["ldm_x_T"], steps=10, betas=betas, eta=0.0, noise=None)
    assert relative(run(sampler, load_network("ldm_w4a8")), end_states["ldm_ddim10"]) < 1e-5


# timesteps


@pytest.mark.parametrize(
    "num, steps, expected",
    [
        (1000, 4, [751, 501, 251, 1]),
        (10, 4, [9, 7, 5, 3, 1]),  # one more than asked: 4 does not divide 10
        (1000, 1, [1]),
    ],
)
def test_strided_timesteps(num, steps, expected):
    timesteps = strided_timesteps(steps, num)
    assert timesteps.dtype == torch.int64
    assert timesteps.tolist() == expected


def test_the_published_400_steps_are_500():
    assert strided_timesteps(400, 1000).tolist() == list(range(999, 0, -2))


@pytest.mark.parametrize("steps, advice", [(1000, 500), (300, 250), (9, 8)])
def test_steps_that_lead_past_the_last_timestep_are_refused(steps, advice):
    with pytest.raises(ValueError, match=rf"steps {steps} would start at timestep 1000 .* that fits is {advice}$"):
        strided_timesteps(steps, 1000)
    assert strided_timesteps(advice, 1000)[0] < 1000


def test_every_number_of_steps_is_in_range_or_refused():
    for steps in range(1, 101):
        try:
            timesteps = strided_timesteps(steps, 100)
        except ValueError:
            continue
        assert timesteps[0] < 100 and timesteps[-1] == 1 and len(timesteps) >= steps


# DDIM


def test_ddim_ends_at_the_first_cumulative_alpha(x, alphas):
    timesteps = torch.tensor([800, 400, 1])
    out = x
    for t, alpha_next in zip((800, 400, 1), (alphas[400], alphas[1], alphas[0]), strict=True):
        out = ddim_step(out, GaussianData(alphas)(out, [t]), alphas[t], alpha_next)
    assert relative(run(ddim(x, timesteps, alphas), GaussianData(alphas)), out) < 1e-14


def test_ddim_with_eta_adds_noise_at_every_step_the_last_too(x, generator, alphas):
    draws = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for _ in range(3)]
    out = x
    steps = zip((800, 400, 1), (alphas[400], alphas[1], alphas[0]), draws, strict=True)
    for t, alpha_next, draw in steps:
        sigma = 0.7 * ((1 - alpha_next) / (1 - alphas[t]) * (1 - alphas[t] / alpha_next)).sqrt()
        eps = GaussianData(alphas)(out, [t])
        predicted = (out - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()
        out = alpha_next.sqrt() * predicted + (1 - alpha_next - sigma**2).sqrt() * eps + sigma * draw
    remaining = iter(draws)
    sampler = ddim(x, torch.tensor([800, 400, 1]), alphas, 0.7, lambda: next(remaining))
    assert relative(run(sampler, GaussianData(alphas)), out) < 1e-12
    assert next(remaining, None) is None


# ancestral sampling


def test_ancestral_sampling_draws_from_the_posterior(x, generator):
    betas = beta_schedule("linear", 20, 0.01, 0.3)
    alphas = cumulative_alphas(betas)
    data = GaussianData(alphas, std=30.0)  # predicted latents far outside [-1, 1], which nothing may clip
    draws = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for _ in range(19)]
    out, seen = 20 * x, []
    for t in range(19, -1, -1):
        beta, alpha = betas[t], alphas[t]
        alpha_next = alphas[t - 1] if t else torch.tensor(1.0)
        x0 = (out - (1 - alpha).sqrt() * data(out, [t])) / alpha.sqrt()
        mean = alpha_next.sqrt() * beta / (1 - alpha) * x0 + (1 - beta).sqrt() * (1 - alpha_next) / (1 - alpha) * out
        variance = (1 - alpha_next) / (1 - alpha) * beta
        out = mean + variance.sqrt() * draws[19 - t] if t else mean
    assert x0.abs().max() > 2
    remaining = iter(draws)
    sampled = run(ddpm(20 * x, alphas, lambda: next(remaining)), data, lambda call: seen.append(int(call.t[0])))
    assert relative(sampled, out) < 1e-12
    assert seen == list(range(19, -1, -1)) and next(remaining, None) is None


# PLMS


@pytest.mark.parametrize("degree, exact_from", [(1, 0), (2, 2), (3, 3)])
def test_each_plms_step_integrates_polynomials_of_its_order_exactly(x, degree, exact_from):
    # With y = x / √ᾱ and s = √(1 - ᾱ) / √ᾱ the ODE is dy = ε ds. Here s is linear in t and ε a polynomial in s, so the
    # improved Euler step and Adams–Bashforth of order k are exact for degree 1 and k - 1.
    s = 0.01 + 0.02 * torch.arange(101, dtype=torch.float64)
    alphas = 1 / (1 + s**2)
    calls = []
    timesteps = torch.arange(100, 0, -10)
    out = run(plms(x, timesteps, alphas), lambda x, t: torch.full_like(x, s[t[0]] ** degree), calls.append)
    first_calls = [call for i, call in enumerate(calls) if i != 1]
    states = [*(call.x / alphas[call.t[0]].sqrt() for call in first_calls), out / alphas[0].sqrt()]
    levels = s[[*timesteps.tolist(), 0]]
    integral = (levels[1:] ** (degree + 1) - levels[:-1] ** (degree + 1)) / (degree + 1)
    for step, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        error = (after - before - integral[step]).abs().max()
        assert (error < 1e-13) == (step >= exact_from), step


def test_plms_calls_the_network_twice_in_its_first_step_only(x, alphas):
    calls = []
    run(plms(x, torch.tensor([751, 501, 251, 1]), alphas), GaussianData(alphas), calls.append)
    assert [call.step for call in calls] == [0, 0, 1, 2, 3]
    assert [int(call.t[0]) for call in calls] == [751, 501, 501, 251, 1]
    assert torch.equal(calls[1].x, ddim_step(x, GaussianData(alphas)(x, [751]), alphas[751], alphas[501]))


def test_plms_with_one_step_looks_ahead_to_the_end(x, alphas):
    calls = []
    run(plms(x, torch.tensor([1]), alphas), GaussianData(alphas), calls.append)
    assert [(call.step, int(call.t[0])) for call in calls] == [(0, 1), (0, 0)]


# DPM-Solver++


def test_dpm_solver_with_one_step_is_ddim(x, alphas):
    data = GaussianData(alphas)
    expected = ddim_step(x, data(x, [999]), alphas[999], alphas[0])
    assert relative(run(dpm_solver(x, 1, alphas), data), expected) < 1e-12


@pytest.mark.parametrize("steps, last_order", [(2, 1), (14, 1), (15, 2), (20, 2)])
def test_dpm_solver_follows_algorithm_2(x, smooth_alphas, steps, last_order):
    data = GaussianData(smooth_alphas)
    times = [8400 * (steps - i) // steps for i in range(steps + 1)]
    alpha = [math.sqrt(smooth_alphas[t]) for t in times]
    sigma = [math.sqrt(1 - smooth_alphas[t]) for t in times]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    out, predicted = x, []
    for i in range(steps):
        predicted.append((out - sigma[i] * data(out, [times[i]])) / alpha[i])
        h = lam[i + 1] - lam[i]
        d = predicted[i]
        if 0 < i < steps - 1 or (i == steps - 1 and last_order == 2):
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * predicted[i] - 1 / (2 * r) * predicted[i - 1]
        out = sigma[i + 1] / sigma[i] * out - alpha[i + 1] * math.expm1(-h) * d
    assert relative(run(dpm_solver(x, steps, smooth_alphas), data), out) < 1e-11


# convergence


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm_solver"])
def test_samplers_converge_with_their_order_on_an_exact_solution(x, smooth_alphas, name):
    data = GaussianData(smooth_alphas, std=2.0)  # with 0.5, leading errors of dpm_solver happen to cancel

    def error(steps):
        if name == "dpm_solver":
            sampler = dpm_solver(x, steps, smooth_alphas)
        else:
            timesteps = torch.arange(8400, 0, -8400 // steps)
            sampler = {"ddim": ddim, "plms": plms}[name](x, timesteps, smooth_alphas)
        return relative(run(sampler, data), data.solve(x, 8400, 0))

    order = math.log(error(40) / error(120)) / math.log(3)
    assert order == pytest.approx(1 if name == "ddim" else 2, abs=0.15)
    if name != "ddim":
        assert error(120) < 1e-3


# guidance


class Recorder:
    """A network that keeps what it is called with; ε is x plus the mean of the context."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, *context):
        self.calls.append((x, t, *context))
        return x + sum(c.double().reshape(len(x), -1).mean(1) for c in context).reshape(-1, 1, 1, 1) if context else x


@pytest.mark.parametrize(
    "context, unconditional",
    [
        (torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1).expand(4, 7, 5), torch.full((4, 7, 5), -1.0)),
        (torch.tensor([1, 2, 3, 4]), torch.tensor([-1, -1, -1, -1])),
    ],
    ids=["embeddings", "labels"],
)
def test_guidance_extrapolates_from_the_unconditional_half_which_comes_first(x, context, unconditional):
    network, t = Recorder(), torch.tensor([5, 6, 7, 8])
    eps = guided(network, context, unconditional, 7.5)(x, t)
    step = 7.5 * torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64) - 1
    assert torch.allclose(eps, x + step.reshape(4, 1, 1, 1), rtol=0, atol=1e-12)
    ((seen_x, seen_t, seen_context),) = network.calls
    assert torch.equal(seen_x, torch.cat([x, x])) and torch.equal(seen_t, torch.cat([t, t]))
    assert torch.equal(seen_context, torch.cat([unconditional, context]))
    assert seen_context.dtype == context.dtype


@pytest.mark.parametrize("with_unconditional, scale", [(False, 7.5), (True, 1.0), (True, 1)])
def test_without_guidance_the_network_sees_each_image_once(x, with_unconditional, scale):
    network, t, context = Recorder(), torch.tensor([5, 6, 7, 8]), torch.ones(4, 7, 5)
    eps = guided(network, context, 0 * context if with_unconditional else None, scale)(x, t)
    ((seen_x, seen_t, seen_context),) = network.calls
    assert seen_x is x and seen_t is t and seen_context is context
    assert torch.equal(eps, x + 1)


def test_without_context_none_is_passed(x):
    network = Recorder()
    guided(network, None, None, 1.0)(x, torch.tensor([5, 6, 7, 8]))
    assert len(network.calls[0]) == 2


def test_guidance_is_computed_in_the_precision_of_x():
    def network(x, t, context):
        return context.reshape(-1, 1, 1, 1).to(torch.bfloat16)

    x = torch.zeros(1, 1, 1, 1)
    eps = guided(network, torch.tensor([1.0078125]), torch.tensor([1.0]), 7.5)(x, torch.zeros(1))
    assert eps.dtype == torch.float32 and eps.item() == 1 + 7.5 * 0.0078125  # not a bfloat16 number


# calls and options


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_calls_are_the_timesteps_announced(name, steps, betas):
    x, first_calls = torch.zeros(2, 3, 4, 4), {}
    noise = ImageNoise(0, range(2), (3, 4, 4), "cpu")
    eta = 0.0 if name == "plms" else 0.5
    sampler = make_sampler(name, x, steps=steps, betas=betas, eta=eta, noise=noise)
    run(sampler, lambda x, t: x, lambda call: first_calls.setdefault(call.step, call))
    announced = sampler_timesteps(name, steps=steps, num_timesteps=1000)
    assert list(first_calls) == list(range(len(announced)))
    assert all(call.t.shape == (2,) and call.x.shape == x.shape for call in first_calls.values())
    assert [call.t[1].item() for call in first_calls.values()] == pytest.approx(announced.tolist(), rel=1e-6)
    assert (announced.diff() < 0).all()


def test_the_number_of_steps_does_not_matter_to_ancestral_sampling():
    assert sampler_timesteps("ddpm", steps=50, num_timesteps=1000).tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize(
    "name, changes, match",
    [
        ("generalized", {}, "'generalized'.*ddim, plms, dpm_solver, ddpm"),
        ("ddim", {"steps": 1001}, r"1\.\.1000.*1001"),
        ("plms", {"steps": 0}, r"1\.\.1000.*found 0"),
        ("dpm_solver", {"steps": 0}, r"1\.\.1000.*found 0"),
        ("plms", {"steps": 1000}, "steps 1000 would start at timestep 1000"),
        ("ddim", {"eta": 1.5}, r"eta must lie in \[0, 1\], found 1.5"),
        ("ddim", {"eta": math.nan}, "found nan"),
        ("plms", {"eta": 0.5}, "eta must be 0 for plms.*0.5"),
        ("ddim", {"eta": 0.5}, "source of noise"),
        ("ddpm", {}, "source of noise"),
        ("plms", {"betas": torch.ones(1000)}, "plms needs cumulative alphas strictly between 0 and 1, found 0 to 0"),
    ],
)
def test_impossible_options_are_refused_before_the_first_call(name, changes, match, betas):
    options = {"steps": 10, "betas": betas, "eta": 0.0, "noise": None, **changes}
    with pytest.raises(ValueError, match=match):
        make_sampler(name, torch.zeros(1, 3, 4, 4), **options)

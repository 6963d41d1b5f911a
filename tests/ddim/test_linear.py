"""Samplers as matrices: two real runs differ by what the coefficients make of the difference of their predictions."""

import pytest
import torch
from torch import nn

import ddim.pipeline
import ldm.pipeline
from ddim.linear import LinearPath, linear_path
from ddim.noise import ImageNoise
from ddim.samplers import make_sampler as make_pixel_sampler
from ddim.samplers import run
from ldm.samplers import guided
from ldm.samplers import make_sampler as make_latent_sampler

SHAPE = (2, 3, 3)
BETAS = torch.linspace(1e-4, 0.02, 60, dtype=torch.float64)  # of a process of 60 timesteps
PIPELINES = {
    "ddim": ddim.pipeline.Pipeline(SHAPE, BETAS, steps=12),
    "ddim-eta-1": ddim.pipeline.Pipeline(SHAPE, BETAS, steps=12, eta=1.0),
    "ddim-quad": ddim.pipeline.Pipeline(SHAPE, BETAS, steps=6, skip_type="quad", eta=0.5),
    "pixel-dpm_solver": ddim.pipeline.Pipeline(SHAPE, BETAS, "dpm_solver", steps=11),
    "latent-ddim": ldm.pipeline.Pipeline(SHAPE, BETAS, steps=12),
    "latent-ddim-eta-1": ldm.pipeline.Pipeline(SHAPE, BETAS, steps=12, eta=1.0),
    "plms": ldm.pipeline.Pipeline(SHAPE, BETAS, "plms", steps=12),
    "plms-guided": ldm.pipeline.Pipeline(SHAPE, BETAS, "plms", steps=6, scale=3.0),
    "dpm_solver": ldm.pipeline.Pipeline(SHAPE, BETAS, "dpm_solver", steps=11),
    "dpm_solver-16": ldm.pipeline.Pipeline(SHAPE, BETAS, "dpm_solver", steps=16),  # its last step is of second order
    "ddpm": ldm.pipeline.Pipeline(SHAPE, BETAS, "ddpm", steps=60),
}


class Toy(nn.Module):
    """Predicts something that bends, depends on t and, where there is one, on a context [N, 1, 1]."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(2, 2, dtype=torch.float64, generator=generator))

    def forward(self, x, t, context=None):
        shift = 0 if context is None else context.view(-1, 1, 1, 1)
        return (
            torch.einsum("nchw,cd->ndhw", torch.tanh(x), self.mix) + torch.cos(t.double() / 9).view(-1, 1, 1, 1) + shift
        )


def walked(pipeline, network, indices=(3, 8)):
    """What a run sees: (states [E + 1, N, ...], the last one the result; predictions [E, N, ...]; calls)."""
    calls, predictions = [], []
    noise = ImageNoise(7, indices, SHAPE, torch.device("cpu"), torch.float64)
    x, options = noise(), {"steps": pipeline.steps, "betas": BETAS, "eta": pipeline.eta, "noise": noise}
    if isinstance(pipeline, ddim.pipeline.Pipeline):
        sampler = make_pixel_sampler(pipeline.sampler, x, skip_type=pipeline.skip_type, **options)
    else:
        sampler = make_latent_sampler(pipeline.sampler, x, **options)
        if pipeline.scale != 1:
            context = torch.ones(len(indices), 1, 1, dtype=torch.float64)
            network = guided(network, context, 0 * context, pipeline.scale)

    def predict(x, t):
        predictions.append(network(x, t))
        return predictions[-1]

    with torch.no_grad():
        end = run(sampler, predict, calls.append)
    return torch.stack([*(call.x for call in calls), end]), torch.stack(predictions), calls


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    return PIPELINES[request.param]


def test_errors_of_predictions_reach_every_later_state_by_the_coefficients(pipeline):
    path = pipeline.path()
    (states, eps, _), (other, eps_other, _) = (walked(pipeline, Toy(seed)) for seed in (0, 1))
    found, expected = other - states, torch.tensordot(path.coefficients, eps_other - eps, 1)
    assert torch.equal(found[0], torch.zeros_like(found[0])) and found[1:].flatten(1).norm(dim=1).min() > 1e-3
    for call in range(1, path.calls + 1):
        assert (found[call] - expected[call]).norm() <= 1e-12 * found[call].norm(), call


def test_a_path_is_of_the_calls_that_the_sampler_makes(pipeline):
    path, (_, _, calls) = pipeline.path(), walked(pipeline, Toy(0))
    assert path.calls == len(calls) and path.step == tuple(call.step for call in calls)
    assert path.t.tolist() == [call.t[0].item() for call in calls]
    assert path.coefficients.shape == (path.calls + 1, path.calls) and path.start.shape == (path.calls + 1,)
    assert path.scale == getattr(pipeline, "scale", 1.0)


def test_no_state_depends_on_its_own_prediction_or_on_later_ones(pipeline):
    path = pipeline.path()
    assert path.coefficients.dtype == path.start.dtype == torch.float64
    assert not path.coefficients.triu().any() and path.coefficients.diagonal(-1).all()


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm_solver", "pixel-dpm_solver"])
def test_without_noise_a_run_is_start_and_predictions_alone(name):
    path, (states, eps, _) = PIPELINES[name].path(), walked(PIPELINES[name], Toy(0))
    expected = path.start.view(-1, 1, 1, 1, 1) * states[:1] + torch.tensordot(path.coefficients, eps, 1)
    assert path.start[0] == 1
    torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-12)


def test_ddim_by_hand():
    """x' = sqrt(a'/a) x + (sqrt(1 - a') - sqrt(a'/a (1 - a))) eps (arXiv 2010.02502, eq. 12 with eta 0)."""
    alphas = (1 - BETAS).cumprod(0)
    path = ddim.pipeline.Pipeline(SHAPE, BETAS, steps=2).path()
    first, second = alphas[path.t[0]], alphas[path.t[1]]
    onto_second = (1 - second).sqrt() - (second / first * (1 - first)).sqrt()
    onto_end = -((1 - second) / second).sqrt()
    assert path.coefficients[1, 0].item() == pytest.approx(onto_second.item(), rel=1e-12)
    assert path.coefficients[2].tolist() == pytest.approx([(onto_second / second.sqrt()).item(), onto_end.item()])
    assert path.start.tolist() == pytest.approx([1, (second / first).sqrt().item(), (1 / first).sqrt().item()])


def test_a_sampler_that_clips_has_no_path():
    with pytest.raises(ValueError, match=r"not linear in the predicted noise \(it clips\)"):
        ddim.pipeline.Pipeline(SHAPE, BETAS, "ddpm_noisy", steps=12).path()


def test_a_sampler_that_clips_only_large_predictions_has_no_path_either():
    def clipping(x):
        eps = yield ddim.samplers.Call(0, torch.zeros(len(x), dtype=torch.int64), x)
        return x - eps.clamp(-1e3, 1e3)

    with pytest.raises(ValueError, match="not linear"):
        linear_path(clipping)


# Calls and steps


def test_plms_makes_two_calls_in_step_0():
    path = PIPELINES["plms"].path()
    assert path.calls == 13 and path.step == (0, 0, *range(1, 12))
    assert [path.first_call(step) for step in range(13)] == [0, *range(2, 14)]
    # Both calls of step 0 lead to the first call of step 1, which starts from what they make together.
    assert [path.next_state(call) for call in range(13)] == [2, 2, *range(3, 14)]
    assert path.t[1] == path.t[2]  # the second call looks ahead to step 1
    assert path.coefficients[2, 0] != 0 != path.coefficients[2, 1]


@pytest.mark.parametrize("name", ["ddim", "latent-ddim-eta-1", "dpm_solver"])
def test_with_one_call_a_step_calls_are_steps(name):
    path = PIPELINES[name].path()
    assert path.step == tuple(range(path.calls))
    assert [path.first_call(step) for step in range(path.calls + 1)] == list(range(path.calls + 1))
    assert [path.next_state(call) for call in range(path.calls)] == list(range(1, path.calls + 1))


def test_a_step_of_one_call_after_steps_of_several():
    path = LinearPath((0, 0, 0, 1, 2, 2), torch.zeros(6), torch.ones(7), torch.zeros(7, 6))
    assert [path.first_call(step) for step in range(4)] == [0, 3, 4, 6]
    assert [path.next_state(call) for call in range(6)] == [3, 3, 3, 4, 6, 6]

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddim.noise import ImageNoise
from ddim.samplers import run
from ldm.pipeline import Conditioning, Pipeline
from ldm.samplers import SAMPLERS, make_sampler
from ldm.schedules import beta_schedule

SHAPE = (3, 8, 8)
BETAS = beta_schedule("linear", 60, 0.0015, 0.0195)


class Network(nn.Module):
    """A little of everything that could leak between images or depend on the order of calls: a mixing convolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)
        with torch.no_grad():
            weights = torch.randn(self.conv.weight.shape, generator=torch.Generator().manual_seed(1))
            self.conv.weight.copy_(weights / 5)
            self.conv.bias.fill_(0.1)
        self.contexts = []

    def forward(self, x, t, *context):
        self.contexts.append(context)
        time = (t.double() / 60).reshape(-1, 1, 1, 1)
        shift = sum(c.double().reshape(len(x), -1).mean(1).reshape(-1, 1, 1, 1) for c in context)
        return torch.tanh(self.conv(x) + time + shift)


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def pipeline():
    return Pipeline(SHAPE, BETAS, steps=6, eta=0.5)


def conditioning(indices):
    """What each image is conditioned on follows from its index."""
    context = torch.tensor([0.3 * i for i in indices]).reshape(-1, 1, 1).repeat(1, 4, 5)
    return Conditioning(context, torch.zeros_like(context))


def starts(pipeline, network, *args, **kwargs):
    calls = []
    out = pipeline.sample(network, *args, observe=calls.append, **kwargs)
    return calls[0].x, out


@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_do_not_depend_on_the_batch(network, name):
    pipeline = Pipeline(SHAPE, BETAS, sampler=name, steps=6, eta=0.0 if name == "plms" else 1.0, scale=3.0)
    together = pipeline.sample(network, [4, 0, 7], conditioning([4, 0, 7]))
    apart = [pipeline.sample(network, [i], conditioning([i])) for i in (4, 0, 7)]
    assert together.shape == (3, *SHAPE)
    assert torch.allclose(together, torch.cat(apart), rtol=0, atol=1e-11)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_the_seed_and_the_options_decide(pipeline, network):
    out = pipeline.sample(network, [0])
    assert torch.equal(out, pipeline.sample(network, [0]))
    for change in ({"seed": 43}, {"eta": 0.0}, {"steps": 10}, {"sampler": "dpm_solver"}):
        assert not torch.equal(out, replace(pipeline, **change).sample(network, [0]))


def test_sampling_is_the_sampler_from_the_images_noise(pipeline, network):
    noise = ImageNoise(42, [3, 1], SHAPE, "cpu", torch.float64)
    sampler = make_sampler("ddim", noise(), steps=6, betas=BETAS, eta=0.5, noise=noise)
    with torch.no_grad():
        expected = run(sampler, network)
    out = pipeline.sample(network, [3, 1])
    assert torch.equal(out, expected)
    assert out.dtype == torch.float64 and not out.requires_grad


# starting codes


def test_images_with_one_code_share_the_start_alone(pipeline, network):
    start, out = starts(pipeline, network, [5, 6], codes=[2, 2])
    assert torch.equal(start[0], start[1])
    assert torch.equal(start[0], ImageNoise(42, [2], SHAPE, "cpu", torch.float64)()[0])
    assert (out[0] - out[1]).abs().max() > 0.1  # the later draws are each image's own
    _, out = starts(replace(pipeline, eta=0.0), network, [5, 6], codes=[2, 2])
    assert torch.allclose(out[0], out[1], rtol=0, atol=1e-12)


def test_codes_equal_to_the_indices_change_nothing(pipeline, network):
    assert torch.equal(pipeline.sample(network, [5, 6], codes=[5, 6]), pipeline.sample(network, [5, 6]))


def test_codes_do_not_change_the_later_draws(pipeline, network):
    """With a network of zeros x is linear in its start, so the same draws leave the same remainder."""
    nn.init.zeros_(network.conv.weight)
    remainders = []
    for codes in ([5, 6], [2, 3]):
        start, out = starts(pipeline, network, [5, 6], codes=codes)
        quiet_start, quiet_out = starts(replace(pipeline, eta=0.0), network, [5, 6], codes=codes)
        assert torch.equal(start, quiet_start)
        remainders.append(out - quiet_out)
    assert torch.allclose(*remainders, rtol=0, atol=1e-11)
    assert remainders[0].abs().max() > 0.1


# conditioning


def test_observers_see_single_batches_and_the_network_guided_ones(pipeline, network):
    calls = []
    replace(pipeline, scale=2.0).sample(network, [0, 1], conditioning([0, 1]), observe=calls.append)
    assert {tuple(call.x.shape) for call in calls} == {(2, *SHAPE)}
    assert {tuple(context.shape) for (context,) in network.contexts} == {(4, 4, 5)}
    assert all(context.dtype == torch.float64 for (context,) in network.contexts)  # the network's own


def test_labels_stay_whole_numbers(pipeline, network):
    labels = Conditioning(torch.tensor([1, 2]), torch.tensor([1000, 1000]))
    replace(pipeline, scale=2.0).sample(network, [0, 1], labels)
    assert network.contexts[0][0].tolist() == [1000, 1000, 1, 2]
    assert network.contexts[0][0].dtype == torch.int64


def test_an_unconditional_network_is_given_no_context(pipeline, network):
    pipeline.sample(network, [0])
    assert set(network.contexts) == {()}


def test_conditioning_that_does_not_fit_is_refused(pipeline, network):
    with pytest.raises(ValueError, match=r"shape of the context, \(2, 4, 5\), found \(1, 4, 5\)"):
        Conditioning(torch.zeros(2, 4, 5), torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match="conditioning must be one per image, expected 3, found 2"):
        pipeline.sample(network, [0, 1, 2], conditioning([0, 1]))
    with pytest.raises(ValueError, match="codes must be one per image, expected 2, found 1"):
        pipeline.sample(network, [0, 1], codes=[0])
    assert network.contexts == []


@pytest.mark.parametrize("given", [None, Conditioning(torch.zeros(1, 4, 5))])
def test_guidance_without_an_unconditional_half_is_refused(pipeline, network, given):
    with pytest.raises(ValueError, match="scale 7.5 needs unconditional conditioning"):
        replace(pipeline, scale=7.5).sample(network, [0], given)


# options


def test_description_is_plain_data():
    described = Pipeline(SHAPE, BETAS, sampler="plms", steps=4, scale=7.5, seed=3).describe()
    expected = {"sampler": "plms", "steps": 4, "eta": 0.0, "scale": 7.5, "seed": 3, "timesteps": [46, 31, 16, 1]}
    assert json.loads(json.dumps(described)) == expected


@pytest.mark.parametrize(
    "options, match",
    [
        ({"sampler": "euler"}, "'euler'.*ddim, plms, dpm_solver, ddpm"),
        ({"steps": 0}, r"1\.\.60.*found 0"),
        ({"steps": 61}, r"1\.\.60.*found 61"),
        ({"steps": 60}, "timestep 60"),
        ({"eta": -0.1}, r"\[0, 1\], found -0.1"),
        ({"sampler": "plms", "eta": 0.3}, "eta must be 0 for plms"),
        ({"scale": float("inf")}, "scale must be finite, found inf"),
        ({"seed": -1}, "seed must not be negative, found -1"),
        ({"shape": (8, 8)}, r"\(C, h, w\), found \(8, 8\)"),
        ({"shape": (3, 0, 8)}, r"\(C, h, w\), found \(3, 0, 8\)"),
        ({"betas": torch.zeros(60)}, "strictly between 0 and 1, found 1 to 1"),
    ],
)
def test_impossible_options_are_refused_at_once(options, match):
    with pytest.raises(ValueError, match=match):
        Pipeline(**{"shape": SHAPE, "betas": BETAS, "steps": 6, **options})

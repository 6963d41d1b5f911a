"""Norms and their readers: what a layer is fed is what its norm wrote, through a SiLU where one is named."""

import pytest
import torch
import torch.nn.functional as F


def check(network, feeds, *arguments):
    """Every reader's input equals the norm's output, and no norm or layer is named twice."""
    outputs, inputs = {}, {}
    for feed in feeds:
        hook = network.get_submodule(feed.norm).register_forward_hook
        hook(lambda _, args, out, name=feed.norm: outputs.__setitem__(name, out))
        for name in feed.layers:
            hook = network.get_submodule(name).register_forward_hook
            hook(lambda _, args, out, name=name: inputs.__setitem__(name, args[0]))
    network(*arguments)
    for feed in feeds:
        written = outputs[feed.norm] if feed.activation is None else F.silu(outputs[feed.norm])
        for name in feed.layers:
            assert torch.equal(inputs[name].flatten(2), written.flatten(2)), name
    assert len(outputs) == len(feeds) and len(inputs) == sum(len(feed.layers) for feed in feeds)


def test_pixel_networks(network, adapter):
    feeds = adapter.norm_feeds(network)
    norms = [name for name, m in network.named_modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {feed.norm for feed in feeds} == set(norms)
    check(network, feeds, torch.randn(2, 3, 8, 8), torch.tensor([3, 5]))


@pytest.mark.parametrize("form", ["plain", "transformer", "deep", "labels"])
def test_latent_networks(make_latent, latent_states, latent_adapter, form):
    network, data = make_latent(form), latent_states("transformer" if form == "deep" else form)
    feeds = latent_adapter.norm_feeds(network)
    arguments = [data.x[:2], data.t[:2]] + ([] if data.context is None else [data.context[:2]])
    check(network, feeds, *arguments)
    norms = {name for name, m in network.named_modules() if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))}
    left = norms - {feed.norm for feed in feeds}
    assert bool(left) == (form == "labels")  # scale and shift, and resamplings, stand before their convolutions

"""The moving average of a network's weights: by hand, by name, and borrowed by the network."""

import pytest
import torch
from torch import nn

from ldm.modules.ema import LitEma


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.ModuleDict({"first": nn.Linear(2, 3), "blocks": nn.ModuleList([nn.Linear(3, 1)])})


def fill(network, value):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)


def test_buffers_have_the_published_names(network):
    network.first.bias.requires_grad_(False)
    names = {name: tuple(value.shape) for name, value in LitEma(network).state_dict().items()}
    expected = {"decay": (), "num_updates": (), "firstweight": (3, 2), "blocks0weight": (1, 3), "blocks0bias": (1,)}
    assert names == expected


@pytest.mark.parametrize(
    ("decay", "counts", "expected"),
    [
        # d = min(decay, (1 + n) / (10 + n)) = 2/11, 3/12, 4/13: 9/11, then 9/11 · 1/4 + 3/4 · 2, ...
        (0.9999, True, [9 / 11, 9 / 44 + 1.5, (9 / 44 + 1.5) * 4 / 13 + 3 * 9 / 13]),
        (0.2, True, [9 / 11, 9 / 55 + 1.6, (9 / 55 + 1.6) * 0.2 + 2.4]),
        (0.5, False, [0.5, 1.25, 2.125]),
    ],
    ids=["warm-up", "capped", "constant"],
)
def test_average_by_hand(network, decay, counts, expected):
    """From 0, with the network at 1, 2, 3 after its updates."""
    fill(network, 0.0)
    ema = LitEma(network, decay, use_num_updates=counts)
    for step, value in enumerate(expected, 1):
        fill(network, float(step))
        ema(network)
        assert ema.firstweight.numpy() == pytest.approx(value, rel=1e-6)
    assert ema.num_updates.item() == (3 if counts else -1)


def test_scope_lends_the_average_and_gives_back(network):
    ema = LitEma(network)
    fill(network, 5.0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    identities = [id(parameter) for parameter in network.parameters()]
    with ema.scope(network):
        assert torch.equal(network.first.weight, ema.firstweight) and not torch.equal(
            network.first.weight, before["first.weight"]
        )
    with pytest.raises(RuntimeError, match="inside"), ema.scope(network):
        raise RuntimeError("inside")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [id(parameter) for parameter in network.parameters()] == identities


def test_copy_to_and_restart(network):
    ema = LitEma(network)
    start = ema.firstweight.clone()
    fill(network, 2.0)
    ema(network)
    ema.restart(network)
    assert ema.num_updates == 0 and (ema.firstweight == 2).all()
    ema.firstweight.copy_(start)
    ema.copy_to(network)
    assert torch.equal(network.first.weight, start) and network.first.weight.requires_grad


def test_average_survives_a_state_dict(network):
    ema, other = LitEma(network, 0.9), LitEma(network, 0.5)
    for value in (1.0, 2.0):
        fill(network, value)
        ema(network)
    other.load_state_dict(ema.state_dict())
    fill(network, 3.0)
    ema(network)
    other(network)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in ema.state_dict().items())


def test_what_cannot_be_averaged_is_refused(network):
    with pytest.raises(ValueError, match="EMA decay: expected a number from 0 to 1, found 1.5"):
        LitEma(network, 1.5)
    same = nn.ModuleDict({"a": nn.ModuleDict({"bweight": nn.Linear(1, 1)}), "ab": nn.Linear(1, 1)})
    same["a"].register_parameter("bx", nn.Parameter(torch.zeros(1)))
    same["ab"].register_parameter("x", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="ab.x: its name without dots, abx, is taken"):
        LitEma(same)
    ema = LitEma(network)
    with pytest.raises(ValueError, match="first.weight"):
        ema(nn.Linear(1, 1))

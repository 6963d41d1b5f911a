"""Unit inputs taken from the chain's states equal those of plain forwards."""

from collections import Counter
from contextlib import ExitStack

import pytest
import torch

from qdiff.calibration.frontier import Frontier
from qdiff.spec import ActivationRanges, QuantSpec, RangeSpec, Recipe, StepGroups, WeightRanges

BATCH = 5
GROUPED = Recipe(
    "grouped",
    QuantSpec(4, axis="out_channel"),
    QuantSpec(8, "signed"),
    split_shortcuts=True,
    step_groups=StepGroups(3),
    stages=(WeightRanges(RangeSpec()), ActivationRanges()),
)


@pytest.fixture(params=["float", "quantized"])
def any_network(request, make_network, quantized):
    """ch 64, so that a wrong timestep would show."""
    return make_network(64) if request.param == "float" else quantized(GROUPED, ch=64)


def captured(network, data):
    """{segment: (arguments, output)} over all samples, by hooks in plain forwards of BATCH samples each."""
    calls = {segment.name: [] for segment in network.chain()}
    with ExitStack() as stack, torch.no_grad():
        for segment in network.chain():
            note = calls[segment.name]
            handle = segment.module.register_forward_hook(lambda _, args, out, note=note: note.append((args, out)))
            stack.callback(handle.remove)
        for x, t in zip(data.x.split(BATCH), data.t.split(BATCH), strict=True):
            network(x, t)
    return {
        name: (tuple(torch.cat(column) for column in zip(*(args for args, _ in made), strict=True)),
               torch.cat([out for _, out in made]))
        for name, made in calls.items()
    }  # fmt: skip


def assert_segment(frontier, name, expected):
    args, output = expected[name]
    found = frontier.inputs(name)
    assert len(found) == len(args)
    assert all(torch.equal(a, b) for a, b in zip(found, args, strict=True)), name
    assert torch.equal(frontier.outputs(name), output), name


def test_inputs_and_outputs_of_every_segment_are_those_of_a_plain_forward(any_network, adapter, states):
    expected = captured(any_network, states)
    frontier = Frontier(any_network, adapter, states, BATCH)
    assert len(expected) > 15
    for name in expected:
        assert_segment(frontier, name, expected)


def test_it_can_be_asked_for_segments_in_any_order(any_network, adapter, states):
    expected = captured(any_network, states)
    frontier = Frontier(any_network, adapter, states, BATCH)
    for name in ("up.1.block.1", "temb.dense.0", "mid.attn_1", "mid.attn_1", "conv_in", "conv_out"):
        assert_segment(frontier, name, expected)


def test_batches_carry_their_timesteps(network, adapter, states):
    frontier = Frontier(network, adapter, states, 8)
    batches = list(frontier.batches(frontier.seek("mid.block_1")))
    assert [len(t) for _, t in batches] == [8, 8, 4]
    assert torch.equal(torch.cat([t for _, t in batches]), states.t)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_size_of_batches_does_not_matter(make_network, adapter, states, batch_size):
    network = make_network(64).double()
    expected = captured(network, states.subset(torch.arange(20)))["up.0.block.0"]
    frontier = Frontier(network, adapter, states, batch_size)
    for mine, theirs in zip(frontier.inputs("up.0.block.0"), expected[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_in_execution_order_every_segment_runs_once_for_its_output_and_once_to_go_on(network, adapter, states):
    frontier, runs = Frontier(network, adapter, states, 20), Counter()
    for segment in network.chain():
        segment.module.register_forward_hook(lambda *_, name=segment.name: runs.update([name]))
    names = [segment.name for segment in network.chain()]
    for name in names:
        frontier.inputs(name)
        frontier.outputs(name)
    assert runs == Counter(dict.fromkeys(names[:-1], 2)) + Counter({names[-1]: 1})


def test_a_unit_changed_before_the_next_is_asked_for_shows_in_its_inputs(network, adapter, states):
    """This is how a calibrated prefix reaches the units behind it."""
    frontier = Frontier(network, adapter, states, BATCH)
    frontier.outputs("conv_in")
    network.conv_in.weight.mul_(0.5)
    assert_segment(frontier, "down.0.block.0", captured(network, states))


def test_states_take_the_networks_precision(network, adapter, states):
    frontier = Frontier(network.double(), adapter, states, BATCH)
    assert {a.dtype for a in frontier.inputs("mid.block_1")} == {torch.float64}


def test_no_gradients_are_kept(make_network, adapter, states):
    network = make_network(32).requires_grad_(True)
    frontier = Frontier(network, adapter, states, BATCH)
    assert not any(a.requires_grad for a in frontier.inputs("mid.block_1"))
    assert not frontier.outputs("mid.block_1").requires_grad

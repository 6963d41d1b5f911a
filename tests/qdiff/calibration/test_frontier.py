"""Unit inputs taken from the chain's states equal those of plain forwards."""

import gc
from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.context import RUN_BATCH
from qdiff.calibration.frontier import BaselineFrontier, Frontier
from qdiff.calibration.store import Column, MemoryLimits, Store, map_leaves
from qdiff.methods import MethodOptions, make_recipe
from qdiff.recipes.recipe import QuantSpec, Recipe, StepGroups
from qdiff.recipes.stages import ActivationRanges, CorrectBias, RangeSpec, Reconstruct, WeightRanges

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
    """ch 64, so that a wrong timestep would show; in float64, see `assert_same`."""
    return (make_network(64) if request.param == "float" else quantized(GROUPED, ch=64)).double()


def captured(network, data):
    """{segment: (arguments, output)} over all samples, by hooks in plain forwards of BATCH samples each."""
    calls = {segment.name: [] for segment in network.chain()}
    with ExitStack() as stack, torch.no_grad():
        for segment in network.chain():
            note = calls[segment.name]
            handle = segment.module.register_forward_hook(lambda _, args, out, note=note: note.append((args, out)))
            stack.callback(handle.remove)
        for batch in data.to(next(network.parameters())).batches(BATCH):
            network(batch.x, batch.t, *([] if batch.context is None else [batch.context]))
    return {
        name: (tuple(torch.cat(column) for column in zip(*(args for args, _ in made), strict=True)),
               torch.cat([out for _, out in made]))
        for name, made in calls.items()
    }  # fmt: skip


def assert_same(found, expected, name):
    """Equal but for the order of sums: how a convolution adds up depends on where its input lies in memory, which is
    otherwise here than in a plain forward. In float64, where no such difference moves a value over a rounding border.
    """
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}: {text}")


def assert_segment(frontier, name, expected):
    args, output = expected[name]
    assert_same(frontier.inputs(name), args, name)
    assert_same(frontier.outputs(name), output, name)


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
    frontier = Frontier(network.double(), adapter, states, BATCH)
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


# Latent networks: their states carry conditioning

FORMS = ["plain", "transformer", "deep", "labels"]


@pytest.mark.parametrize("kind", ["float", "quantized"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.cases("plain-float", "deep-float", "transformer-quantized", "labels-quantized")
def test_conditioning_reaches_the_segments_as_in_a_plain_forward(
    make_latent, quantized_latent, latent_adapter, latent_states, form, kind
):
    """With parameter sets per step in the quantized network, so that a wrong timestep would show too."""
    network = (make_latent(form) if kind == "float" else quantized_latent(GROUPED, form)).double()
    data = latent_states(form)
    expected = captured(network, data)
    frontier = Frontier(network, latent_adapter, data, BATCH)
    for segment in latent_adapter.chain(network):
        assert_segment(frontier, segment.name, expected)
    crossing = [name for name, (args, _) in expected.items() if "transformer_blocks" in name and len(args) == 2]
    assert len(crossing) == {"transformer": 4, "deep": 12}.get(form, 0)
    assert all(torch.equal(expected[name][0][1], data.context.double()) for name in crossing)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("form", ["transformer", "labels"])
@pytest.mark.cases("transformer-7", "labels-1")
def test_the_size_of_batches_does_not_matter_with_conditioning(
    make_latent, latent_adapter, latent_states, form, batch_size
):
    network, data = make_latent(form).double(), latent_states(form)
    plain, other = (Frontier(network, latent_adapter, data, size) for size in (BATCH, batch_size))
    for name in ("time_embed.2", "middle_block.1", "output_blocks.1.0", "out.2"):
        name = f"{name}.transformer_blocks.0" if (form, name) == ("transformer", "middle_block.1") else name
        for mine, theirs in zip(other.inputs(name), plain.inputs(name), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.outputs(name), plain.outputs(name), rtol=1e-12, atol=1e-12)


def test_embeddings_take_the_networks_precision_and_labels_stay_whole(make_latent, latent_adapter, latent_states):
    frontier = Frontier(make_latent("transformer").double(), latent_adapter, latent_states("transformer"), BATCH)
    assert {a.dtype for a in frontier.inputs("middle_block.1.transformer_blocks.0")} == {torch.float64}
    data = latent_states("labels")
    batches = list(data.to(torch.zeros((), dtype=torch.float64)).batches(8))
    assert torch.equal(torch.cat([b.context for b in batches]), data.context)
    assert {b.context.dtype for b in batches} == {torch.int64} and {b.x.dtype for b in batches} == {torch.float64}


# Memory limits and laziness


def small_limit(network, adapter, data):
    """Bytes that hold the first states and a few more: a part of what the whole chain keeps."""
    frontier = Frontier(network, adapter, data, BATCH)
    return 2 * frontier.store.used["host"]


def assert_limits_change_nothing(network, adapter, data, tmp_path):
    tiny = small_limit(network, adapter, data)
    plain = Frontier(network, adapter, data, BATCH)
    others = {
        host: Frontier(network, adapter, data, BATCH, Store(torch.device("cpu"), MemoryLimits(host=host), tmp_path))
        for host in (0, tiny)
    }
    for segment in adapter.chain(network):
        inputs, outputs = plain.inputs(segment.name), plain.outputs(segment.name)
        kept = plain.cached_outputs(segment.name)[slice(0, len(data))]
        assert torch.equal(kept, outputs)
        for frontier in others.values():
            assert all(torch.equal(a, b) for a, b in zip(frontier.inputs(segment.name), inputs, strict=True))
            assert torch.equal(frontier.outputs(segment.name), outputs)
    assert plain.store.peak["disk"] == 0 and plain.store.peak["host"] > 2 * tiny
    assert others[0].store.peak["host"] == 0 < others[0].store.peak["disk"]
    assert 0 < others[tiny].store.peak["host"] <= tiny < others[tiny].store.peak["disk"]
    assert list(tmp_path.iterdir()) == []


def test_memory_limits_change_no_bit(any_network, adapter, states, tmp_path):
    assert_limits_change_nothing(any_network, adapter, states, tmp_path)


@pytest.mark.parametrize("form", ["transformer", "labels"])
@pytest.mark.cases("transformer")
def test_memory_limits_change_no_bit_of_latent_networks(
    quantized_latent, latent_adapter, latent_states, form, tmp_path
):
    network = quantized_latent(GROUPED, form)
    assert_limits_change_nothing(network, latent_adapter, latent_states(form), tmp_path)


def test_outputs_that_were_kept_are_the_next_states(make_latent, latent_adapter, latent_states):
    """Bit for bit those of running the module again, and without a second copy of them."""
    network, data = make_latent("transformer"), latent_states("transformer")
    keeping, running = (Frontier(network, latent_adapter, data, BATCH) for _ in range(2))
    for segment in latent_adapter.chain(network):
        expected = running.inputs(segment.name)
        assert all(torch.equal(a, b) for a, b in zip(keeping.inputs(segment.name), expected, strict=True))
        keeping.cached_outputs(segment.name)
    last = segment.name
    assert torch.equal(keeping.outputs(last), running.outputs(last))
    assert keeping.store.peak["host"] <= running.store.peak["host"]


@pytest.fixture
def column_reads(monkeypatch):
    """A list that fills with the columns that rows are read from."""
    reads, read = [], Column.__getitem__
    monkeypatch.setattr(Column, "__getitem__", lambda self, rows: (reads.append(self), read(self, rows))[1])
    return reads


def test_what_a_segment_does_not_use_is_not_read(network, adapter, states, column_reads):
    """Of all skips only the newest, and that only where it joins; an attention does not look at the time embedding."""
    expected = {"conv_in": 1, "down.1.block.0": 2, "mid.attn_1": 1, "up.1.block.0": 3, "up.1.upsample": 1}
    for name, count in expected.items():
        frontier = Frontier(network, adapter, states, BATCH)
        segment = frontier.seek(name)
        column_reads.clear()
        frontier.arguments(segment, torch.tensor([0, 7, 3]))
        assert len(column_reads) == len(set(map(id, column_reads))) == count, name
        column_reads.clear()
        frontier._advance()
        assert len(column_reads) == count * len(frontier.slices), name


@pytest.fixture
def without_collections():
    """Nothing is freed but by the last reference to it."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("form", ["transformer", "labels"])
def test_only_the_states_are_held(make_latent, latent_adapter, latent_states, without_collections, form):
    """Each tensor once, skips that have been used not at all, and all of it freed at once."""
    network, data = make_latent(form), latent_states(form)
    frontier = Frontier(network, latent_adapter, data, BATCH)
    state = latent_adapter.start(network, data.x, data.t, data.context)
    for segment in latent_adapter.chain(network):
        held: dict[int, torch.Tensor] = {}
        map_leaves(state, lambda leaf, held=held: held.update({id(leaf): leaf}))
        frontier.seek(segment.name)
        frontier.cached_outputs(segment.name)
        with torch.no_grad():
            state = segment(state)
            output = segment.module(*frontier.inputs(segment.name))
        assert frontier.store.used["host"] == output.nbytes + sum(leaf.nbytes for leaf in held.values())
        del held
    store = frontier.store
    del frontier
    assert store.used == {"device": 0, "host": 0, "disk": 0}


# Calls


def segment_calls(network, adapter, run):
    """(what `run` returns, calls of each of the network's segments meanwhile)."""
    names, calls = {s.module: s.name for s in adapter.chain(network)}, Counter()
    handle = register_module_forward_hook(lambda m, args, out: calls.update([names[m]] if m in names else []))
    with handle:
        return run(), calls


@pytest.mark.parametrize(
    ("method", "compat"),
    [("quick", ()), ("q-diffusion", ()), ("q-diffusion", ("definition_order",))],
    ids=["quick", "q-diffusion", "q-diffusion-in-order-of-definition"],
)
@pytest.mark.cases("q-diffusion", "q-diffusion-in-order-of-definition")
def test_a_stage_runs_the_float_network_once_over_the_samples(make_network, adapter, states, timesteps, method, compat):
    """In the order of definition it starts again where the network runs up.1 before up.0."""
    ranges = {"weight_range": "minmax", "act_range": "minmax"}
    options = MethodOptions(4, 8, iterations=1, act_iterations=1, batch_size=4, compat=compat, **ranges)
    network, recipe = make_network(32), make_recipe(method, options)
    _, calls = segment_calls(network, adapter, lambda: calibrate(network, adapter, recipe, states, 0, timesteps))
    batches, learned = -(-len(states) // RUN_BATCH), sum(isinstance(s, Reconstruct) for s in recipe.stages)
    corrected = sum(isinstance(s, CorrectBias) for s in recipe.stages)
    assert learned + corrected == 2
    names = [segment.name for segment in network.chain()]
    assert set(calls) == set(names)
    once = (learned + corrected) * batches
    assert calls["conv_out"] == once and all(calls[name] >= once for name in names)
    repeated = {name for name in names if calls[name] != once}
    assert repeated == (set(names[:-1]) if compat else set())
    assert all(calls[name] <= once + 3 * learned * batches for name in names)


def test_a_run_of_the_whole_prefix_for_every_segment_is_ten_times_the_work(network, adapter, states):
    names = [segment.name for segment in network.chain()]
    made = {}
    for kind in (Frontier, BaselineFrontier):
        frontier = kind(network, adapter, states, BATCH)
        _, calls = segment_calls(network, adapter, lambda f=frontier: [f.cached_outputs(name) for name in names])
        assert frontier.calls == calls.total()
        made[kind] = calls
    assert made[Frontier] == Counter(dict.fromkeys(names, 4))
    assert made[BaselineFrontier] == Counter({name: 4 * (len(names) - i) for i, name in enumerate(names)})


def test_the_plain_frontier_has_the_same_states(make_latent, latent_adapter, latent_states):
    network, data = make_latent("transformer"), latent_states("transformer")
    frontier, plain = (kind(network, latent_adapter, data, BATCH) for kind in (Frontier, BaselineFrontier))
    for segment in latent_adapter.chain(network):
        pairs = zip(frontier.inputs(segment.name), plain.inputs(segment.name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        columns = (f.cached_outputs(segment.name)[slice(0, 20)] for f in (frontier, plain))
        assert torch.equal(*columns)

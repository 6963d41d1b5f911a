"""Kernels or plain 16-bit layers, by injected times; nothing runs on kernels here."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from qdiff.deploy.convert import integer_network
from qdiff.deploy.kernels import choose as choosing
from qdiff.deploy.kernels.choose import FastestKernels
from qdiff.deploy.kernels.convert import to_kernels
from qdiff.deploy.kernels.layers import KernelAttention, KernelLayer, KernelNorm
from qdiff.deploy.layers import IntegerAttention, IntegerLayer
from qdiff.recipes.recipe import QuantSpec, Recipe
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

STAGES = (WeightRanges(RangeSpec()), ActivationRanges())
W8A8 = Recipe("w8a8", QuantSpec(8, axis="out_channel"), QuantSpec(8), split_shortcuts=True, stages=STAGES)


pytestmark = pytest.mark.usefixtures("own_cache")


def choose(*arguments):
    """With nothing known before."""
    return choosing.choose(*arguments, NothingKnown())


class NothingKnown:
    def of(self, what, measure):
        return measure(), False


@pytest.fixture
def integer(quantized):
    return integer_network(quantized(W8A8))


@pytest.fixture
def batch(generator):
    return torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([950, 50])


def alternating(integer_ms, float_ms):
    """A timer that runs nothing: kernels are timed first, plain layers second."""
    times = iter((integer_ms, float_ms) * 1000)
    return lambda run: next(times)


def quantized_modules(network):
    return {name for name, m in network.named_modules() if isinstance(m, (IntegerLayer, IntegerAttention))}


@pytest.mark.parametrize("times, expected", [((1.0, 2.0), "integer"), ((2.0, 1.0), "float")], ids=["faster", "slower"])
def test_every_layer_gets_the_faster_form(integer, adapter, batch, times, expected):
    before, state = quantized_modules(integer), {k: v.clone() for k, v in integer.state_dict().items()}
    table = choose(integer, adapter, batch, torch.float16, alternating(*times))
    names = [name for choice in table for name in choice.names]
    assert sorted(names) == sorted(before) and len(table) < len(before)
    assert {choice.chosen for choice in table} == {expected}
    assert quantized_modules(integer) == before and integer.step_table.index is None
    assert all(torch.equal(v, state[k]) for k, v in integer.state_dict().items())
    network = to_kernels(integer, adapter, torch.float32, dict.fromkeys(names, expected))
    kernels = [m for m in network.modules() if isinstance(m, (KernelLayer, KernelNorm, KernelAttention))]
    assert bool(kernels) == (expected == "integer")


def test_readers_of_one_norm_are_decided_together(integer, adapter, batch):
    table = choose(integer, adapter, batch, torch.float16, alternating(1.0, 2.0))
    together = [choice for choice in table if "mid.attn_1.q" in choice.names]
    assert len(together) == 1 and {"mid.attn_1.k", "mid.attn_1.v"} <= set(together[0].names)
    assert together[0].integer_ms == 3.0 and together[0].float_ms == 6.0


def test_the_shapes_that_are_timed_are_those_of_the_network(integer, adapter, batch):
    expected = {}
    for name in quantized_modules(integer):
        hook = integer.get_submodule(name).register_forward_hook
        hook(lambda _, args, out, name=name: expected.__setitem__(name, tuple(tuple(x.shape) for x in args)))
    integer(*batch)
    assert choosing._shapes_of(integer, batch) == expected


def test_the_choice_is_made_at_the_first_call_and_reported(integer, adapter, batch):
    lines = []
    network = FastestKernels(integer, adapter, lines.append, torch.float32, alternating(2.0, 1.0), None)
    first = network(*batch)
    assert first.shape == batch[0].shape and lines and all("taking float" in line for line in lines[:-1])
    assert lines[-1] == "runtime auto: chosen layers 2.00 ms, 16-bit eager 1.00 ms for 2 samples; taking 16-bit eager"
    made = len(lines)
    assert torch.equal(network(*batch), first) and len(lines) == made


def test_what_was_measured_before_is_not_measured_again(integer, adapter, batch):
    said = [], []
    timers = alternating(2.0, 1.0), lambda run: pytest.fail("measured again")
    outs = [
        FastestKernels(integer, adapter, lines.append, torch.float32, timer, None)(*batch)
        for lines, timer in zip(said, timers, strict=True)
    ]
    assert torch.equal(*outs)
    assert said[1][:-1] == said[0][:-1]
    assert said[1][-1] == said[0][-1].replace("for 2 samples", "for 2 samples, measured before")


@pytest.fixture
def timed_layers(integer, adapter, batch):
    """How often the timer is asked before whole networks are timed."""
    asked = []
    choose(integer, adapter, batch, torch.float32, lambda run: asked.append(run) or 1.0)
    return len(asked)


def test_a_compiled_network_that_is_faster_runs(integer, adapter, batch, timed_layers):
    """Whole networks are timed after the layers: chosen, plain, compiled."""
    lines, times = [], iter([1.0] * timed_layers + [3.0, 2.0, 1.5])

    def compiled(plain):
        return lambda *arguments: plain(*arguments) + 1

    network = FastestKernels(integer, adapter, lines.append, torch.float32, lambda run: next(times), compiled)
    out = network(*batch)
    assert lines[-1].endswith("taking 16-bit compiled") and float(out.mean()) > 0.5


def test_a_compiler_that_fails_is_named_and_left_out(integer, adapter, batch, timed_layers):
    def broken(plain):
        def run(*arguments):
            raise RuntimeError("no compiler\nmore")

        return run

    lines, times = [], iter([1.0] * timed_layers + [3.0, 2.0, None])

    def timer(run):
        found = next(times)
        return run() if found is None else found

    FastestKernels(integer, adapter, lines.append, torch.float32, timer, broken)(*batch)
    assert "runtime auto: 16-bit compiled: does not run here: no compiler" in lines


def test_without_triton_there_is_one_clear_line(integer, adapter, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="need Triton, found none"):
        to_kernels(integer, adapter)


def test_no_float_activations_no_difference(quantized, adapter, batch):
    """Chosen to be plain throughout, a network computes what its weight-only form does."""
    weights_only = replace(W8A8, activations=None, stages=STAGES[:1])
    simulated = quantized(weights_only)
    integer = integer_network(simulated)
    names = dict.fromkeys(quantized_modules(integer), "float")
    found = to_kernels(integer, adapter, torch.float32, names)(*batch)
    assert float((found - simulated(*batch)).norm() / found.norm()) < 1e-5

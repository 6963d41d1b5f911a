"""One switch: what each runtime gives, and what is refused."""

import copy
import re

import pytest
import torch

import qdiff
from qdiff.checkpoints.native import save_checkpoint
from qdiff.deploy import runtime
from qdiff.deploy.layers import IntegerLayer
from qdiff.deploy.runtime import FastestAtFirstCall, load, prepare
from qdiff.nn.layers import QuantLayer
from qdiff.recipes.recipe import QuantSpec, Recipe
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

W8A8 = Recipe(
    "w8a8", QuantSpec(8, axis="out_channel"), QuantSpec(8), stages=(WeightRanges(RangeSpec()), ActivationRanges())
)


@pytest.fixture
def saved(quantized, adapter, timesteps, tmp_path):
    """(network, path of its file)"""
    network, path = quantized(W8A8, 64), tmp_path / "network.safetensors"
    save_checkpoint(path, network, adapter, W8A8, timesteps, {})
    return network, path


@pytest.fixture
def batch(generator):
    return torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([950, 50])


def has(network, kind):
    return any(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize("name", runtime.RUNTIMES)
def test_every_runtime_is_the_same_model(name, saved, batch):
    network, path = saved
    simulated = network(*batch)
    found = qdiff.load(path, runtime=name)
    out = found(*batch)
    assert out.dtype == torch.float32 and (out - simulated).norm() < 0.05 * simulated.norm()
    assert next(found.parameters()).dtype == torch.float32 and found.step_table.count == 1
    if name in ("integer", "onnx"):
        assert not has(found, QuantLayer)


def test_simulation_is_what_was_calibrated(saved, adapter, batch):
    network, path = saved
    assert torch.equal(load(path)(*batch), network(*batch))
    assert prepare(network, adapter) is network
    assert has(prepare(network, adapter, "integer"), IntegerLayer)


def test_auto_takes_the_fastest_and_says_what_it_measured(saved, monkeypatch, batch, adapter, own_cache):
    said, calls = [], []
    times = iter([30.0, 10.0])

    def timed(run):
        calls.append(run())
        return next(times)

    monkeypatch.setattr(runtime, "median_ms", timed)
    network = prepare(saved[0], adapter, "auto", report=said.append)
    assert isinstance(network, FastestAtFirstCall) and not said
    out = network(*batch)
    assert said == ["runtime auto: simulate 30.00 ms, onnx 10.00 ms for 2 samples; taking onnx"]
    assert torch.equal(out, calls[1]) and torch.equal(network(*batch), out) and len(said) == 1


def test_auto_decides_once_on_a_machine(saved, monkeypatch, batch, adapter, own_cache):
    """A measurement that would come out otherwise a minute later changes no images."""
    said, times = [], iter([10.0, 10.5])
    monkeypatch.setattr(runtime, "median_ms", lambda run: next(times))
    for _ in range(2):
        assert torch.equal(prepare(saved[0], adapter, "auto", report=said.append)(*batch), saved[0](*batch))
    line = "runtime auto: simulate 10.00 ms, onnx 10.50 ms for 2 samples"
    assert said == [f"{line}; taking simulate", f"{line}, measured before; taking simulate"]
    times = iter([3.0, 4.0, 9.0, 8.0])
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_onnx_runtime_version", lambda: "another")
        prepare(saved[0], adapter, "auto", report=said.append)(*batch)
    assert said[-1] == "runtime auto: simulate 3.00 ms, onnx 4.00 ms for 2 samples; taking simulate"
    fewer = tuple(x[:1] for x in batch)
    prepare(saved[0], adapter, "auto", report=said.append)(*fewer)
    assert said[-1] == "runtime auto: simulate 9.00 ms, onnx 8.00 ms for 1 samples; taking onnx"


def test_auto_refuses_a_candidate_that_gives_other_numbers(saved, monkeypatch, batch, adapter, own_cache):
    """However fast it is; the answer is kept for these weights, and others are compared anew."""
    said, wrong = [], [0.05]
    monkeypatch.setattr(runtime, "median_ms", lambda run: 1.0 + len(said))
    real = runtime.OnnxAtFirstCall.forward

    def off(self, *arguments):
        out = real(self, *arguments)
        return out * (1 + wrong[0])

    monkeypatch.setattr(runtime.OnnxAtFirstCall, "forward", off)
    monkeypatch.setattr("qdiff.deploy.agreement.NOISE_SHARE", 0.0)  # a tiny network's noise can be as large
    for _ in range(2):
        assert torch.equal(prepare(saved[0], adapter, "auto", report=said.append)(*batch), saved[0](*batch))
        wrong[0] = 0.0
    refusal = r"runtime auto: onnx is refused: its answer to the first batch differs from that of simulate by \d\.\d%"
    assert [bool(re.match(refusal + ", expected at most 1.0%$", line)) for line in said] == [True, False] * 2
    assert [line.split("; ")[-1] for line in said if "taking" in line] == ["taking simulate"] * 2
    other = copy.deepcopy(saved[0])
    with torch.no_grad():
        next(p for p in other.parameters() if p.dim() == 1).mul_(1.01)
    monkeypatch.setattr("qdiff.deploy.agreement.LEAST_LIMIT", 1.0)
    prepare(other, adapter, "auto", report=said.append)(*batch)
    assert "refused" not in said[-1] and "onnx" in said[-1]


def test_auto_without_the_extra(saved, monkeypatch, adapter, batch, own_cache):
    monkeypatch.setattr(runtime, "has_onnx_runtime", lambda: False)
    network = prepare(saved[0], adapter, "auto")
    assert torch.equal(network(*batch), saved[0](*batch))
    assert has(prepare(saved[0], adapter, "auto", prefer="memory"), IntegerLayer)
    with pytest.raises(ValueError, match=r"runtime onnx: needs ONNX Runtime, found none: pip install '.\[onnx\]'"):
        load(saved[1], "onnx")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"runtime": "fast"}, "runtime: expected one of simulate, integer, onnx, auto, found 'fast'"),
        ({"prefer": "size"}, "prefer: expected one of speed, memory, found 'size'"),
        ({"runtime": "onnx", "device": "meta"}, "runtime onnx: runs on the CPU, found meta"),
    ],
)
def test_what_is_refused(saved, adapter, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        prepare(saved[0], adapter, **options)


def test_a_network_loaded_without_float_weights_cannot_be_simulated(saved, adapter):
    with pytest.raises(ValueError, match="runtime simulate: needs the float weights"):
        prepare(load(saved[1], "integer"), adapter)

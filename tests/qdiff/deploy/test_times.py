"""Times are measured once for a network of some sizes on a device, and again for any other."""

import json

import pytest
import torch

from qdiff.deploy import times as timing
from qdiff.deploy.convert import integer_network
from qdiff.deploy.times import RuntimeTimings, signature, sizes_of
from qdiff.recipes.recipe import QuantSpec, Recipe
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

CPU = torch.device("cpu")


def recipe(weight_bits, activation_bits):
    stages = (WeightRanges(RangeSpec()), ActivationRanges())
    return Recipe("plain", QuantSpec(weight_bits, axis="out_channel"), QuantSpec(activation_bits), stages=stages)


def test_measured_once(own_cache):
    asked = []

    def measure():
        asked.append(1)
        return {"simulate": 3.0, "onnx": 1.0}

    assert RuntimeTimings(CPU).of("a network", measure) == ({"simulate": 3.0, "onnx": 1.0}, False)
    assert RuntimeTimings(CPU).of("a network", measure) == ({"simulate": 3.0, "onnx": 1.0}, True) and len(asked) == 1
    assert RuntimeTimings(CPU).of("another", measure)[1] is False and len(asked) == 2
    (first, _) = json.loads((own_cache / "runtimes.json").read_text())
    assert f"torch {torch.__version__}" in first and "threads" in first


@pytest.mark.parametrize("changed", ["device_name", "_sources_version"])
def test_another_device_or_version_is_measured_anew(own_cache, monkeypatch, changed):
    RuntimeTimings(CPU).of("a network", lambda: {"onnx": 1.0})
    monkeypatch.setattr(timing, changed, lambda *_: "another")
    assert RuntimeTimings(CPU).of("a network", lambda: {"onnx": 2.0}) == ({"onnx": 2.0}, False)


def test_networks_of_one_signature(quantized):
    one, other = quantized(recipe(8, 8)), quantized(recipe(8, 8))
    with torch.no_grad():
        next(other.parameters()).add_(1.0)  # values do not matter
    assert signature(one) == signature(other)
    others = [quantized(recipe(4, 8)), quantized(recipe(8, 4)), quantized(recipe(8, 8), 64)]
    integers = [integer_network(one), integer_network(one, "float")]
    assert len({signature(network) for network in (one, *others, *integers)}) == 6


def test_sizes_in_words():
    assert sizes_of((torch.zeros(2, 3, 8, 8), torch.zeros(2))) == "2x3x8x8 2"

"""Temporary modes: on within their block, and what was there before afterwards, also on error."""

import pytest
import torch
from torch import nn

from qdiff.calibration.batch_noise import BatchNoise
from qdiff.calibration.hooks import (
    dropping,
    observing,
    recording_calls,
    recording_inputs,
    recording_outputs,
    training_mode,
)
from qdiff.nn.grid import Grid
from qdiff.nn.quantizers import ActQuantizer
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import QuantSpec, StepGroups


class Stop(Exception):
    """Leaves a block early."""


@pytest.fixture
def module():
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Dropout(0.5)))


@pytest.fixture
def quantizer():
    quantizer = ActQuantizer(QuantSpec(8, "signed"), StepTable(10, StepGroups()))
    quantizer.set_grid(Grid(torch.tensor(0.5), torch.tensor(0.0), quantizer.spec))
    return quantizer


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_each_module_gets_its_own_mode_back(module, mode):
    module.eval()
    module[1].train()
    former = [m.training for m in module.modules()]
    with pytest.raises(Stop), training_mode(module, mode):
        assert {m.training for m in module.modules()} == {mode}
        raise Stop
    assert [m.training for m in module.modules()] == former
    assert set(former) == {True, False}


def test_inputs_calls_and_outputs_are_recorded_within_their_block_only(module, generator):
    module.eval()
    x, inputs = torch.randn(2, 3, generator=generator), []
    linear, relu = module[0], module[1][0]
    with (
        pytest.raises(Stop),
        recording_inputs(relu, inputs.append),
        recording_calls([relu, linear]) as called,
        recording_outputs([relu, linear]) as outputs,
    ):
        module(x)
        raise Stop
    module(x)
    assert called == [linear, relu]  # in the order of their calls
    assert len(inputs) == 1 and torch.equal(inputs[0], linear(x))
    assert len(outputs) == 2 and torch.equal(outputs[0], linear(x)) and torch.equal(outputs[1], linear(x).relu())


def test_quantizers_are_observed_within_the_block_only(quantizer):
    seen = []
    with pytest.raises(Stop), observing([quantizer], lambda q, x: seen.append(x)):
        quantizer(torch.ones(1))
        raise Stop
    quantizer(torch.ones(1))
    assert len(seen) == 1


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_each_element_stays_float_with_the_given_probability(quantizer, probability, generator):
    x = torch.full((100, 100), 0.3)  # on the grid it is 0.5
    with dropping([quantizer], probability, BatchNoise(generator)):
        dropped = quantizer(x)
    assert set(dropped.unique().tolist()) <= set(torch.tensor([0.3, 0.5]).tolist())
    assert (dropped == x).float().mean().item() == pytest.approx(probability, abs=0.02)
    assert (quantizer(x) == 0.5).all()


def test_dropping_ends_with_its_block_and_draws_anew_each_time(quantizer, generator):
    x = torch.full((100, 100), 0.3)
    with pytest.raises(Stop), dropping([quantizer], 0.5, BatchNoise(generator)):
        assert not torch.equal(quantizer(x), quantizer(x))
        raise Stop
    assert quantizer.drop is None

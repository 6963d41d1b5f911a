"""Small networks with random weights, calibration states made of noise, and networks calibrated once per session."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

from ddim.network import DDPMUNet
from qdiff.adapters import adapter_for
from qdiff.calibration.runner import calibrate
from qdiff.calibration.selectors import CalibrationSet
from qdiff.layers import quant_layers

# The same examples on every run, and nothing written to the working tree.
settings.register_profile("qdiff", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("qdiff")

FIXTURES = Path(__file__).parents[1] / "fixtures"
SAMPLER_STEPS = torch.arange(950, 0, -100)  # ten timesteps, noisiest first
CONFIG = {
    "in_channels": 3,
    "out_ch": 3,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
    "image_size": 8,
    "dropout": 0.1,
}


@pytest.fixture(scope="session")
def adapter():
    return adapter_for("ddim")


@pytest.fixture(scope="session")
def timesteps():
    """[10] timesteps of the sampler that the calibration states stand for."""
    return SAMPLER_STEPS


@pytest.fixture(scope="session")
def make_network():
    """(ch, seed) -> a new float U-Net in eval mode.

    With ch 32 each of the 32 norm groups is one channel, so the norms remove the time embedding: take ch 64 where
    timesteps must show. Norms are given random weights: their defaults, 1 and 0, would hide a mix-up.
    """

    def make(ch=32, seed=0, **changes):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = DDPMUNet(**{**CONFIG, "ch": ch, **changes}).eval().requires_grad_(False)
            for name, parameter in network.named_parameters():
                if ".norm" in name or name.startswith("norm"):
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        return network

    return make


@pytest.fixture
def network(make_network):
    return make_network(32)


@pytest.fixture
def wide_network(make_network):
    return make_network(64)


@pytest.fixture(scope="session")
def states():
    """20 states, two of each sampler step, in sampling order."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 3, 8, 8, generator=generator)
    return CalibrationSet(x, SAMPLER_STEPS.repeat_interleave(2).float(), torch.arange(10).repeat_interleave(2))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def quantized(make_network, adapter, states):
    """(recipe, ch) -> a calibrated network; each is calibrated once and handed out as a copy."""
    made = {}

    def make(recipe, ch=32, seed=0):
        key = (recipe.to_yaml(), ch, seed)
        if key not in made:
            made[key] = calibrate(make_network(ch), adapter, recipe, states, seed, SAMPLER_STEPS).network
        return copy.deepcopy(made[key])

    return make


@pytest.fixture(scope="session")
def float_weights(make_network):
    """ch -> the float weights of `make_network(ch)` by layer name."""

    def of(ch=32):
        modules = make_network(ch).named_modules()
        return {name: m.weight for name, m in modules if type(m) in (torch.nn.Conv2d, torch.nn.Linear)}

    return of


@pytest.fixture(scope="session")
def assert_same_numbers():
    """(network, other): the same codes, grids and float parts, bit for bit."""

    def check(network, other):
        assert network.state_dict().keys() == other.state_dict().keys()
        for (key, mine), theirs in zip(network.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs), key
        layers, others = quant_layers(network), quant_layers(other)
        assert layers.keys() == others.keys()
        for name, layer in layers.items():
            assert (layer.boundary, layer.frozen) == (others[name].boundary, others[name].frozen), name
            if layer.weight_quantizers:
                assert torch.equal(layer.codes, others[name].codes), name

    return check


@pytest.fixture(scope="session")
def case_folder():
    return FIXTURES / "ddim_split_w4a8_sym"


@pytest.fixture(scope="session")
def case(case_folder):
    """The golden case's description."""
    return json.loads((case_folder / "case.json").read_text())


@pytest.fixture(scope="session")
def case_state(case_folder):
    return load_file(case_folder / "fp.safetensors")


@pytest.fixture(scope="session")
def case_io(case_folder):
    return load_file(case_folder / "io.safetensors")

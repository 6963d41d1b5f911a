"""Small networks with random weights, calibration states made of noise, and networks calibrated once per session."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

from ddim.network import DDPMUNet
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.selectors import CalibrationSet
from qdiff.families import adapter_for
from qdiff.nn.layers import quant_layers

sys.path.append(str(Path(__file__).parent / "checkpoints"))  # of published_file

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

LATENT = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 64,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 1],
}
LATENT_FORMS = {
    "plain": {"num_head_channels": 16},
    "transformer": {"num_heads": 4, "use_spatial_transformer": True, "context_dim": 24},
    "deep": {
        "channel_mult": [1, 2, 1],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "transformer_depth": 3,
        "context_dim": [24],
    },
    "labels": {
        "num_heads": 2,
        "num_heads_upsample": 4,
        "num_classes": 7,
        "attention_resolutions": [1, 2],
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "use_new_attention_order": True,
    },
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


@pytest.fixture(scope="session")
def latent_adapter():
    return adapter_for("ldm")


@pytest.fixture(scope="session")
def make_latent():
    """(form, seed) -> a new float latent U-Net in eval mode; forms are the keys of LATENT_FORMS.

    Every parameter is drawn anew: the last layers of residual branches start at zero and would hide all before them.
    """

    def make(form, seed=0, **changes):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = UNetModel(**{**LATENT, **LATENT_FORMS[form], **changes}).eval().requires_grad_(False)
            for parameter in network.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape) * parameter[0].numel() ** -0.5)
                else:  # the weights of norms are 1, biases 0
                    parameter.copy_(parameter.mean().round() + 0.2 * torch.randn(parameter.shape))
        return network

    return make


@pytest.fixture(scope="session")
def latent_states():
    """(form) -> 20 states with what the network is conditioned on: ten with cs, then the same ten with ucs."""

    def make(form):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(10, 3, 8, 8, generator=generator)
        step = torch.arange(10)
        data = CalibrationSet(x, SAMPLER_STEPS.float(), step)
        if form == "plain":
            return data
        if form == "labels":
            context = torch.cat([step % 6, torch.full((10,), 6)])
        else:
            context = torch.randn(11, 5, 24, generator=generator)[[*range(10), *[10] * 10]]
        return CalibrationSet(x.repeat(2, 1, 1, 1), data.t.repeat(2), step.repeat(2), context)

    return make


@pytest.fixture(scope="session")
def quantized_latent(make_latent, latent_adapter, latent_states):
    """(recipe, form, changes of its configuration) -> a calibrated latent network; each is calibrated once and handed
    out as a copy."""
    made = {}

    def make(recipe, form, **changes):
        key = (recipe.to_yaml(), form, str(changes))
        if key not in made:
            network, data = make_latent(form, **changes), latent_states(form)
            made[key] = calibrate(network, latent_adapter, recipe, data, 0, SAMPLER_STEPS).network
        return copy.deepcopy(made[key])

    return make


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def quantized(make_network, adapter, states):
    """(recipe, ch, changes of its configuration) -> a calibrated network; each is calibrated once and handed out as a
    copy."""
    made = {}

    def make(recipe, ch=32, seed=0, **changes):
        key = (recipe.to_yaml(), ch, seed, str(changes))
        if key not in made:
            made[key] = calibrate(make_network(ch, **changes), adapter, recipe, states, seed, SAMPLER_STEPS).network
        return copy.deepcopy(made[key])

    return make


@pytest.fixture(scope="session")
def float_weights(make_network):
    """(ch, changes of the configuration) -> the float weights of `make_network` by layer name."""

    def of(ch=32, **changes):
        modules = make_network(ch, **changes).named_modules()
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


@pytest.fixture
def case_network(case, case_state):
    network = DDPMUNet(**case["config"]).eval()
    network.load_state_dict(case_state)
    return network.requires_grad_(False)


@pytest.fixture
def golden(case_folder):
    return case_folder / "qdiff_wa.pth"


@pytest.fixture(scope="session")
def case_io(case_folder):
    return load_file(case_folder / "io.safetensors")

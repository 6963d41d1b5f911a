import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ddim.network import DDPMUNet
from ddim.schedules import beta_schedule

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="session")
def case_config():
    return json.loads((FIXTURES / "ddim_split_w4a8_sym" / "case.json").read_text())["config"]


@pytest.fixture(scope="session")
def case_state():
    return load_file(FIXTURES / "ddim_split_w4a8_sym" / "fp.safetensors")


@pytest.fixture(scope="session")
def case_io():
    return load_file(FIXTURES / "ddim_split_w4a8_sym" / "io.safetensors")


@pytest.fixture(scope="session")
def end_states():
    return load_file(FIXTURES / "samplers.safetensors")


@pytest.fixture
def network(case_config, case_state):
    """The small float U-Net of the golden case, float32."""
    network = DDPMUNet(**case_config).eval()
    network.load_state_dict(case_state)
    return network.requires_grad_(False)


@pytest.fixture(scope="session")
def betas():
    return beta_schedule("linear", 1e-4, 0.02, 1000)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)

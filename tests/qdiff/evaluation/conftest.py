"""Real images for the evaluation tests."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from random_inception import write_random_inception  # noqa: E402

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


@pytest.fixture(scope="session")
def cifar_test():
    """The first 200 CIFAR-10 test images, uint8 [200, 3, 32, 32], and their labels [200]."""
    with np.load(FIXTURES / "cifar10_test_200.npz") as saved:
        images = torch.from_numpy(saved["images"]).permute(0, 3, 1, 2).contiguous()
        return images, torch.from_numpy(saved["labels"]).long()


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of random Inception weights."""
    return write_random_inception(tmp_path_factory.mktemp("inception") / "weights.pth")

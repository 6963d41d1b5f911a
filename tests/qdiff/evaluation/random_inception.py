"""torch-fidelity's Inception with random weights, in the file format that torch-fidelity loads."""

from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as inception


def write_random_inception(path: Path) -> Path:
    """Weights whose features vary from image to image, unlike those of the layers' own initialisation."""
    with (
        torch.random.fork_rng(devices=[]),
        patch.object(inception, "load_state_dict_from_url", return_value={}),
        patch.object(inception.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        torch.manual_seed(0)
        network = inception.FeatureExtractorInceptionV3("random", ["2048"])
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path

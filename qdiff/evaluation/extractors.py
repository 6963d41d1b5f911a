"""Networks in whose features images are compared: torch-fidelity's, with ADM's spatial layer, and the bundled one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
import torch_fidelity
import torchvision
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from qdiff.evaluation import features as cifar10
from qdiff.evaluation.images import Images, file_digest
from qdiff.utils.errors import FieldError
from qdiff.utils.files import load_pickle

INCEPTION, VGG, CIFAR10 = "inception-v3-spatial", "vgg16", cifar10.EXTRACTOR
POOLED, LOGITS, SPATIAL = "2048", "logits_unbiased", "spatial"  # layers of INCEPTION
VGG_LAYER, CIFAR10_LAYER = "fc2_relu", cifar10.FEATURE_LAYER
SPATIAL_CHANNELS = 7  # of 17×17 places: 2023 features, close to the pooled ones' number
VGG_FILE = "vgg16-397923af.pth"  # torchvision's name for the weights, of which it holds the hash
WIDTHS = {POOLED: 2048, SPATIAL: SPATIAL_CHANNELS * 17 * 17, CIFAR10_LAYER: cifar10.FEATURES, VGG_LAYER: 4096}


class SpatialInception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with one more layer, "spatial" [N, 2023]: what ADM takes for sFID.

    Its evaluation reads the first 7 channels of the TensorFlow graph's "mixed_6/conv", the rectified 1×1 branch of the
    seventh mixed block, which is called Mixed_6d here (arXiv 2103.03841 has the idea, ADM's evaluator.py the layer).
    """

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: uint8 [N, 3, H, W]. Returns one float32 tensor per requested layer, in the order of the request."""
        if SPATIAL not in self.features_list:
            return super().forward(images)
        kept: list[Tensor] = []
        asked = self.features_list
        branch = self.Mixed_6d.branch1x1
        hook = branch.register_forward_hook(lambda module, inputs, output: kept.append(output[:, :SPATIAL_CHANNELS]))
        self.features_list = [layer for layer in asked if layer != SPATIAL] or ["768"]
        try:
            found = dict(zip(self.features_list, super().forward(images), strict=True))
        finally:
            self.features_list = asked
            hook.remove()
        found[SPATIAL] = kept[0].flatten(1).float()
        return tuple(found[layer] for layer in asked)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return *FeatureExtractorInceptionV3.get_provided_features_list(), SPATIAL

    @staticmethod
    def can_be_compiled() -> bool:
        return False


@dataclass(frozen=True)
class Extractor:
    """A feature network by its name in torch-fidelity's registry, the layers wanted of it, and its weights.

    Batches are torch-fidelity's, so that numbers agree with its own to the last digit.
    """

    name: str
    layers: tuple[str, ...]
    weights: Path
    device: torch.device = torch.device("cpu")
    batch_size: int = 64

    def digest(self) -> str:
        """What features depend on beside the images: the network, its weights, batches and torch-fidelity's version."""
        about = [self.name, file_digest(self.weights), self.batch_size, torch_fidelity.__version__, self.device.type]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def load(self) -> nn.Module:
        """The network on its device. Raises ValueError naming the file where its weights are not this network's."""
        register()
        if self.name != CIFAR10:
            load_pickle(self.weights, "file of weights")  # torch-fidelity itself would unpickle anything
        try:
            options = {"feature_extractor_weights_path": str(self.weights), "cuda": False, "verbose": False}
            return create_feature_extractor(self.name, list(self.layers), **options).to(self.device)
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.weights}: expected weights of {self.name}, found others: {reason}") from error

    @torch.no_grad()
    def features(self, images: Images, advance: Callable[[int], object] = lambda count: None) -> dict[str, Tensor]:
        """Layer -> features [N, C] of the images in torch-fidelity's order, on the CPU.

        advance: told the number of images of every batch that is done, and 0 before the first.
        """
        network, found = self.load(), {layer: [] for layer in self.layers}
        size = min(self.batch_size, len(images))
        advance(0)
        for batch in images.batches(size, images.fidelity_order):
            for layer, part in zip(self.layers, network(batch.to(self.device)), strict=True):
                found[layer].append(part.cpu())
            advance(len(batch))
        return {layer: torch.cat(parts) for layer, parts in found.items()}


def register() -> None:
    """Enter our extractors in torch-fidelity's registry; further calls change nothing."""
    cifar10.register()
    FEATURE_EXTRACTORS_REGISTRY.setdefault(INCEPTION, SpatialInception)


def found_weights(name: str) -> Path | None:
    """Where the weights of a network lie if torch-fidelity has fetched them, or they are bundled; None if not."""
    if name == CIFAR10:
        return cifar10.models_folder() / CIFAR10 / "model.safetensors"
    file = VGG_FILE if name == VGG else Path(urlparse(URL_INCEPTION_V3).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    return path if path.is_file() else None


def too_few(count: int, layers: Sequence[str]) -> list[str]:
    """The layers with at least as many features as there are images: their covariances are singular."""
    return [layer for layer in layers if count <= WIDTHS[layer]]


def fetch_weights(name: str) -> Path:
    """Fetch the weights of a network to where torch-fidelity looks for them. Raises ValueError where that fails."""
    url = URL_INCEPTION_V3 if name == INCEPTION else torchvision.models.VGG16_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except OSError as error:  # URLError among them
        raise FieldError("download", f": {url} cannot be had: {error}") from error
    return path

"""The bundled CIFAR-10 feature network, and its entry in torch-fidelity's registry of feature extractors."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

EXTRACTOR = "cifar10-features"  # name in torch-fidelity's registry and of the folder under models/
FEATURE_LAYER, LOGIT_LAYER = "256", "logits"
FEATURES = 256
IMAGE_SHAPE = (3, 32, 32)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def models_folder() -> Path:
    """The bundled `models/` folder, beside the package. Raises FileNotFoundError where the package has none."""
    folder = Path(__file__).resolve().parents[2] / "models"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected the bundled models here, found none; run from a full checkout")
    return folder


def conv_unit(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution without bias, batch norm, ReLU: `cb` in models/README.md."""
    conv = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class Cifar10Features(nn.Module):
    """A small residual CIFAR-10 classifier whose pooled last layer serves as features (models/README.md)."""

    def __init__(self):
        super().__init__()
        self.stem = conv_unit(3, 64)
        self.c1 = conv_unit(64, 128, stride=2)
        self.r1 = nn.Sequential(conv_unit(128, 128), conv_unit(128, 128))
        self.c2 = conv_unit(128, FEATURES, stride=2)
        self.r2 = nn.Sequential(conv_unit(FEATURES, FEATURES), conv_unit(FEATURES, FEATURES))
        self.fc = nn.Linear(FEATURES, len(CLASSES))

    @classmethod
    def load(cls, path: Path | None = None) -> "Cifar10Features":
        """The trained network in evaluation mode, float32; path: a safetensors file, by default the bundled one.

        Raises FileNotFoundError where the file is missing, ValueError where it holds other weights.
        """
        path = Path(path or models_folder() / EXTRACTOR / "model.safetensors")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected the weights of the CIFAR-10 feature network, found no file")
        network = cls()
        try:
            network.load_state_dict(load_file(path))  # the copy turns float16 into float32
        except (SafetensorError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: expected the weights of the CIFAR-10 feature network, found {reason}") from error
        return network.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: [N, 3, 32, 32] in [-1, 1]. Returns features [N, 256] and logits [N, 10] in the order of CLASSES."""
        features = self.maps(images)[-1].mean(dim=(2, 3))
        return features, self.fc(features)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images: [N, 3, 32, 32] in [-1, 1]. Returns [N, 64, 32, 32] after the stem, [N, 128, 16, 16] and
        [N, 256, 8, 8] after the residual sums."""
        first = self.stem(images)
        h = self.c1(first)
        second = h + self.r1(h)
        h = self.c2(second)
        return first, second, h + self.r2(h)


class Cifar10FeatureExtractor(FeatureExtractorBase):
    """`Cifar10Features` as torch-fidelity calls it: layers "256" and "logits", uint8 images [N, 3, 32, 32].

    Of torch-fidelity's options it heeds `feature_extractor_weights_path`.
    """

    def __init__(self, name: str, features_list: list[str], **options):
        super().__init__(name, features_list)
        self.network = Cifar10Features.load(options.get("feature_extractor_weights_path"))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns one float64 CPU tensor per requested layer, in the order they were requested.

        Raises ValueError for anything but uint8 images [N, 3, 32, 32].
        """
        require_cifar_images(images)
        features, logits = self.network(images / 127.5 - 1)
        layers = {FEATURE_LAYER: features, LOGIT_LAYER: logits}
        # torch-fidelity takes the mean in the dtype it is given, on the CPU; float32 would cost digits of the FD
        return tuple(layers[layer].to("cpu", torch.float64) for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return FEATURE_LAYER, LOGIT_LAYER

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": LOGIT_LAYER, "fid": FEATURE_LAYER, "kid": FEATURE_LAYER, "prc": FEATURE_LAYER}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False


def register() -> None:
    """Enters the extractor in torch-fidelity's registry as "cifar10-features"; further calls change nothing.

    Raises ValueError where another extractor has taken the name.
    """
    found = FEATURE_EXTRACTORS_REGISTRY.get(EXTRACTOR)
    if found is None:
        register_feature_extractor(EXTRACTOR, Cifar10FeatureExtractor)
    elif found is not Cifar10FeatureExtractor:
        raise ValueError(f"torch-fidelity: expected the name {EXTRACTOR!r} to be free, found it taken by {found}")


def require_cifar_images(images: Tensor) -> None:
    """Raises ValueError unless images is uint8 [N, 3, 32, 32]."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
        found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise ValueError(f"images: expected uint8 [N, 3, 32, 32], found {found}")

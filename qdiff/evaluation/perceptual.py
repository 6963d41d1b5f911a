"""Distances of pairs of images as networks see them: LPIPS, and its recipe in the bundled CIFAR-10 features."""

from __future__ import annotations

import tempfile
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn
from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS, SampleSimilarityLPIPS

from qdiff.evaluation.extractors import VGG_FILE
from qdiff.evaluation.features import Cifar10Features, require_cifar_images
from qdiff.utils.files import load_pickle

LPIPS_FILES = (VGG_FILE, Path(urlparse(URL_VGG16_LPIPS).path).name)  # VGG16's weights, and those of the comparison
CIFAR10_METRIC = "perceptual distance (CIFAR-10 features)"


class Cifar10Distance(nn.Module):
    """LPIPS' recipe without learned weights (arXiv 1801.03924, Equation 1 with w = 1) in the bundled network's maps.

    Three maps, after the stem and after each residual sum: 64 channels at 32×32, 128 at 16×16, 256 at 8×8. Vectors of
    channels are brought to length 1, their squared distances averaged over places and added up over the maps: 0 for
    equal images, at most 12. The numbers compare with no LPIPS.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__()
        self.network = Cifar10Features.load(path)

    @torch.no_grad()
    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """images, reference: uint8 [N, 3, 32, 32]. Returns [N] float64. Raises ValueError for others."""
        for given in (images, reference):
            require_cifar_images(given)
        pairs = zip(*(self.network.maps(these / 127.5 - 1) for these in (images, reference)), strict=True)
        return sum(_unit(a).sub(_unit(b)).square().sum(1).mean((1, 2)).double() for a, b in pairs)


def _unit(maps: Tensor) -> Tensor:
    """[N, C, H, W] with vectors of channels of length 1."""
    return nn.functional.normalize(maps, dim=1, eps=1e-10)


class Lpips(nn.Module):
    """LPIPS with VGG16, by torch-fidelity, on the images' own size."""

    def __init__(self, folder: Path) -> None:
        """folder: with `LPIPS_FILES`. Raises ValueError naming a file that is not what it should be."""
        super().__init__()
        for name in LPIPS_FILES:  # torch-fidelity itself would unpickle anything
            load_pickle(folder / name, "file of LPIPS weights")
        hub = torch.hub.get_dir()
        with tempfile.TemporaryDirectory() as temporary:
            # torch-fidelity takes no paths, it looks where torch.hub keeps its files.
            (Path(temporary) / "checkpoints").symlink_to(folder.resolve(), target_is_directory=True)
            torch.hub.set_dir(temporary)
            try:
                self.similarity = SampleSimilarityLPIPS("lpips-vgg16")
            except (RuntimeError, TypeError, AttributeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(f"{folder}: expected weights of LPIPS with VGG16, found others: {reason}") from error
            finally:
                torch.hub.set_dir(hub)

    @torch.no_grad()
    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        """images, reference: uint8 [N, 3, H, W]. Returns [N] float64."""
        return self.similarity(images, reference).flatten().double()


def lpips_folder(given: Path | None) -> Path | None:
    """The folder with the weights of LPIPS: the given one, or where torch.hub keeps its files; None without them.

    Raises FileNotFoundError where a given folder lacks one.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints" if given is None else given
    missing = [name for name in LPIPS_FILES if not (folder / name).is_file()]
    if missing and given is not None:
        raise FileNotFoundError(f"{given}: expected {' and '.join(LPIPS_FILES)}, {missing[0]} is missing")
    return None if missing else folder

"""CIFAR-10 as training data, from the folder of its Python version or from an .npz file."""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.data.captions import WORDS, caption

FOLDER = "cifar-10-batches-py"
FILES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
NPZ_TEST_EVERY = 20  # an .npz file has no splits: every 20th image, from image 0 on, tests


class CIFAR10(torch.utils.data.Dataset):
    """Images, labels and captions.

    `data[epoch, i]` is {"image": [H, W, 3] float32 in [-1, 1], "class_label": int, "caption": str}; caption and flip
    depend on (seed, epoch, i) alone, whatever process loads them. `data[i]` is `data[0, i]`.

    path: a folder that holds cifar-10-batches-py (or that folder), or an .npz file with `images` [n, H, W, 3] uint8 and
    `labels` [n]. An .npz file has no splits of its own: every 20th image is the test split.
    Raises FileNotFoundError, and ValueError naming the file and what is wrong with it.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",  # or "test"
        flip: bool = True,  # mirror half of the images, from left to right
        seed: int = 0,
        download: bool = False,  # fetch the data set into `path` where it is not there
    ):
        if split not in FILES:
            raise ValueError(f"split {split!r}: expected one of {', '.join(FILES)}")
        path = Path(path).expanduser()
        if download and not path.is_file():
            _download(path)
        self.images, self.labels = _read_npz(path, split) if path.is_file() else _read_folder(path, split)
        if not len(self.images):
            raise ValueError(f"{path}: no image in the {split} split")
        self.flip = flip
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        draws = np.random.default_rng((self.seed, epoch, index))
        mirrored = draws.random() < 0.5 and self.flip  # drawn in any case: captions do not depend on `flip`
        image = self.images[index, :, ::-1] if mirrored else self.images[index]
        label = int(self.labels[index])
        image = torch.from_numpy(image.astype(np.float32) / 127.5 - 1)
        return {"image": image, "class_label": label, "caption": caption(label, draws)}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def _read_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := {"images", "labels"} - set(file.files):
                found = ", ".join(file.files) or "none"
                raise ValueError(f"{path}: expected arrays images and labels, found {found} ({min(missing)} missing)")
            images, labels = file["images"], file["labels"]
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from error
    _check(path, images, labels)
    tests = np.arange(len(images)) % NPZ_TEST_EVERY == 0
    chosen = tests if split == "test" else ~tests
    return images[chosen], labels[chosen]


def _read_folder(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    folder = path if path.name == FOLDER else path / FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: expected an .npz file, or a folder that holds {FOLDER}")
    images, labels = [], []
    for name in FILES[split]:
        batch = _read_batch(folder / name)
        images.append(batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(np.asarray(batch["labels"]))
        _check(folder / name, images[-1], labels[-1])
    return np.concatenate(images), np.concatenate(labels)


def _encoded(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into a pickle that Python 2 could read."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds text encoded as {encoding}, expected arrays only")
    return text.encode(encoding)


class _Arrays(pickle.Unpickler):
    """Reads plain containers and numpy arrays, and refuses everything else."""

    ALLOWED = {
        "numpy.core.multiarray._reconstruct": np.ndarray.__reduce__(np.empty(0))[0],
        "numpy._core.multiarray._reconstruct": np.ndarray.__reduce__(np.empty(0))[0],
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "_codecs.encode": _encoded,
    }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds an object of {full}, expected arrays only")
        return self.ALLOWED[full]


def _read_batch(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the data set is not complete")
    try:
        with path.open("rb") as file:
            batch = _Arrays(file, encoding="latin1").load()
        if not isinstance(batch["data"], np.ndarray) or batch["data"].shape[1:] != (3 * 32 * 32,):
            raise ValueError("its data are no array of [n, 3072]")
        return {"data": batch["data"], "labels": batch["labels"]}
    except Exception as error:  # damaged bytes make the unpickler stumble anywhere
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a batch of CIFAR-10: {reason}") from error


def _check(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"{path}: expected images [n, H, W, 3] of uint8, found {list(images.shape)} of {images.dtype}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected {len(images)} labels, found {list(labels.shape)} of {labels.dtype}")
    if len(labels) and (labels.min() < 0 or labels.max() >= len(WORDS)):
        found = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"{path}: expected labels from 0 to {len(WORDS) - 1}, found {found}")


def _download(path: Path) -> None:
    """Fetch and unpack the data set where it is not there, its md5 verified."""
    from torchvision.datasets import CIFAR10 as Published
    from torchvision.datasets.utils import download_and_extract_archive

    root = path.parent if path.name == FOLDER else path
    if not (root / FOLDER).is_dir():
        download_and_extract_archive(Published.url, str(root), filename=Published.filename, md5=Published.tgz_md5)

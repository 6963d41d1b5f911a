"""Sets of images of one size: a folder, a run of the sampling scripts, or an .npz, read batch by batch as 8-bit RGB."""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.registry import DATASETS_REGISTRY

from qdiff.evaluation.runs import SUFFIXES, image_files, images_folder
from qdiff.utils.errors import FieldError
from qdiff.utils.images import DAMAGED, UnfitImage, pixels_of

LOSSY = (".jpg", ".jpeg")
ARRAYS = ("arr_0", "images")  # the array of images in an .npz: ADM's name, and a readable one
NOT_AN_IMAGE = (*DAMAGED, ValueError)


class Images:
    """Images of one size in the order of their indices. shape: (3, H, W).

    `fidelity_order` is the order in which torch-fidelity would take them: its sums and its random subsets depend on it.
    """

    def __init__(self, name: str, count: int, shape: tuple[int, int, int]) -> None:
        self.name, self.count, self.shape = name, count, shape
        self._digest: str | None = None

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Tensor:
        """[3, H, W] uint8."""
        raise NotImplementedError

    def digest(self) -> str:
        """SHA-256 of names and contents, taken once."""
        if self._digest is None:
            self._digest = self._hash()
        return self._digest

    def _hash(self) -> str:
        raise NotImplementedError

    @property
    def fidelity_order(self) -> Sequence[int]:
        return range(len(self))

    @property
    def names(self) -> Sequence[str]:
        """Of the images, as pairs and messages know them: files' names, or indices."""
        return [str(index) for index in range(len(self))]

    @property
    def lossy(self) -> bool:
        """Whether an image has been through a lossy format."""
        return False

    def batches(self, size: int, order: Sequence[int] | None = None) -> Iterator[Tensor]:
        """[up to size, 3, H, W] uint8 each, in the order of the indices or the given one."""
        order = range(len(self)) if order is None else order
        for start in range(0, len(order), size):
            yield torch.stack([self.image(index) for index in order[start : start + size]])


class FolderImages(Images):
    """The images of a folder, not of those below it, sorted by name with numbers as numbers: 2.png before 10.png.

    Raises ValueError where there are none, where their sizes differ, or where one is not an image.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(image_files(folder), key=natural_order)
        if not self.paths:
            inner = sorted(path.name for path in folder.iterdir() if any(image_files(path)))
            where = f" but in {', '.join(inner[:4])}" if inner else ""
            raise ValueError(f"{folder}: expected images ({', '.join(SUFFIXES)}), found none{where}")
        width, height = size = image_size(self.paths[0])
        for path in self.paths:
            if (other := image_size(path)) != size:
                sizes = f"{width}x{height} ({self.paths[0].name}) and {other[0]}x{other[1]} ({path.name})"
                raise ValueError(f"{folder}: expected images of one size, found {sizes}")
        super().__init__(str(folder), len(self.paths), (3, height, width))

    def image(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            with Image.open(path) as file:
                pixels = torch.from_numpy(pixels_of(file, path))
        except UnfitImage:
            raise
        except NOT_AN_IMAGE as error:
            raise ValueError(f"{path}: expected an image, found a damaged one: {error}") from error
        return pixels.expand(self.shape) if pixels.dim() == 2 else pixels.permute(2, 0, 1)

    def _hash(self) -> str:
        found = hashlib.sha256()
        for path in self.paths:
            found.update(f"{path.name} {path.stat().st_size} ".encode())
            found.update(path.read_bytes())
        return found.hexdigest()

    @property
    def fidelity_order(self) -> Sequence[int]:
        return sorted(range(len(self)), key=lambda index: os.path.realpath(self.paths[index]))

    @property
    def names(self) -> Sequence[str]:
        return [path.name for path in self.paths]

    @property
    def lossy(self) -> bool:
        return any(path.suffix.lower() in LOSSY for path in self.paths)


class ArrayImages(Images):
    """The images of an .npz: uint8 [N, H, W, 3], or [N, H, W, 1] for grey ones, under "arr_0" or "images".

    An array that is stored uncompressed, as np.savez and the sampling scripts write it, is read where it lies in the
    file. Raises ValueError where there is no such array.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.array = read_array(path, next((key for key in ARRAYS if key in arrays_in(path)), ARRAYS[0]))
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] not in (1, 3):
            found = f"{self.array.dtype} {list(self.array.shape)}"
            raise ValueError(f"{path}: expected images, uint8 [N, H, W, 3], found {found}")
        if not self.array.size:
            raise ValueError(f"{path}: expected images, found an array of shape {list(self.array.shape)}")
        super().__init__(str(path), len(self.array), (3, *self.array.shape[1:3]))

    def image(self, index: int) -> Tensor:
        pixels = torch.from_numpy(np.array(self.array[index]))
        return pixels.permute(2, 0, 1).expand(self.shape)

    def _hash(self) -> str:
        return file_digest(self.path)


def open_images(path: str | Path) -> Images:
    """The images of a folder, of a run's folder (see `images_folder`), or of an .npz.

    Raises FileNotFoundError where path is neither, ValueError with one line where it holds no images of one size.
    """
    path = Path(path)
    if path.is_dir():
        return FolderImages(images_folder(path))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a folder of images or an .npz, found nothing")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected a folder of images or an .npz, found another file")
    return ArrayImages(path)


def natural_order(path: Path) -> list[tuple[int, int | str]]:
    """A key that sorts names with numbers as numbers."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) from the file's header. Raises ValueError where it is not an image."""
    try:
        with Image.open(path) as file:
            return file.size
    except NOT_AN_IMAGE as error:
        raise ValueError(f"{path}: expected an image, found a file that is none") from error


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def arrays_in(path: Path) -> list[str]:
    """Names of the arrays in an .npz. Raises ValueError where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path}: expected an .npz, found a damaged or other file: {error}") from error


def read_array(path: Path, name: str) -> np.ndarray:
    """One array of an .npz, read-only where it lies in the file if it is stored uncompressed.

    Raises ValueError naming the arrays that are there instead, or the damage.
    """
    if name not in (there := arrays_in(path)):
        raise ValueError(f"{path}: expected an array {name!r}, found {', '.join(there) or 'none'}")
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(f"{name}.npy")
        if entry.compress_type == zipfile.ZIP_STORED:
            return _mapped(path, entry)
        with np.load(path, allow_pickle=False) as saved:
            return saved[name]
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a readable array {name!r}, found: {error}") from error


def _mapped(path: Path, entry: zipfile.ZipInfo) -> np.ndarray:
    """An uncompressed array of an .npz, mapped into memory."""
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        local = file.read(30)  # of the archive's local header: lengths of name and extra field end it
        file.seek(
            entry.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:], "little")
        )
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("an array of objects")
        if not np.prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(file, dtype, "r", file.tell(), shape, "F" if fortran else "C")


class RegisteredImages(Images):
    """A data set of torch-fidelity's registry, as "cifar10-train".

    Raises ValueError where the name is unknown, or the data are not in the folder and may not be downloaded.
    """

    def __init__(self, name: str, folder: Path | None = None, download: bool = False) -> None:
        if name not in DATASETS_REGISTRY:
            raise ValueError(f"{name}: expected one of {', '.join(DATASETS_REGISTRY)}")
        folder = Path(torch.hub._get_torch_home()) / "fidelity_datasets" if folder is None else folder
        try:
            self.data = DATASETS_REGISTRY[name](str(folder), download)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise FieldError(name, f": expected its data in {folder}, or {{}}: {reason}", "download") from error
        super().__init__(name, len(self.data), tuple(self.data[0].shape))

    def image(self, index: int) -> Tensor:
        return self.data[index]

    def _hash(self) -> str:
        found = hashlib.sha256()
        for index in range(len(self)):
            found.update(self.data[index].contiguous().numpy())
        return found.hexdigest()

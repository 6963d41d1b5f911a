"""Sets of images: order, formats, and what is said about those that are none."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.registry import DATASETS_REGISTRY
from torch_fidelity.utils import glob_samples_paths

from qdiff.evaluation.images import RegisteredImages, open_images, read_array


def write(folder, names, size=(5, 4), mode="RGB"):
    """Images of noise of (width, height); returns their pixels [N, H, W, 3] in the order of the names given."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, found = np.random.default_rng(len(names)), []
    for name in names:
        pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / name)
        found.append(np.array(Image.open(folder / name).convert("RGB")))
    return np.stack(found)


def whole(images, size=2):
    """All images as one array [N, H, W, 3]."""
    return torch.cat(list(images.batches(size))).permute(0, 2, 3, 1).numpy()


def test_a_folder_is_read_in_the_order_of_numbers(tmp_path):
    names = ["0.png", "2.png", "10.png", "100.png", "sample_9.PNG"]
    pixels = write(tmp_path, names)
    images = open_images(tmp_path)
    assert [path.name for path in images.paths] == names
    assert len(images) == 5 and images.shape == (3, 4, 5) and not images.lossy
    assert np.array_equal(whole(images), pixels)


def test_torch_fidelity_takes_them_in_another_order(tmp_path):
    write(tmp_path, [f"{i}.png" for i in range(12)])
    images = open_images(tmp_path)
    theirs = glob_samples_paths(str(tmp_path), False, "png,jpg,jpeg", "jpg,jpeg", verbose=False)
    assert [str(images.paths[i]) for i in images.fidelity_order] == theirs
    assert list(images.fidelity_order) != list(range(12))
    (first,) = images.batches(12, images.fidelity_order)
    assert torch.equal(first[2], images.image(10))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_other_modes_are_read_as_colour(tmp_path, mode):
    pixels = write(tmp_path, ["0.png", "1.png"], mode=mode)
    assert np.array_equal(whole(open_images(tmp_path)), pixels)


def test_16_bits_of_grey_are_the_images_of_8(tmp_path):
    pixels = write(tmp_path / "8", ["0.png", "1.png"], mode="L")
    (tmp_path / "16").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(tmp_path / "16" / f"{i}.png")
    assert np.array_equal(whole(open_images(tmp_path / "16")), pixels)


def test_a_mode_without_one_reading_is_named(tmp_path):
    write(tmp_path, ["0.png"])
    Image.new("F", (5, 4)).save(tmp_path / "1.png", format="TIFF")
    refused(tmp_path, tmp_path / "1.png", "found mode F")


@pytest.mark.parametrize("inner", ["img", "samples"])
def test_a_run_holds_its_images_in_a_folder(tmp_path, inner):
    pixels = write(tmp_path / inner, ["0.png", "1.png"])
    (tmp_path / "run.log").write_text("")
    assert np.array_equal(whole(open_images(tmp_path)), pixels)


@pytest.mark.parametrize("key", ["arr_0", "images"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays(tmp_path, key, save):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    save(tmp_path / "a.npz", **{"labels": np.arange(5), key: pixels})
    images = open_images(tmp_path / "a.npz")
    assert np.array_equal(whole(images), pixels) and images.shape == (3, 4, 6)
    assert isinstance(images.array, np.memmap) == (save is np.savez)
    assert list(images.fidelity_order) == list(range(5))


def test_grey_arrays_are_read_as_colour(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 1), np.uint8)
    np.savez(tmp_path / "a.npz", pixels)
    assert np.array_equal(whole(open_images(tmp_path / "a.npz")), np.repeat(pixels, 3, 3))


def test_a_column_major_array_is_read_as_it_is_meant(tmp_path):
    values = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    np.savez(tmp_path / "a.npz", mu=values)
    assert np.array_equal(read_array(tmp_path / "a.npz", "mu"), values)


def test_a_png_round_trip_loses_nothing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", pixels)
    (tmp_path / "a").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "a" / f"{i}.png")
    assert np.array_equal(whole(open_images(tmp_path / "a")), whole(open_images(tmp_path / "a.npz")))


def test_digests_tell_data_apart(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / name, ["0.png", "1.png"])
    first, second = (open_images(tmp_path / name).digest() for name in "ab")
    assert first == second
    path = tmp_path / "c" / "1.png"
    path.rename(tmp_path / "c" / "2.png")
    assert open_images(tmp_path / "c").digest() != first
    Image.new("RGB", (5, 4)).save(tmp_path / "b" / "1.png")
    assert open_images(tmp_path / "b").digest() != first


def test_registered_data(monkeypatch):
    data = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8)
    monkeypatch.setitem(DATASETS_REGISTRY, "tiny", lambda root, download: data)
    images = RegisteredImages("tiny")
    assert images.shape == (3, 6, 6) and torch.equal(torch.cat(list(images.batches(3))), data)
    digest = images.digest()
    data[0, 0, 0, 0] ^= 1
    assert images.digest() == digest != RegisteredImages("tiny").digest()  # taken once
    with pytest.raises(ValueError, match="nothing: expected one of .*cifar10-train"):
        RegisteredImages("nothing")


def test_registered_data_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="cifar10-val: expected its data in .*, or download"):
        RegisteredImages("cifar10-val", tmp_path)


def refused(path, *parts):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        images = open_images(path)
        list(images.batches(4))
    message = str(caught.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message


def test_what_is_no_set_of_images_is_named(tmp_path):
    refused(tmp_path / "absent", "absent: expected a folder of images or an .npz, found nothing")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty: expected images (.png, .jpg, .jpeg), found none")
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    refused(tmp_path / "empty", "found none")
    (tmp_path / "text.npz").write_text("text")
    refused(tmp_path / "text.npz", "expected a folder of images or an .npz, found another file")


def test_sizes_must_agree(tmp_path):
    write(tmp_path / "a", ["0.png", "1.png"])
    write(tmp_path / "a", ["2.png"], size=(8, 8))
    refused(tmp_path / "a", "expected images of one size, found 5x4 (0.png) and 8x8 (2.png)")


def test_a_text_file_named_png_is_named(tmp_path):
    write(tmp_path / "a", ["0.png", "2.png"])
    (tmp_path / "a" / "1.png").write_text("not an image")
    refused(tmp_path / "a", tmp_path / "a" / "1.png", "expected an image")


def test_a_truncated_png_is_named(tmp_path):
    write(tmp_path / "a", ["0.png", "1.png"], size=(64, 64))
    path = tmp_path / "a" / "1.png"
    path.write_bytes(path.read_bytes()[:2000])
    refused(tmp_path / "a", path, "found a damaged one")


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        ({"x": np.zeros((2, 4, 4, 3), np.uint8)}, ["expected an array 'arr_0', found x"]),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, ["uint8 [N, H, W, 3], found float64 [2, 4, 4, 3]"]),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, ["found uint8 [2, 3, 4, 4]"]),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, ["found an array of shape [0, 4, 4, 3]"]),
        ({"arr_0": np.array([{}, None])}, ["expected a readable array 'arr_0'"]),
    ],
    ids=["name", "float", "channels first", "none", "objects"],
)
def test_other_arrays_are_named(tmp_path, arrays, parts):
    np.savez(tmp_path / "a.npz", **arrays)
    refused(tmp_path / "a.npz", "a.npz", *parts)


def test_a_damaged_archive_is_named(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[200:400] = bytes(200)
    (tmp_path / "a.npz").write_bytes(content)
    refused(tmp_path / "a.npz", "a.npz: expected a readable array")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY")
    refused(tmp_path / "b.npz", "b.npz: expected a readable array")

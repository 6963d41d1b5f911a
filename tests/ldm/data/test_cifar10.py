"""CIFAR-10 as training data: both file layouts, reproducible captions and flips, and damaged files."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.data.captions import TEMPLATES, WORDS
from ldm.data.cifar10 import CIFAR10

NPZ = Path(__file__).parents[2] / "fixtures" / "cifar10_test_200.npz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def write_folder(folder, images, labels, parts=(3, 2, 2, 2, 1, 2)):
    """The Python version of the data set: five training batches and a test batch, of those sizes."""
    root = folder / "cifar-10-batches-py"
    root.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    start = 0
    for name, count in zip(names, parts, strict=True):
        part = slice(start, start + count)
        rows = images[part].transpose(0, 3, 1, 2).reshape(count, -1)
        batch = {"data": rows, "labels": labels[part].tolist(), "batch_label": name}
        (root / name).write_bytes(pickle.dumps(batch, protocol=2))
        start += count
    return root


@pytest.fixture(scope="module")
def arrays():
    with np.load(NPZ) as file:
        return file["images"], file["labels"]


def test_pixels_and_labels_are_those_of_the_file(arrays):
    data = CIFAR10(NPZ, flip=False)
    kept = np.arange(200) % 20 != 0
    assert len(data) == 190 and data[0]["image"].dtype == torch.float32
    pixels = torch.stack([item["image"] for item in data])
    assert pixels.shape == (190, 32, 32, 3) and pixels.min() >= -1 and pixels.max() <= 1
    assert np.array_equal(((pixels + 1) * 127.5).round().numpy().astype(np.uint8), arrays[0][kept])
    assert [item["class_label"] for item in data] == arrays[1][kept].tolist()
    tests = CIFAR10(NPZ, split="test", flip=False)
    assert [item["class_label"] for item in tests] == arrays[1][~kept].tolist()


@pytest.mark.parametrize("inside", [False, True], ids=["parent", "itself"])
def test_folder_of_the_python_version(tmp_path, arrays, inside):
    images, labels = arrays[0][:12], arrays[1][:12]
    root = write_folder(tmp_path, images, labels)
    path = root if inside else tmp_path
    data, tests = CIFAR10(path, flip=False), CIFAR10(path, split="test", flip=False)
    assert np.array_equal(data.images, images[:10]) and np.array_equal(data.labels, labels[:10])
    assert np.array_equal(tests.images, images[10:]) and np.array_equal(tests.labels, labels[10:])


def test_captions_speak_of_the_class():
    data = CIFAR10(NPZ)
    for index in range(len(data)):
        item = data[3, index]
        allowed = [template.format(word) for template in TEMPLATES for word in WORDS[item["class_label"]]]
        assert item["caption"] in allowed
    assert [words[0] for words in WORDS] == list(CLASSES) and sum(map(len, WORDS)) == 16


def test_draws_depend_on_seed_epoch_and_index_alone():
    one, again, other = CIFAR10(NPZ, seed=5), CIFAR10(NPZ, seed=5), CIFAR10(NPZ, seed=6)
    keys = [(epoch, index) for epoch in range(4) for index in range(50)]

    def look(data, keys):
        return [(item["caption"], item["image"]) for item in (data[key] for key in keys)]

    first, backwards = look(one, keys), look(again, keys[::-1])[::-1]
    assert all(a == c and torch.equal(b, d) for (a, b), (c, d) in zip(first, backwards, strict=True))
    assert [caption for caption, _ in first] != [caption for caption, _ in look(other, keys)]
    # Flips and templates differ from epoch to epoch, about evenly.
    flipped = sum(torch.equal(one[key]["image"], CIFAR10(NPZ, flip=False)[key]["image"].flip(1)) for key in keys)
    assert 70 <= flipped <= 130
    openings = Counter(caption.split()[0] for caption, _ in first)
    assert openings["a"] > 60 and openings["an"] > 10  # 6 of 8 templates, and 1 of 8


def test_captions_do_not_depend_on_flips():
    plain, mirrored = CIFAR10(NPZ, flip=False), CIFAR10(NPZ)
    assert [item["caption"] for item in plain] == [item["caption"] for item in mirrored]


class Foreign:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_pickles_hold_arrays_only(tmp_path, arrays, capsys):
    root = write_folder(tmp_path, arrays[0][:12], arrays[1][:12])
    (root / "data_batch_2").write_bytes(pickle.dumps({"data": Foreign(), "labels": []}))
    with pytest.raises(ValueError, match=r"data_batch_2 is not a batch of CIFAR-10: it holds an object of \w+.print"):
        CIFAR10(tmp_path)
    assert capsys.readouterr().out == ""


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda path: path, FileNotFoundError, "expected an .npz file, or a folder that holds cifar-10-batches-py"),
        (lambda path: save(path, images=np.zeros(3)), ValueError, "labels missing"),
        (
            lambda path: save(path, images=np.zeros((3, 4, 4, 3)), labels=np.zeros(3, int)),
            ValueError,
            r"of uint8, found \[3, 4, 4, 3\] of float64",
        ),
        (
            lambda path: save(path, images=np.zeros((3, 4, 4, 3), np.uint8), labels=np.array([1, 10, 2])),
            ValueError,
            "labels from 0 to 9, found 1 to 10",
        ),
        (
            lambda path: save(path, images=np.zeros((3, 4, 4, 3), np.uint8), labels=np.zeros(2, int)),
            ValueError,
            "expected 3 labels",
        ),
    ],
    ids=["nothing", "no labels", "floats", "eleventh class", "too few labels"],
)
def test_what_is_no_data_set_is_refused(tmp_path, make, error, words):
    path = tmp_path / "data.npz"
    with pytest.raises(error, match=words) as caught:
        CIFAR10(make(path))
    assert str(path) in str(caught.value)


def test_damaged_and_incomplete_files_are_refused(tmp_path, arrays):
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(NPZ.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"damaged.npz is not a readable .npz file"):
        CIFAR10(damaged)
    root = write_folder(tmp_path, arrays[0][:12], arrays[1][:12])
    (root / "data_batch_4").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4"):
        CIFAR10(tmp_path)
    (root / "data_batch_4").write_bytes((root / "data_batch_1").read_bytes()[:500])
    with pytest.raises(ValueError, match="data_batch_4 is not a batch of CIFAR-10"):
        CIFAR10(tmp_path)
    with pytest.raises(ValueError, match="split 'dev'"):
        CIFAR10(NPZ, split="dev")
    with pytest.raises(IndexError):
        CIFAR10(NPZ)[190]

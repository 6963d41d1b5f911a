"""Distances from features taken once: torch-fidelity's numbers, files of statistics, and the cache."""

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

from qdiff.evaluation.cache import Cache
from qdiff.evaluation.distances import (
    FileStatistics,
    ImageFeatures,
    NotThere,
    frechet_distance,
    holds_statistics,
    inception_score,
    kernel_distance,
    precision_recall,
)
from qdiff.evaluation.extractors import (
    CIFAR10,
    CIFAR10_LAYER,
    LOGITS,
    POOLED,
    SPATIAL,
    Extractor,
    found_weights,
    register,
)
from qdiff.evaluation.features import models_folder
from qdiff.evaluation.fidelity import feature_statistics, load_train_statistics
from qdiff.evaluation.fidelity import frechet_distance as distance_of_statistics
from qdiff.evaluation.images import ArrayImages, open_images

BUNDLED = models_folder() / CIFAR10 / "train_statistics.npz"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, cifar_test):
    """Two folders of 20 images, in which names are not in torch-fidelity's order."""
    found = []
    for half in range(2):
        folder = tmp_path_factory.mktemp("half")
        for i in range(20):
            pixels = cifar_test[0][100 * half + i].permute(1, 2, 0).numpy()
            Image.fromarray(255 - pixels if half else pixels).save(folder / f"{i}.png")
        found.append(folder)
    return found


class Counting(Extractor):
    """An extractor that counts how often it runs."""

    runs = 0

    def features(self, *args):
        type(self).runs += 1
        return super().features(*args)


@pytest.fixture
def extractor(monkeypatch):
    monkeypatch.setattr(Counting, "runs", 0)
    return Counting(CIFAR10, (CIFAR10_LAYER, "logits"), found_weights(CIFAR10))


def test_all_numbers_are_torch_fidelitys(folders, extractor):
    one, two = (ImageFeatures(open_images(folder), extractor) for folder in folders)
    register()
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
        feature_extractor=CIFAR10,
        kid_subset_size=8,
        kid_subsets=5,
        isc_splits=3,
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
        save_cpu_ram=True,
        feature_extractor_weights_path=found_weights(CIFAR10),
    )
    a, b = one.features(CIFAR10_LAYER), two.features(CIFAR10_LAYER)
    fid = frechet_distance(one.statistics(CIFAR10_LAYER), two.statistics(CIFAR10_LAYER))
    assert fid == theirs["frechet_inception_distance"]
    kid = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    assert kernel_distance(a, b, subsets=5, subset_size=8) == kid
    isc = theirs["inception_score_mean"], theirs["inception_score_std"]
    assert inception_score(one.features("logits"), splits=3) == isc
    assert precision_recall(a, b) == (theirs["precision"], theirs["recall"])
    assert Counting.runs == 2  # each set once, for all metrics


def test_what_was_extracted_is_kept_under_a_hash_of_the_data(folders, extractor, tmp_path):
    cache, images = Cache(tmp_path), open_images(folders[0])
    first = ImageFeatures(images, extractor, cache)
    statistics, features = first.statistics(CIFAR10_LAYER), first.features(CIFAR10_LAYER)
    again = ImageFeatures(open_images(folders[0]), extractor, Cache(tmp_path))
    found = again.statistics(CIFAR10_LAYER)
    assert all(np.array_equal(found[k], statistics[k]) and found[k].dtype == statistics[k].dtype for k in found)
    assert torch.equal(again.features(CIFAR10_LAYER), features) and Counting.runs == 1
    ImageFeatures(open_images(folders[1]), extractor, Cache(tmp_path)).statistics(CIFAR10_LAYER)
    assert Counting.runs == 2


def test_other_data_or_weights_are_computed_anew(folders, extractor, tmp_path, cifar_test):
    np.savez(tmp_path / "a.npz", cifar_test[0][:20].permute(0, 2, 3, 1).numpy())
    cache = Cache(tmp_path / "cache")
    ImageFeatures(ArrayImages(tmp_path / "a.npz"), extractor, cache).statistics(CIFAR10_LAYER)
    np.savez(tmp_path / "a.npz", cifar_test[0][20:40].permute(0, 2, 3, 1).numpy())
    second = ImageFeatures(ArrayImages(tmp_path / "a.npz"), extractor, cache).statistics(CIFAR10_LAYER)
    assert Counting.runs == 2
    expected = feature_statistics(cifar_test[0][20:40], batch_size=64)
    assert np.array_equal(second["mu"], expected.mu) and np.array_equal(second["sigma"], expected.sigma)


def test_damaged_ones_are_computed_anew(folders, extractor, tmp_path, caplog):
    first = ImageFeatures(open_images(folders[0]), extractor, Cache(tmp_path)).statistics(CIFAR10_LAYER)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-10])
    again = ImageFeatures(open_images(folders[0]), extractor, Cache(tmp_path)).statistics(CIFAR10_LAYER)
    assert Counting.runs == 2 and np.array_equal(again["sigma"], first["sigma"])
    assert str(path) in caplog.text and "computing anew" in caplog.text
    ImageFeatures(open_images(folders[0]), extractor, Cache(tmp_path)).statistics(CIFAR10_LAYER)
    assert Counting.runs == 2


def test_one_image_has_no_covariance(tmp_path, extractor):
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    with pytest.raises(NotThere, match="at least 2 images for a covariance, found 1"):
        ImageFeatures(open_images(tmp_path), extractor).statistics(CIFAR10_LAYER)


def test_the_bundled_statistics(cifar_test):
    file = FileStatistics(BUNDLED)
    assert file.count == 50_000 and holds_statistics(BUNDLED)
    own = feature_statistics(cifar_test[0])
    found = frechet_distance({"mu": own.mu, "sigma": own.sigma}, file.statistics(CIFAR10_LAYER))
    assert found == distance_of_statistics(own, load_train_statistics())
    with pytest.raises(NotThere, match="of 256 features, expected 2048"):
        file.statistics(POOLED)
    with pytest.raises(NotThere, match="expected mu_s and sigma_s"):
        file.statistics(SPATIAL)
    with pytest.raises(NotThere, match="expected images"):
        file.statistics(LOGITS)
    with pytest.raises(NotThere, match="give the reference's images"):
        file.features(POOLED)


def test_published_files_have_their_layers(tmp_path):
    """FID's reference files in either dtype, and ADM's with both pairs."""
    rng = np.random.default_rng(0)
    pooled = rng.standard_normal(2048).astype(np.float32), np.eye(2048)
    spatial = rng.standard_normal(2023), np.eye(2023)
    np.savez(tmp_path / "a.npz", mu=pooled[0], sigma=pooled[1], mu_s=spatial[0], sigma_s=spatial[1])
    file = FileStatistics(tmp_path / "a.npz")
    assert file.count is None
    assert (
        np.array_equal(file.statistics(POOLED)["mu"], pooled[0]) and file.statistics(POOLED)["mu"].dtype == np.float64
    )
    assert np.array_equal(file.statistics(SPATIAL)["mu"], spatial[0])
    # Statistics of images are float32 in their mean; the distance takes either.
    shifted = {"mu": pooled[0] + np.float32(0.5), "sigma": pooled[1]}
    assert frechet_distance(shifted, file.statistics(POOLED)) == pytest.approx(2048 * 0.25, rel=1e-6)


def test_a_file_of_both_serves_what_its_statistics_do_not(tmp_path, extractor, cifar_test):
    pixels = cifar_test[0][:20].permute(0, 2, 3, 1).numpy()
    path = tmp_path / "a.npz"
    np.savez(path, arr_0=pixels, mu=np.arange(2048.0), sigma=np.eye(2048))
    file = FileStatistics(path, ImageFeatures(ArrayImages(path), extractor))
    assert np.array_equal(file.statistics(POOLED)["mu"], np.arange(2048.0)) and Counting.runs == 0
    expected = feature_statistics(cifar_test[0][:20], batch_size=64)
    assert np.array_equal(file.statistics(CIFAR10_LAYER)["mu"], expected.mu)
    assert file.features(CIFAR10_LAYER).shape == (20, 256) and Counting.runs == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(256), "sigma": np.zeros((3, 3))}, r"found \[256\] and \[3, 3\]"),
        ({"mu": np.zeros(256), "sigma": np.full((256, 256), "a")}, "sigma: expected numbers, found <U1"),
        ({"mu": np.zeros(256), "sigma": np.eye(256), "n": [1, 2]}, r"n: expected a number of images.*\[2\]"),
        ({"mu": np.zeros(256), "sigma": np.eye(256), "n": np.inf}, "n: expected a number of images"),
        ({"mu": np.full(256, np.nan), "sigma": np.eye(256)}, "expected finite statistics"),
    ],
    ids=["shape", "text", "counts", "infinite", "NaN"],
)
def test_wrong_statistics_are_an_error(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        FileStatistics(tmp_path / "a.npz").statistics(CIFAR10_LAYER)


def test_too_few_images_are_named():
    features = torch.randn(5, 4)
    with pytest.raises(NotThere, match="subsets of 6 images, and there are 5; give a smaller size of subsets"):
        kernel_distance(features, torch.randn(9, 4), 3, 6)
    with pytest.raises(NotThere, match="5 neighbours, and there are 5 images"):
        precision_recall(features, torch.randn(9, 4), 5)

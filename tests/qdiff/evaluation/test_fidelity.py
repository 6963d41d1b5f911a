import numpy as np
import pytest
import torch
import torch_fidelity
from torch.utils.data import Subset

from qdiff.evaluation import features
from qdiff.evaluation.fidelity import (
    Statistics,
    fd_cifar10,
    feature_statistics,
    frechet_distance,
    load_train_statistics,
)


@pytest.fixture(scope="module")
def halves(cifar_test):
    images, _ = cifar_test
    return images[:100], 255 - images[100:]


def gaussians(seed, width=16):
    """Two Gaussians whose covariances share their eigenvectors, and the distance between them in closed form."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.standard_normal((width, width)))
    variances = rng.uniform(0.1, 4, (2, width))
    means = rng.standard_normal((2, width))
    a, b = (Statistics(mu, (axes * v) @ axes.T, 1000) for mu, v in zip(means, variances, strict=True))
    roots = np.sqrt(variances)
    return a, b, ((means[0] - means[1]) ** 2).sum() + ((roots[0] - roots[1]) ** 2).sum()


@pytest.mark.parametrize("seed", range(3))
def test_commuting_gaussians_have_the_closed_form(seed):
    a, b, expected = gaussians(seed)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_the_same_statistics_are_at_no_distance():
    train = load_train_statistics()
    assert abs(frechet_distance(train, train)) < 1e-8


def by_symmetric_roots(a, b):
    """The distance once more, from eigenvalues of symmetric matrices."""
    values, axes = np.linalg.eigh(a.sigma)
    root = (axes * np.sqrt(values.clip(0))) @ axes.T
    roots = np.sqrt(np.linalg.eigvalsh(root @ b.sigma @ root).clip(0)).sum()
    return ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * roots


def test_an_independent_computation_agrees(cifar_test):
    train, images = load_train_statistics(), cifar_test[0][:60]
    found = feature_statistics(images)
    assert frechet_distance(found, train) == pytest.approx(by_symmetric_roots(train, found), abs=1e-6)
    network = features.Cifar10Features.load()
    with torch.no_grad():
        values = torch.cat([network(batch / 127.5 - 1)[0] for batch in images.split(37)]).double().numpy()
    own = Statistics(values.mean(0), np.cov(values.T), len(values))
    assert fd_cifar10(images) == pytest.approx(by_symmetric_roots(train, own), abs=1e-6)


def test_a_shift_of_the_mean_counts_squared():
    train = load_train_statistics()
    moved = Statistics(train.mu + 0.5, train.sigma, train.count)
    assert frechet_distance(train, moved) == pytest.approx(256 * 0.25, rel=1e-9)


def test_train_statistics_are_a_covariance_of_the_training_set():
    train = load_train_statistics()
    assert train.mu.shape == (256,) and train.sigma.shape == (256, 256) and train.count == 50_000
    assert np.array_equal(train.sigma, train.sigma.T)
    assert np.linalg.eigvalsh(train.sigma).min() > 0


def test_statistics_are_those_of_the_features(cifar_test):
    images = cifar_test[0][:50]
    found = feature_statistics(images, batch_size=50)
    with torch.no_grad():
        values = features.Cifar10Features.load()(images / 127.5 - 1)[0].double()
    torch.testing.assert_close(torch.from_numpy(found.mu), values.mean(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.from_numpy(found.sigma), values.T.cov(), rtol=1e-9, atol=1e-15)
    assert found.mu.dtype == found.sigma.dtype == np.float64 and found.count == 50


def test_the_batch_size_does_not_matter(cifar_test):
    images = cifar_test[0][:50]
    whole, parts = feature_statistics(images), feature_statistics(images, batch_size=7)
    np.testing.assert_allclose(parts.mu, whole.mu, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(parts.sigma, whole.sigma, rtol=1e-4, atol=1e-6)


def test_torch_fidelity_computes_the_same_from_data_sets(halves):
    features.register()
    one, two = halves
    found = torch_fidelity.calculate_metrics(
        input1=Subset(one, range(len(one))),
        input2=Subset(two, range(len(two))),
        fid=True,
        feature_extractor="cifar10-features",
        feature_layer_fid="256",
        batch_size=50,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = frechet_distance(feature_statistics(one, 50), feature_statistics(two, 50))
    assert ours == pytest.approx(found[torch_fidelity.KEY_METRIC_FID], rel=1e-6)


@pytest.mark.long
def test_real_images_are_nearest(cifar_test):
    images, _ = cifar_test
    noisy = (images + 20 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    real, worse = fd_cifar10(images), fd_cifar10(noisy.to(torch.uint8))
    assert real < 0.4  # 0.32 for these 200, 0.12 for the first 1,000: few images bias it upwards
    assert worse > 2 * real


def test_one_image_has_no_covariance(cifar_test):
    with pytest.raises(ValueError, match="at least 2 .* found 1"):
        feature_statistics(cifar_test[0][:1])


def test_float_images_are_an_error():
    with pytest.raises(ValueError, match="expected uint8"):
        fd_cifar10(torch.zeros(4, 3, 32, 32))


@pytest.mark.parametrize(
    ("mu", "sigma", "message"),
    [
        (np.zeros(3), np.zeros((2, 2)), r"found \(3,\), \(2, 2\)"),
        (np.zeros(2, np.float32), np.eye(2), "found mu float32"),
        (np.array([0, np.nan]), np.eye(2), "finite"),
    ],
    ids=["shape", "dtype", "NaN"],
)
def test_wrong_statistics_are_an_error(mu, sigma, message):
    with pytest.raises(ValueError, match=message):
        Statistics(mu, sigma, 10)


def test_statistics_of_different_widths_have_no_distance():
    with pytest.raises(ValueError, match="found 16 and 8 features"):
        frechet_distance(gaussians(0, 16)[0], gaussians(0, 8)[0])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.npz"):
        load_train_statistics(tmp_path / "absent.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"text"], ids=["empty", "damaged", "text"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "statistics.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"statistics\.npz: expected an npz"):
        load_train_statistics(path)


def test_a_file_without_the_covariance_is_named(tmp_path):
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.zeros(4), n=10)
    with pytest.raises(ValueError, match=r"statistics\.npz: .*sigma"):
        load_train_statistics(path)

"""Distances of pairs as networks see them."""

import pytest
import torch
from torch import nn
from torch_fidelity import sample_similarity_lpips

from qdiff.evaluation.features import Cifar10Features
from qdiff.evaluation.perceptual import LPIPS_FILES, Cifar10Distance, Lpips, lpips_folder


def test_equal_images_are_at_no_distance(cifar_test):
    images = cifar_test[0][:6]
    measure = Cifar10Distance()
    assert measure(images, images).abs().max() == 0
    found = measure(images[:3], images[3:])
    assert found.shape == (3,) and found.dtype == torch.float64 and (found > 0.1).all() and (found < 12).all()
    torch.testing.assert_close(found, measure(images[3:], images[:3]))


def test_it_grows_with_noise(cifar_test):
    images, measure = cifar_test[0][:8], Cifar10Distance()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found = [measure(images, (images + s * noise).clamp(0, 255).byte()).mean().item() for s in (2, 8, 32)]
    assert found == sorted(found) and found[0] < 0.3 * found[2]


@torch.no_grad()
def test_it_is_the_formula(cifar_test):
    one, two = cifar_test[0][:2], cifar_test[0][2:4]
    expected, network = 0, Cifar10Features.load()
    for a, b in zip(network.maps(one / 127.5 - 1), network.maps(two / 127.5 - 1), strict=True):
        unit_a, unit_b = a / a.square().sum(1, keepdim=True).sqrt(), b / b.square().sum(1, keepdim=True).sqrt()
        expected = expected + (unit_a - unit_b).square().sum(1).flatten(1).mean(1)
    torch.testing.assert_close(Cifar10Distance()(one, two), expected.double(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_last_map_is_what_features_are_means_of(cifar_test):
    network, x = Cifar10Features.load(), cifar_test[0][:2] / 127.5 - 1
    torch.testing.assert_close(network.maps(x)[-1].mean((2, 3)), network(x)[0], rtol=0, atol=0)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="expected uint8"):
        Cifar10Distance()(*torch.zeros(2, 1, 3, 16, 16, dtype=torch.uint8))


@pytest.fixture
def narrow_vgg(monkeypatch):
    """VGG16's convolutions with random weights, without the classifier's 120 M parameters."""
    network = nn.Module()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network.features = _features()
    monkeypatch.setattr(sample_similarity_lpips, "torchvision_load_pretrained_vgg16", lambda: network)
    return network.features


def _features():
    layers, width = [], 3
    for size in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if size == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(width, size, 3, padding=1), nn.ReLU(inplace=True)]
            nn.init.kaiming_normal_(layers[-2].weight)
            width = size
    return nn.Sequential(*layers)


@pytest.fixture
def weights(tmp_path, narrow_vgg):
    """The two files; of the first only that it is a file of tensors matters, since the network above is taken."""
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save({}, tmp_path / LPIPS_FILES[0])
    torch.save(linear, tmp_path / LPIPS_FILES[1])
    return tmp_path, linear


@torch.no_grad()
def test_lpips_is_the_formula(weights, narrow_vgg, cifar_test):
    folder, linear = weights
    one, two = cifar_test[0][:2], cifar_test[0][2:4]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected, taps = 0, (4, 9, 16, 23, 30)
    for i, stop in enumerate(taps):
        a, b = (narrow_vgg[:stop]((x / 255 - mean) / std) for x in (one, two))
        a, b = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (a, b))
        expected = expected + ((a - b).square() * linear[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))
    hub = torch.hub.get_dir()
    found = Lpips(folder)(one, two)
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5)
    assert torch.hub.get_dir() == hub and Lpips(folder)(one, one).tolist() == [0, 0]


def test_its_files_are_looked_for(weights, monkeypatch, tmp_path):
    assert lpips_folder(tmp_path) == tmp_path
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert lpips_folder(None) is None
    (tmp_path / LPIPS_FILES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{LPIPS_FILES[1]} is missing"):
        lpips_folder(tmp_path)


@pytest.mark.parametrize("content", ["text", "other"])
def test_other_weights_are_named(weights, content):
    folder, _ = weights
    if content == "text":
        (folder / LPIPS_FILES[1]).write_text("text")
    else:
        torch.save({"lin0": torch.ones(1)}, folder / LPIPS_FILES[1])
    with pytest.raises(ValueError, match=str(folder)) as caught:
        Lpips(folder)
    assert "\n" not in str(caught.value)

import shutil

import pytest
import torch
import torch_fidelity
from safetensors.torch import load_file, save_file
from torch.nn.functional import batch_norm, conv2d, relu
from torch.utils.data import Subset
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from qdiff.evaluation import features
from qdiff.evaluation.features import CLASSES, EXTRACTOR, Cifar10FeatureExtractor, Cifar10Features, models_folder


def bundled_weights():
    return models_folder() / "cifar10-features" / "model.safetensors"


def as_described(weights, images):
    """models/README.md once more, in functions over the file's tensors."""

    def unit(name, x, stride=1):
        x = conv2d(x, weights[f"{name}.0.weight"], stride=stride, padding=1)
        norm = [weights[f"{name}.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return relu(batch_norm(x, *norm))

    h = unit("c1", unit("stem", images), 2)
    h = h + unit("r1.1", unit("r1.0", h))
    h = unit("c2", h, 2)
    h = h + unit("r2.1", unit("r2.0", h))
    pooled = h.mean(dim=(2, 3))
    return pooled, pooled @ weights["fc.weight"].T + weights["fc.bias"]


@torch.no_grad()
def test_the_network_is_the_described_one(cifar_test):
    images = cifar_test[0][:8] / 127.5 - 1
    weights = {key: value.float() for key, value in load_file(bundled_weights()).items()}
    for found, expected in zip(Cifar10Features.load()(images), as_described(weights, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_it_names_most_test_images(cifar_test):
    images, labels = cifar_test
    _, logits = Cifar10Features.load()(images / 127.5 - 1)
    assert (logits.argmax(dim=1) == labels).float().mean() > 0.8  # 0.869 on all 10,000
    assert len(CLASSES) == 10 and CLASSES[labels[0]] == "cat" and CLASSES[labels[1]] == "ship"


def test_loaded_weights_are_float32_and_those_of_the_file():
    state = Cifar10Features.load().state_dict()
    stored = load_file(bundled_weights())
    assert state.keys() == stored.keys()
    for key, value in stored.items():
        expected = value.float() if value.is_floating_point() else value
        assert state[key].dtype == expected.dtype and torch.equal(state[key], expected), key


def test_the_extractor_answers_in_the_order_asked_for(cifar_test):
    features.register()
    images = cifar_test[0][:4]
    one = create_feature_extractor(EXTRACTOR, ["256", "logits"], cuda=False, verbose=False)
    other = create_feature_extractor(EXTRACTOR, ["logits", "256"], cuda=False, verbose=False)
    pooled, logits = one(images)
    assert pooled.shape == (4, 256) and logits.shape == (4, 10)
    swapped = other(images)
    assert torch.equal(swapped[0], logits) and torch.equal(swapped[1], pooled)


def test_inception_score_takes_the_logits(cifar_test):
    features.register()
    images = cifar_test[0]
    options = {"cuda": False, "verbose": False, "cache": False, "save_cpu_ram": True, "isc_splits": 1}
    found = torch_fidelity.calculate_metrics(
        input1=Subset(images, range(len(images))),
        isc=True,
        feature_extractor=EXTRACTOR,
        samples_shuffle=False,
        **options,
    )
    with torch.no_grad():
        p = Cifar10Features.load()(images / 127.5 - 1)[1].double().softmax(dim=1)
    expected = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp().item()
    assert found["inception_score_mean"] == pytest.approx(expected, rel=1e-4)


def test_registering_twice_is_registering_once():
    features.register()
    features.register()
    assert FEATURE_EXTRACTORS_REGISTRY[EXTRACTOR] is Cifar10FeatureExtractor


def test_a_taken_name_is_an_error(monkeypatch):
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, EXTRACTOR, torch_fidelity.FeatureExtractorBase)
    with pytest.raises(ValueError, match="cifar10-features"):
        features.register()


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(2, 3, 32, 32), r"float32 \[2, 3, 32, 32\]"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"uint8 \[2, 32, 32, 3\]"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"uint8 \[3, 32, 32\]"),
    ],
    ids=["float", "channels last", "one image"],
)
def test_other_images_are_an_error(images, found):
    with pytest.raises(ValueError, match=rf"expected uint8 \[N, 3, 32, 32\], found {found}"):
        features.require_cifar_images(images)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        Cifar10Features.load(tmp_path / "absent.safetensors")


def test_other_weights_are_an_error_of_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    weights = load_file(bundled_weights())
    del weights["fc.bias"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*fc\.bias") as caught:
        Cifar10Features.load(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    shutil.copy(bundled_weights(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Cifar10Features.load(path)


def test_a_package_without_models_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(features, "__file__", str(tmp_path / "qdiff" / "evaluation" / "features.py"))
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path / 'models'}"):
        models_folder()

"""Feature networks: torch-fidelity's Inception with one more layer, and files of weights."""

import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from qdiff.evaluation import extractors
from qdiff.evaluation.extractors import (
    CIFAR10,
    CIFAR10_LAYER,
    INCEPTION,
    LOGITS,
    POOLED,
    SPATIAL,
    VGG,
    WIDTHS,
    Extractor,
    fetch_weights,
    found_weights,
    too_few,
)
from qdiff.evaluation.features import Cifar10Features
from qdiff.evaluation.images import open_images


@pytest.fixture(scope="module")
def images(tmp_path_factory, cifar_test):
    """Three images whose order by name is not torch-fidelity's."""
    folder = tmp_path_factory.mktemp("images")
    for name, image in zip(("1", "2", "10"), cifar_test[0], strict=False):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return open_images(folder)


@torch.no_grad()
def test_inception_gives_torch_fidelitys_features_and_the_spatial_ones(inception_weights, images):
    found = Extractor(INCEPTION, (SPATIAL, POOLED, LOGITS), inception_weights).features(images)
    theirs = FeatureExtractorInceptionV3("theirs", [POOLED, LOGITS], feature_extractor_weights_path=inception_weights)
    kept = []
    theirs.Mixed_6d.register_forward_hook(lambda module, inputs, output: kept.append(output))
    batch = torch.stack([images.image(i) for i in images.fidelity_order])
    pooled, logits = theirs(batch)
    assert torch.equal(found[POOLED], pooled) and torch.equal(found[LOGITS], logits)
    # The block joins its branches, the 1×1 one first.
    assert torch.equal(found[SPATIAL], kept[0][:, :7].flatten(1))
    assert found[SPATIAL].shape == (3, 2023) and found[SPATIAL].std(0).mean() > 0
    assert {layer: found[layer].shape[1] for layer in (POOLED, SPATIAL)} == {k: WIDTHS[k] for k in (POOLED, SPATIAL)}


def test_the_spatial_layer_alone(inception_weights, images):
    told = []
    found = Extractor(INCEPTION, (SPATIAL,), inception_weights, batch_size=2).features(images, told.append)
    assert list(found) == [SPATIAL] and found[SPATIAL].shape == (3, 2023) and told == [0, 2, 1]


@torch.no_grad()
def test_the_bundled_network_takes_torch_fidelitys_order(images):
    found = Extractor(CIFAR10, (CIFAR10_LAYER,), found_weights(CIFAR10)).features(images)[CIFAR10_LAYER]
    batch = torch.stack([images.image(i) for i in (0, 2, 1)])  # 1.png, 10.png, 2.png
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, Cifar10Features.load()(batch / 127.5 - 1)[0].double(), rtol=1e-6, atol=1e-6)


def test_other_weights_are_named(tmp_path, images):
    path = tmp_path / "weights.pth"
    path.write_text("text")
    with pytest.raises(ValueError, match="weights.pth: not a readable file of weights"):
        Extractor(INCEPTION, (POOLED,), path).features(images)
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="weights.pth: expected weights of inception") as caught:
        Extractor(INCEPTION, (POOLED,), path).features(images)
    assert "\n" not in str(caught.value)


def test_a_file_that_would_run_code_is_refused(tmp_path, images):
    torch.save({"x": pytest.approx(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="only tensors and plain containers are read"):
        Extractor(INCEPTION, (POOLED,), tmp_path / "weights.pth").features(images)


def test_digests_depend_on_weights_and_batches(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    digests = {
        Extractor(INCEPTION, (POOLED,), first).digest(),
        Extractor(INCEPTION, (POOLED,), second).digest(),
        Extractor(INCEPTION, (POOLED,), first, batch_size=32).digest(),
    }
    assert len(digests) == 3
    assert Extractor(INCEPTION, (SPATIAL,), first).digest() in digests  # layers have keys of their own


def test_weights_are_looked_for_where_torch_fidelity_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert found_weights(INCEPTION) is None and found_weights(VGG) is None and found_weights(CIFAR10).is_file()
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"")
    assert found_weights(INCEPTION) == path


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fail(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(extractors.torch.hub, "download_url_to_file", fail)
    for name in (INCEPTION, VGG):
        with pytest.raises(ValueError, match="download: https://.* cannot be had: no network"):
            fetch_weights(name)


def test_layers_that_have_too_few_images():
    assert too_few(256, [POOLED, CIFAR10_LAYER]) == [POOLED, CIFAR10_LAYER]
    assert too_few(257, [POOLED, CIFAR10_LAYER]) == [POOLED] and too_few(2049, [POOLED]) == []

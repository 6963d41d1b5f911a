"""Which bytes weights are: both forms compute the same, and a session runs one that its CPU multiplies exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ddim.pretrained import load_config, load_pretrained
from ldm.pretrained import load_config as load_latent_config
from ldm.pretrained import load_model
from qdiff.calibration.calibrate import calibrate
from qdiff.calibration.selectors import CalibrationSet
from qdiff.deploy.convert import integer_network
from qdiff.deploy.onnx import weight_types
from qdiff.deploy.onnx.export import export_onnx, make_model
from qdiff.deploy.onnx.session import OnnxNetwork
from qdiff.deploy.onnx.weight_types import fastest_exact, is_exact, may_saturate, uint8_weights, with_uint8_weights
from qdiff.families import adapter_for
from qdiff.recipes.recipe import QuantSpec, Recipe
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

REPOSITORY = Path(__file__).parents[4]
RANGES = (WeightRanges(RangeSpec()), ActivationRanges())
W8A8 = Recipe("w8a8", QuantSpec(8, axis="out_channel"), QuantSpec(8), stages=RANGES)
SIGNED = Recipe("signed", QuantSpec(8, "signed", "out_channel"), QuantSpec(8, "signed"), stages=RANGES)
W7A8 = Recipe("w7a8", QuantSpec(7, "signed", "out_channel"), QuantSpec(8), stages=RANGES)
SIZE = (3, 8, 8)


def saturating(a, b, form, constant):
    """A CPU without VNNI: sums of two neighbouring products with int8 are cut off at 16 bits."""
    shifted = form == "uint8" and (not constant or np.abs(b.astype(int)).max() > 64)
    products = a[..., :, :, None].astype(np.int64) * b[..., None, :, :]
    if shifted:
        return products.sum(-2)
    pad = [(0, 0)] * (products.ndim - 2) + [(0, products.shape[-2] % 2), (0, 0)]
    pairs = np.pad(products, pad).reshape(*products.shape[:-2], -1, 2, products.shape[-1]).sum(-2)
    return pairs.clip(-(2**15), 2**15 - 1).sum(-2)


@pytest.fixture
def without_vnni(monkeypatch):
    monkeypatch.setattr(weight_types, "product", saturating)
    for cached in (is_exact, fastest_exact):
        cached.cache_clear()
    yield
    for cached in (is_exact, fastest_exact):
        cached.cache_clear()


@pytest.fixture
def batch(generator):
    return torch.randn(3, *SIZE, generator=generator), torch.tensor([900, 500, 20])


def test_uint8_is_exact_on_this_machine_too():
    assert is_exact("uint8") and is_exact(fastest_exact())


def test_without_vnni_the_form_is_uint8(without_vnni):
    assert not is_exact("int8") and is_exact("uint8") and fastest_exact() == "uint8"


def test_a_cpu_without_any_exact_product_is_refused(without_vnni, monkeypatch):
    monkeypatch.setattr(weight_types, "product", lambda a, b, form, constant: a.astype(int) @ b.astype(int) + 1)
    with pytest.raises(ValueError, match="^runtime onnx: expected exact products of bytes, found inexact ones"):
        fastest_exact()


@pytest.mark.parametrize("recipe", [W8A8, SIGNED, W7A8], ids=lambda r: r.name)
def test_both_forms_give_the_same_bits(recipe, quantized, adapter, batch, exported, dialect):
    """Sessions make the form int8 exact where it is not, so that they can be compared on any machine."""
    network = quantized(recipe, 64)
    model = make_model(network, adapter, SIZE, dialect=dialect)
    int8 = OnnxNetwork(model.SerializeToString(), threads=1)(*batch)
    uint8 = OnnxNetwork(with_uint8_weights(model).SerializeToString(), threads=1)
    assert torch.equal(uint8(*batch), int8)
    assert uint8.weight_type == ("uint8" if dialect == "runtime" else None)


@pytest.mark.parametrize(("recipe", "wide"), [(W8A8, True), (SIGNED, True), (W7A8, False)], ids=lambda x: str(x)[:14])
def test_weights_of_seven_bits_stay_int8(recipe, wide, quantized, adapter, dialect):
    model = make_model(quantized(recipe, 64), adapter, SIZE, dialect=dialect)
    runtime = dialect == "runtime"  # which has computed operands of 8 bits, and no uint8 codes of affine grids
    assert may_saturate(model) == (runtime or recipe is SIGNED)
    with_uint8_weights(model)
    assert not may_saturate(model) and bool(uint8_weights(model)) == wide
    small = [t for t in model.graph.initializer if t.data_type == 3]  # INT8
    assert all(np.abs(np.frombuffer(t.raw_data, np.int8).astype(int)).max() <= 64 for t in small)


def test_a_session_runs_a_form_that_is_exact_here(without_vnni, quantized, adapter, batch, tmp_path, monkeypatch):
    """From memory, from a file of either form, and from one of an older version, which does not say its form."""
    network = quantized(W8A8, 64)
    expected = OnnxNetwork.of(network, adapter, SIZE)
    assert expected.weight_type == "uint8"
    for form in ("int8", "uint8"):
        export_onnx(network, adapter, tmp_path / "network.onnx", SIZE, weight_type=form)
        model = OnnxNetwork(tmp_path / "network.onnx")
        assert model.weight_type == "uint8" and torch.equal(model(*batch), expected(*batch))
    old = make_model(network, adapter, SIZE)
    (entry,) = old.metadata_props
    entry.value = json.dumps({k: v for k, v in json.loads(entry.value).items() if k != "weights"})
    monkeypatch.setattr("qdiff.deploy.onnx.session.KEPT_BYTES", 10_000)  # larger ones are kept in files
    model = OnnxNetwork(old.SerializeToString())
    assert model.weight_type == "uint8" and torch.equal(model(*batch), expected(*batch))


def test_an_unknown_form_is_refused(quantized, adapter, tmp_path):
    with pytest.raises(ValueError, match="weight_type: expected one of int8, uint8, found 'int4'"):
        export_onnx(quantized(W8A8, 64), adapter, tmp_path / "network.onnx", SIZE, weight_type="int4")


def bundled(name):
    """(float network, adapter, states) of a bundled model."""
    generator, context = torch.Generator().manual_seed(0), None
    if name == "cifar10-ddim":
        network, _ = load_pretrained(load_config(REPOSITORY / "configs" / "cifar10-small.yml"))
        adapter, shape = adapter_for("ddim"), (3, 32, 32)
    else:
        folder = REPOSITORY / "models" / name
        network = load_model(load_latent_config(folder / "config.yaml"), folder / "model.safetensors")
        network, adapter = network.model.diffusion_model, adapter_for("ldm")
        shape = (network.in_channels, 8, 8)
        if width := adapter.config_of(network).get("context_dim"):
            context = torch.randn(4, 77, width, generator=generator)
    x, t = torch.randn(4, *shape, generator=generator), torch.tensor([980.0, 700, 300, 20])
    return network, adapter, CalibrationSet(x, t, torch.arange(4), context)


@pytest.mark.parametrize("name", ["cifar10-ddim", "cifar10-ldm", "cifar10-sd"])
def test_bundled_models_without_vnni(name, without_vnni, in_double):
    """Saturating products put W8A8 4 to 12 % off. What remains is float32 around the products, as in the reference."""
    network, adapter, states = bundled(name)
    network = calibrate(network, adapter, W8A8, states, 0, states.t).network
    arguments = [x for x in (states.x, states.t, states.context) if x is not None]
    expected, reference = in_double(network, *arguments), integer_network(network)(*arguments)
    sizes = tuple(states.x.shape[1:]), None if states.context is None else tuple(states.context.shape[1:])
    found = OnnxNetwork.of(network, adapter, *sizes)
    assert found.weight_type == "uint8"
    wrong = [((out - expected).norm() / expected.norm()).item() for out in (found(*arguments), reference)]
    assert wrong[0] < max(1.5 * wrong[1], 0.01)

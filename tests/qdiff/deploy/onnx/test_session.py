"""The module around ONNX Runtime: calls, batches, files, and what is refused."""

import json
import sys

import onnx
import pytest
import torch
from torch import nn

from qdiff.deploy.onnx import export
from qdiff.deploy.onnx.export import export_onnx, make_model
from qdiff.deploy.onnx.session import OnnxNetwork
from qdiff.recipes.recipe import QuantSpec, Recipe, StepGroups
from qdiff.recipes.stages import ActivationRanges, RangeSpec, WeightRanges

RANGES = (WeightRanges(RangeSpec()), ActivationRanges())
W8A8 = Recipe("w8a8", QuantSpec(8, axis="out_channel"), QuantSpec(8), stages=RANGES)
WEIGHTS = Recipe("weights only", QuantSpec(8, axis="out_channel"), stages=RANGES[:1])
SIZE = (3, 8, 8)


@pytest.fixture
def network(quantized):
    return quantized(W8A8, 64)


@pytest.fixture
def batch(generator):
    return torch.randn(7, *SIZE, generator=generator), torch.tensor([999, 5, 300, 700, 0, 20, 650])


@pytest.fixture
def model(network, adapter):
    return OnnxNetwork.of(network, adapter, SIZE, threads=2)


def test_it_stands_in_for_a_network(model, batch):
    x, t = batch
    parameter = next(model.parameters())
    assert (parameter.device.type, parameter.dtype, parameter.numel()) == ("cpu", torch.float32, 0)
    expected = model(x, t)
    assert expected.dtype == torch.float32 and not expected.requires_grad
    assert model(x.double(), t).dtype == torch.float64 and model(x.bfloat16(), t).dtype == torch.bfloat16
    assert torch.equal(model(x, t.float()), expected) and torch.equal(model(x=x, t=t), expected)
    assert torch.equal(model(x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), t), expected)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_samples_do_not_depend_on_how_a_batch_is_cut(quantized, adapter, batch, monkeypatch, count):
    x, t = batch
    model = OnnxNetwork.of(quantized(WEIGHTS, 64), adapter, SIZE, threads=2)
    whole = model(x, t)
    monkeypatch.setattr("qdiff.deploy.onnx.session.PIECE_BYTES", 1)
    found = model(x[:count], t[:count])
    assert found.shape == (count, *SIZE) and torch.allclose(found, whole[:count], atol=1e-5)


def test_a_file_runs_like_the_network_in_memory(network, adapter, model, batch, tmp_path):
    path = tmp_path / "network.onnx"
    export_onnx(network, adapter, path, SIZE)
    assert torch.equal(OnnxNetwork(path)(*batch), model(*batch))
    about = json.loads({p.key: p.value for p in onnx.load(path).metadata_props}["qdiff"])
    assert about["dialect"] == "runtime" and about["family"] == "ddim" and about["toolkit"]


def test_large_constants_go_to_a_file_beside(network, adapter, model, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "INLINE_BYTES", 10_000)
    path = tmp_path / "network.onnx"
    for _ in range(2):  # the second time over the first
        export_onnx(network, adapter, path, SIZE)
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert set(sizes) == {"network.onnx", "network.onnx.data"} and sizes["network.onnx"] < sizes["network.onnx.data"]
    onnx.checker.check_model(str(path))
    assert torch.equal(OnnxNetwork(path)(*batch), model(*batch))
    monkeypatch.setattr("qdiff.deploy.onnx.session.KEPT_BYTES", 10_000)
    assert torch.equal(OnnxNetwork.of(network, adapter, SIZE)(*batch), model(*batch))


def test_files_are_about_as_large_as_the_codes(network, adapter, tmp_path):
    weights = sum(p.numel() for p in network.parameters() if p.dim() > 1)
    for dialect in export.DIALECTS:
        size = len(make_model(network, adapter, SIZE, dialect=dialect).SerializeToString())
        assert weights < size < 1.6 * weights + 400_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t: (x[:, :, :4], t), r"takes x of shape \[7, 3, 8, 8\], found \[7, 3, 4, 8\]"),
        (lambda x, t: (x, t[:3]), r"takes t of shape \[7\], found \[3\]"),
        (lambda x, t: (x, t, x), "takes t, x, found context, t, x"),
    ],
    ids=["size", "timesteps", "context"],
)
def test_inputs_of_other_shapes_are_refused(model, batch, change, message):
    with pytest.raises(ValueError, match=f"the ONNX model {message}"):
        model(*change(*batch))


def test_labels_and_sizes_of_a_conditioned_network(quantized_latent, latent_adapter, latent_states):
    network, data = quantized_latent(W8A8, "labels"), latent_states("labels")
    model = OnnxNetwork.of(network, latent_adapter, SIZE, ())
    x, t, y = data.x[:4], data.t[:4], data.context[:4]
    assert (model(x, t, y) - network(x, t, y)).norm() < 0.05 * x.norm()
    with pytest.raises(ValueError, match="takes context, t, x, found t, x"):
        model(x, t)
    with pytest.raises(ValueError, match="labels are needed"):
        OnnxNetwork.of(network, latent_adapter, SIZE)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(network, adapter, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"^runtime onnx: needs ONNX Runtime, found none: pip install '.\[onnx\]'$"):
        OnnxNetwork.of(network, adapter, SIZE)


def test_what_is_no_model_of_ours_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.onnx: no such ONNX model"):
        OnnxNetwork(tmp_path / "nowhere.onnx")
    path = tmp_path / "text.onnx"
    path.write_text("text")
    with pytest.raises(ValueError, match="text.onnx: not a readable ONNX model") as error:
        OnnxNetwork(path)
    assert "\n" not in str(error.value)
    info = onnx.helper.make_tensor_value_info("x", 1, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", 1, [1])
    graph = onnx.helper.make_graph([node], "other", [info], [out])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    with pytest.raises(ValueError, match="expected a model of qdiff's ONNX export"):
        OnnxNetwork(path)


def test_arguments_at_odds(network, adapter, quantized):
    from dataclasses import replace

    grouped = quantized(replace(W8A8, step_groups=StepGroups(3)), 64)
    for arguments, message in [
        ({"dialect": "tflite"}, "dialect: expected one of runtime, portable, portable-4bit, found 'tflite'"),
        ({"parameter_set": 3}, "parameter_set: expected 0 to 2, found 3"),
        ({"dialect": "portable"}, "holds one of the network's 3 parameter sets; give parameter_set"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_model(grouped, adapter, SIZE, **arguments)
    one = OnnxNetwork(make_model(grouped, adapter, SIZE, parameter_set=1).SerializeToString())
    assert one.step_table is None


def test_a_network_without_a_step_table(make, plain_adapter, batch):
    network = make(lambda n, x, t: n.conv(x) + t[:, None, None, None], conv=nn.Conv2d(3, 3, 3, padding=1))
    x, t = batch
    assert torch.allclose(OnnxNetwork.of(network, plain_adapter, SIZE)(x, t), network(x, t), atol=1e-4)

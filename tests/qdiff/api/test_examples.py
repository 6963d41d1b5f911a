"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import onnxruntime
import pytest
import torch

import qdiff
from qdiff.calibration.context import Progress
from qdiff.calibration.stages import STAGE_HANDLERS
from qdiff.checkpoints.qdiffusion import save_published
from qdiff.methods import METHODS
from qdiff.nn.layers import quant_layers
from qdiff.recipes.stages import STAGES

REPOSITORY = Path(__file__).parents[3]


def example(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Where a reader of the examples is."""
    monkeypatch.chdir(REPOSITORY)


def test_calibrate_and_compare(capsys, config):
    found = example("calibrate_and_compare").main(config, samples=2, steps=3, images=2, iterations=1, batch_size=2)
    assert list(found) == ["nearest", "quick"] and all(value > 0 for value in found.values())
    assert f"quick: {found['quick']:.2f} dB" in capsys.readouterr().out


def test_own_stage(capsys):
    module = example("own_stage")
    try:
        quantized = module.main(steps=2, samples=2, deviations=1.0)
        plain = qdiff.Recipe.from_dict(quantized.recipe.to_dict())
        assert plain.stages[1].deviations == 1.0 and "clipped: " in capsys.readouterr().out
        for name, layer in quant_layers(quantized.network).items():
            weight = quantized.model.network.get_submodule(name).weight.flatten(1)
            ends = layer.weight_quantizers[0].scale.flatten() * 15
            assert (ends <= 2 * weight.std(1) * 1.0001 + 1e-6).all(), name
    finally:
        STAGE_HANDLERS.pop(STAGES.pop("clip_weights", None), None)
        METHODS.pop("clipped", None)


def test_original_to_onnx(tmp_path):
    model = qdiff.load_model("configs/cifar10-small.yml")
    data = model.record(2, steps=2)
    options = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True, "split": True}
    settings = qdiff.CalibrationSettings(progress=Progress())
    states = {"selector_steps": 2, "per_step": 2}
    quantized = qdiff.quantize(model, method="nearest", data=data, settings=settings, **options, **states)
    weights = {n: model.network.get_submodule(n).weight.detach() for n in quant_layers(quantized.network)}
    save_published(tmp_path / "ckpt.pth", quantized.network, quantized.adapter, quantized.recipe, weights)
    found = example("original_to_onnx").main(
        "configs/cifar10-small.yml", str(tmp_path / "ckpt.pth"), str(tmp_path / "model.onnx")
    )
    assert {i.name for i in onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()} == {"x", "t"}
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([700, 20])
    assert (found(x, t) - quantized(x, t)).norm() < 0.3 * quantized(x, t).norm()

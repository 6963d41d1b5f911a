"""The Python interface: what the command lines can do, it can."""

import sys
from dataclasses import dataclass, replace

import pytest
import torch
from latents import pixels, write_model
from running import call, only_run, passed

import qdiff
from qdiff.calibration.context import Progress
from qdiff.calibration.stages import STAGE_HANDLERS
from qdiff.methods import METHODS
from qdiff.nn.layers import QuantLayer, quant_layers
from qdiff.recipes.recipe import Selector
from qdiff.recipes.stages import STAGES, ActivationRanges, RangeSpec, WeightRanges
from qdiff.utils.errors import FieldError

NEAREST = {"method": "nearest", "weight_bits": 4, "act_bits": 8, "selector_steps": 2, "per_step": 2}
FEW = Selector(steps=2, per_step=2)
QUIET = qdiff.CalibrationSettings(progress=Progress())


@pytest.fixture(scope="module")
def model(config):
    return qdiff.load_model(config)


@pytest.fixture(scope="module")
def data(model):
    return model.record(3, steps=4, batch_size=2, seed=5)


@pytest.fixture(scope="module")
def quantized(model, data):
    return qdiff.quantize(model, data=data, settings=QUIET, **NEAREST)


def test_importing_it_is_cheap():
    import subprocess

    told = "import sys, qdiff; print('torch' in sys.modules, sorted(set(qdiff.__all__) - set(dir(qdiff))))"
    found = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["False", "[]"]
    assert all(getattr(qdiff, name) is not None for name in qdiff.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        qdiff.nothing  # noqa: B018


def test_images_are_those_of_the_script(config, model, tmp_path):
    flags = ("--config", config, "--use_pretrained", "--timesteps", 4, "--max_images", 3, "--seed", 9)
    passed(call("sample_diffusion_ddim", *flags, "-l", tmp_path))
    expected = [pixels(path) for path in sorted((only_run(tmp_path) / "img").iterdir())]
    found = model.sample(3, steps=4, seed=9, batch_size=2)
    assert found.shape == (3, 3, 16, 16)
    for image, picture in zip(found, expected, strict=True):
        assert torch.equal((255 * image + 0.5).to(torch.uint8).permute(1, 2, 0), picture)


def test_calibration_data_go_on_where_they_stopped(model, data, tmp_path, monkeypatch):
    assert (data.steps, data.samples) == (4, 3)
    options = {"steps": 4, "batch_size": 2, "seed": 5, "folder": tmp_path / "states"}
    calls, predict = [], model.loaded.predictor
    monkeypatch.setattr(model.loaded, "predictor", lambda *args: calls.append(args[2]) or predict(*args))
    found = model.record(3, **options)
    assert all(torch.equal(a, b) for a, b in zip(found.xs, data.xs, strict=True)) and len(calls) == 2
    (tmp_path / "states" / "shard_00001.safetensors").unlink()
    again = model.record(3, **options)
    assert all(torch.equal(a, b) for a, b in zip(again.xs, data.xs, strict=True)) and len(calls) == 3
    with pytest.raises(ValueError, match="shard_00000.safetensors: made with seed 5, this run has 6"):
        model.record(3, **options | {"seed": 6})


def test_quantized_as_the_script_quantizes(config, quantized, data, tmp_path):
    """The same codes, from the same seeds."""
    flags = ("--config", config, "--use_pretrained", "--timesteps", 4, "--max_images", 2, "--seed", 5)
    bits = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8, "--method", "nearest")
    passed(call("sample_diffusion_ddim", *flags, *bits, "--cali_st", 2, "--cali_n", 2, "-l", tmp_path))
    theirs = qdiff.load(only_run(tmp_path) / "ckpt.safetensors")
    layers = quant_layers(theirs.network)
    assert layers.keys() == quant_layers(quantized.network).keys()
    for name, layer in quant_layers(quantized.network).items():
        assert torch.equal(layer.codes, layers[name].codes), name
    assert theirs.recipe == quantized.recipe


@pytest.mark.parametrize("runtime", ["simulate", "integer", "onnx"])
def test_saved_loaded_and_run(model, quantized, tmp_path, runtime):
    quantized.save(tmp_path / "w4a8.safetensors")
    loaded = qdiff.load(tmp_path / "w4a8.safetensors", runtime, model=model)
    images, expected = loaded.sample(2, steps=4), quantized.sample(2, steps=4)
    assert (images - expected).norm() < (0.2 if runtime != "simulate" else 1e-6) * expected.norm()
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([900, 20])
    assert (loaded(x, t) - quantized(x, t)).norm() < 0.2 * quantized(x, t).norm()
    assert loaded.recipe == quantized.recipe and loaded.provenance["seed"] == 0
    assert any(isinstance(m, QuantLayer) for m in loaded.network.modules()) == (runtime == "simulate")
    if runtime == "integer":
        with pytest.raises(ValueError, match="^save: the model was loaded to run in integers"):
            loaded.save(tmp_path / "again.safetensors")
    if runtime == "simulate":
        loaded.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "w4a8.safetensors").read_bytes()
        assert torch.equal(quantized.prepare("simulate")(x, t), quantized(x, t))


def test_a_packed_file_alone_does_not_sample(quantized, tmp_path):
    quantized.save(tmp_path / "w4a8.safetensors")
    with pytest.raises(ValueError, match="^model: a packed file holds the network alone"):
        qdiff.load(tmp_path / "w4a8.safetensors").sample(1)


def test_a_bare_network_with_tensors_of_states(model, data):
    x, t = torch.cat(data.xs), torch.cat(data.ts)
    found = qdiff.quantize(model.network, data=(x, t), settings=QUIET, **NEAREST)
    assert (found(x, t) - model.network(x, t)).norm() < 0.5 * x.norm()
    with pytest.raises(ValueError, match="^data: a bare network cannot be sampled"):
        qdiff.quantize(model.network, settings=QUIET, **NEAREST)
    with pytest.raises(ValueError, match="^network: expected one of DDPMUNet, UNetModel, found Linear"):
        qdiff.quantize(torch.nn.Linear(2, 2), data=(x, t), settings=QUIET)


def test_a_killed_calibration_goes_on(model, data, tmp_path):
    """What was recorded is not learned again, and the result is the same."""

    class Killed(Progress):
        def unit(self, report, done, total, restored=False):
            if done == 2:
                raise KeyboardInterrupt

    quick = {**NEAREST, "method": "quick", "iterations": 2, "batch_size": 2}
    folder = tmp_path / "record"
    with pytest.raises(KeyboardInterrupt):
        settings = qdiff.CalibrationSettings(folder=folder, progress=Killed())
        qdiff.quantize(model, data=data, settings=settings, **quick)
    restored = []

    class Watching(Progress):
        def unit(self, report, done, total, restored_=False, **known):
            restored.append(known.get("restored", restored_))

    found = qdiff.quantize(
        model, data=data, settings=qdiff.CalibrationSettings(folder=folder, progress=Watching()), **quick
    )
    expected = qdiff.quantize(model, data=data, settings=QUIET, **quick)
    assert sum(restored) == 2
    for name, layer in quant_layers(expected.network).items():
        assert torch.equal(layer.codes, quant_layers(found.network)[name].codes)


def test_recipes_of_ones_own(model, data, tmp_path):
    recipe = qdiff.make_recipe("nearest", qdiff.MethodOptions(weight_bits=3, selector_steps=2, per_step=2))
    (tmp_path / "mine.yml").write_text(recipe.to_yaml())
    found = [qdiff.quantize(model, r, data=data, settings=QUIET) for r in (recipe, tmp_path / "mine.yml")]
    assert found[0].recipe == found[1].recipe == recipe
    changed = qdiff.quantize(model, recipe, data=data, changes=["weights.bits=5"], settings=QUIET)
    assert changed.recipe.weights.bits == 5
    with pytest.raises(ValueError, match="^weight_bits: the recipe holds it"):
        qdiff.quantize(model, recipe, data=data, weight_bits=4, settings=QUIET)


@dataclass(frozen=True)
class Shrink:
    """A stage of one's own: bring every weight scale down by a factor."""

    factor: float = 0.5


def shrink(run, stage, number):
    for layer in quant_layers(run.network).values():
        for quantizer in layer.weight_quantizers:
            quantizer.set_grid(replace(quantizer.grid, scale=quantizer.scale * stage.factor))


@pytest.fixture
def plugged_in():
    qdiff.register_stage("shrink", Shrink, shrink)

    def method(options):
        grid = qdiff.QuantSpec(options.weight_bits, axis="out_channel")
        return qdiff.Recipe("mine", grid, selector=FEW, stages=(WeightRanges(RangeSpec()), Shrink(0.25)))

    qdiff.register_method("mine", method)
    yield
    del STAGES["shrink"], STAGE_HANDLERS[Shrink], METHODS["mine"]


def test_a_stage_and_a_method_from_outside_the_package(model, data, tmp_path, plugged_in):
    found = qdiff.quantize(model, data=data, method="mine", weight_bits=4, settings=QUIET)
    theirs = quant_layers(make_ranges(model, data))
    for name, layer in quant_layers(found.network).items():
        assert torch.equal(layer.weight_quantizers[0].scale, 0.25 * theirs[name].weight_quantizers[0].scale)
    found.save(tmp_path / "mine.safetensors")
    assert qdiff.load(tmp_path / "mine.safetensors").recipe.stages[1] == Shrink(0.25)
    assert qdiff.Recipe.from_dict(found.recipe.to_dict()) == found.recipe
    changed = qdiff.quantize(model, data=data, method="mine", changes=["shrink.factor=0.125"], settings=QUIET)
    assert changed.recipe.stages[1].factor == 0.125
    with pytest.raises(ValueError, match="stage 'reconstruct': there is one of that name"):
        qdiff.register_stage("reconstruct", Shrink, shrink)
    with pytest.raises(ValueError, match="method 'quick': there is one of that name"):
        qdiff.register_method("quick", lambda options: None)


def make_ranges(model, data):
    recipe = qdiff.Recipe(
        "r", qdiff.QuantSpec(4, axis="out_channel"), selector=FEW, stages=(WeightRanges(RangeSpec()),)
    )
    return qdiff.quantize(model, recipe, data=data, settings=QUIET).network


def test_latent_and_text_models(tmp_path):
    text = qdiff.load_model(write_model(tmp_path / "sd", "sd").folder)
    assert (text.kind, text.family) == ("text", "ldm")
    with pytest.raises(FieldError, match="^prompts: the model takes prompts, found none"):
        text.sample(1, steps=2)
    options = {"steps": 2, "prompts": ["a cat", "a dog"], "scale": 2.0}
    images = text.sample(3, batch_size=2, **options)
    torch.testing.assert_close(images, text.sample(3, batch_size=3, **options), atol=1e-4, rtol=0)
    assert images.shape == (3, 3, 16, 16)
    data = text.record(2, **options)
    assert set(data.extra) == {"cs", "ucs"}
    found = qdiff.quantize(text, data=data, sampling=options, settings=QUIET, **NEAREST | {"selector_steps": 1})
    assert found.sample(2, **options).shape == (2, 3, 16, 16)
    classes = qdiff.load_model(write_model(tmp_path / "cin", "cin").folder)
    with pytest.raises(FieldError, match="^labels 9: expected labels from 0 to 4"):
        classes.sample(1, steps=2, labels=[9])
    assert classes.sample(2, steps=2, labels=[1, 3], scale=1.5).shape == (2, 3, 16, 16)


def test_options_that_a_model_does_not_have(model):
    for options, complaint in (
        ({"steps": 2000}, "steps 2000: expected at most 1000"),
        ({"sampler": "plms"}, "sampler plms: expected one of generalized"),
        ({"prompts": ["a"]}, "prompts: for latent models only"),
        ({"height": 32}, "height: for latent models only"),
    ):
        with pytest.raises(FieldError, match=f"^{complaint}"):
            model.sample(1, **{"steps": 2, **options})
    with pytest.raises(TypeError, match="stepz"):
        model.sample(1, stepz=2)
    with pytest.raises(ValueError, match="matmul_precision: expected one of float32, tf32, bfloat16, found 'int4'"):
        settings = qdiff.CalibrationSettings(matmul_precision="int4", progress=Progress())
        qdiff.quantize(model, data=(torch.zeros(2, 3, 16, 16), torch.zeros(2)), settings=settings, **NEAREST)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        qdiff.load_model("nowhere")
    assert ActivationRanges in STAGES.values()

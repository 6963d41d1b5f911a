import logging
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from ddim.schedules import cumulative_alphas
from ldm.models.diffusion.models import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.pretrained import build_network, find_checkpoint, find_config, load_config, load_model
from ldm.schedules import betas_of
from ldm.util import instantiate_from_config

MODELS = Path(__file__).parents[2] / "models"
NAMES = ["cifar10-ldm", "cifar10-sd"]
TEXT = "cond_stage_model.transformer."


def fails(kind, call, *mentions):
    """The call raises `kind` with one line that mentions everything asked."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [m for m in map(str, mentions) if m not in message] == [], message


def bundled(name, *overrides):
    return load_config(MODELS / name / "config.yaml", overrides), MODELS / name / "model.safetensors"


@pytest.fixture(scope="module")
def states():
    return {name: load_file(MODELS / name / "model.safetensors") for name in NAMES}


@pytest.fixture
def lightning(tmp_path):
    """Writes a checkpoint of a CompVis training run and returns its path."""

    def write(state):
        content = {"state_dict": state, "global_step": 5, "callbacks": {ModelCheckpoint: {"best_model_path": "a"}}}
        torch.save({**content, "optimizer_states": [{"state": {}}]}, tmp_path / "model.ckpt")
        return tmp_path / "model.ckpt"

    return write


# the model


@pytest.mark.parametrize("name", NAMES)
def test_bundled_models_load(name, states):
    model = load_model(*bundled(name))
    assert isinstance(model, LatentDiffusion) and not any(module.training for module in model.modules())
    modules = {type(part).__module__ for part in (model, model.first_stage_model)}  # of which none imports Lightning
    assert modules == {"ldm.models.diffusion.models", "ldm.models.first_stages"}
    loaded = model.state_dict()
    assert set(states[name]) == set(loaded) - {"scale_factor"}
    assert all(torch.equal(loaded[key], value.float()) for key, value in states[name].items())
    for tensor in [*model.parameters(), *model.buffers()]:
        assert tensor.device.type == "cpu" and not tensor.requires_grad and tensor.dtype != torch.float16


@pytest.mark.parametrize("name", NAMES)
def test_everything_that_no_file_holds_is_as_in_a_model_built_with_its_weights(name, states, monkeypatch):
    config, path = bundled(name, f"model.params.cond_stage_config.params.version={MODELS / name / 'text'}")
    if name == "cifar10-ldm":
        config, path = bundled(name)
    plain = instantiate_from_config({**config.model, "params": {**config.model.params, "use_ema": False}}).eval()
    plain.load_state_dict({**states[name], "scale_factor": plain.scale_factor})
    # Memory that is not initialised is filled with NaN and with the largest numbers: it cannot be right by chance.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        model = load_model(config, path)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {key: (value.dtype, value.shape) for key, value in found.items()} == {
        key: (value.dtype, value.shape) for key, value in expected.items()
    }
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert torch.equal(model.betas, plain.betas) and model.betas.dtype == torch.float64
    prompts = {"cifar10-ldm": None, "cifar10-sd": ["a photo of a horse", ""]}[name]
    x = torch.randn(2, config.model.params.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = []
        for one in (plain, model):
            context = one.get_learned_conditioning(prompts) if prompts else None
            outputs.append((one.apply_model(x, torch.tensor([500, 3]), context), one.decode_first_stage(x)))
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_weights_take_the_asked_dtype(dtype, states):
    model = load_model(*bundled("cifar10-sd"), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value.to(dtype)) for key, value in states["cifar10-sd"].items())


def test_scale_factor_of_the_file_wins(states, lightning):
    config, _ = bundled("cifar10-ldm")
    model = load_model(config, lightning({**states["cifar10-ldm"], "scale_factor": torch.tensor(0.5)}))
    assert float(model.scale_factor) == 0.5
    model = load_model(config, lightning(states["cifar10-ldm"]))
    assert float(model.scale_factor) == pytest.approx(config.model.params.scale_factor)


def test_no_global_random_numbers_are_drawn():
    before = torch.random.get_rng_state()
    load_model(*bundled("cifar10-sd"))
    assert torch.equal(torch.random.get_rng_state(), before)


# moving averages


def with_averages(state):
    """The averages are the negative weights."""
    unet = {name: value for name, value in state.items() if name.startswith("model.")}
    averages = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": -value for name, value in unet.items()}
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages
    return {**state, **averages, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(9)}


@pytest.mark.parametrize("use_ema, sign", [(None, -1), (True, -1), (False, 1)])
def test_averages_take_the_place_of_the_unets_weights(states, lightning, use_ema, sign):
    config, _ = bundled("cifar10-ldm")
    del config.model.params.use_ema
    if use_ema is not None:
        config.model.params.use_ema = use_ema
    state = states["cifar10-ldm"]
    model = load_model(config, lightning(with_averages(state)))
    assert not any(name.startswith("model_ema") for name in model.state_dict())
    for name, value in model.state_dict().items():
        if name != "scale_factor":
            expected = state[name].float() * (sign if name.startswith("model.") else 1)
            assert torch.equal(value, expected), name


def test_a_file_of_averages_alone_loads(states, lightning):
    config, _ = bundled("cifar10-ldm", "model.params.use_ema=true")
    state = {name: value for name, value in with_averages(states["cifar10-ldm"]).items() if name[:6] != "model."}
    path = lightning(state)
    model = load_model(config, path)
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(model.state_dict()[name], -states["cifar10-ldm"][name].float())
    config.model.params.use_ema = False
    fails(ValueError, lambda: load_model(config, path), path, "missing: model.diffusion_model.")


def test_incomplete_averages_are_refused(states, lightning):
    config, _ = bundled("cifar10-ldm", "model.params.use_ema=true")
    state = with_averages(states["cifar10-ldm"])
    del state["model_ema.diffusion_modelout2weight"]
    path = lightning(state)
    fails(ValueError, lambda: load_model(config, path), path, "1 of ", "diffusion_modelout2weight", "use_ema=false")


def test_a_checkpoint_of_the_models_own_training_loads(tmp_path):
    config, _ = bundled("cifar10-ldm", "model.params.use_ema=true")
    torch.manual_seed(0)
    trained = instantiate_from_config(config.model)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.normal_()
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "last.ckpt")
    model = load_model(config, tmp_path / "last.ckpt")
    averages = dict(trained.model_ema.named_buffers())
    for name, value in model.model.named_parameters():
        assert torch.equal(value, averages[name.replace(".", "")]), name
    assert torch.equal(model.first_stage_model.quant_conv.weight, trained.first_stage_model.quant_conv.weight)


# names


def test_both_namings_of_the_text_encoder_load(states, tmp_path):
    config, path = bundled("cifar10-sd")
    expected = load_model(config, path).cond_stage_model.state_dict()
    assert all(name.startswith("transformer.text_model.") for name in expected)
    newer = {name.replace(f"{TEXT}text_model.", TEXT): value for name, value in states["cifar10-sd"].items()}
    assert set(newer) != set(states["cifar10-sd"])
    older = {**states["cifar10-sd"], f"{TEXT}text_model.embeddings.position_ids": torch.zeros(1, 16, dtype=torch.long)}
    for number, state in enumerate((newer, older)):
        save_file(state, tmp_path / f"{number}.safetensors")
        found = load_model(config, tmp_path / f"{number}.safetensors").cond_stage_model
        assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
        assert torch.isfinite(found(["a cat"])).all()


@pytest.mark.parametrize("use_ema", [True, False])
def test_published_names_that_sampling_has_no_use_for_are_ignored_silently(states, lightning, caplog, use_ema):
    schedule = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "log_one_minus_alphas_cumprod"]
    schedule += ["sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"]
    schedule += ["posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "lvlb_weights"]
    extra = {name: torch.full((1000,), 7.0) for name in [*schedule, "logvar", "first_stage_model.loss.logvar"]}
    config, _ = bundled("cifar10-ldm", f"model.params.use_ema={use_ema}")
    extra["alphas_cumprod"] = cumulative_alphas(betas_of(config.model.params)).half()  # rounding is no contradiction
    with caplog.at_level(logging.INFO):
        model = load_model(config, lightning({**with_averages(states["cifar10-ldm"]), **extra}))
    assert not [record for record in caplog.records if record.name.startswith(("ldm", "ddim"))]
    assert float(model.betas.max()) < 0.02


def test_another_schedule_in_the_file_is_a_warning(states, lightning, caplog):
    """A terminal signal-to-noise ratio of zero, which the configuration does not say."""
    config, _ = bundled("cifar10-ldm")
    alphas = cumulative_alphas(betas_of(config.model.params))
    path = lightning({**states["cifar10-ldm"], "alphas_cumprod": (alphas - alphas[-1]).float()})
    load_model(config, path)
    differs = f"differs by up to {alphas[-1].item():.3g} from that of the configuration, which is used"
    assert caplog.messages == [f"{path}: alphas_cumprod {differs}"]
    caplog.clear()
    load_model(config, lightning({**states["cifar10-ldm"], "alphas_cumprod": alphas[:10].float()}))
    assert caplog.messages == [f"{path}: alphas_cumprod has 10 steps, the configuration 1000"]


def test_betas_alone_tell_another_schedule_too(states, lightning, caplog):
    config, _ = bundled("cifar10-ldm")
    betas = betas_of(config.model.params)
    load_model(config, lightning({**states["cifar10-ldm"], "betas": betas.float()}))
    assert caplog.messages == []
    path = lightning({**states["cifar10-ldm"], "betas": betas * 2})
    load_model(config, path)
    assert caplog.messages == [
        f"{path}: betas differs by up to {betas[-1].item():.3g} from that of the configuration, which is used"
    ]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("in_file", [True, False])
def test_latents_cannot_be_divided_by_every_scale_factor(states, lightning, scale, in_file):
    config, _ = bundled("cifar10-ldm", *[] if in_file else [f"model.params.scale_factor={scale}"])
    path = lightning({**states["cifar10-ldm"], **({"scale_factor": torch.tensor(scale)} if in_file else {})})
    where = path if in_file else "model.params."
    fails(ValueError, lambda: load_model(config, path), where, f"expected a finite number above 0, found {scale:g}")


BAD = {"nan": float("nan"), "inf": float("inf")}


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.decoder.conv_out.bias",
        "model_ema.diffusion_modelout2weight",
    ],
)
@pytest.mark.parametrize("bad", BAD)
def test_numbers_that_are_not_finite_are_refused(states, lightning, name, bad):
    state = with_averages(states["cifar10-ldm"])
    state[name] = state[name].clone()
    state[name].view(-1)[1] = BAD[bad]
    path = lightning(state)
    expected = f"expected finite numbers, found 1 of {state[name].numel()} NaN or infinite"
    config, _ = bundled("cifar10-ldm", f"model.params.use_ema={name.startswith('model_ema')}")
    fails(ValueError, lambda: load_model(config, path), path, name, expected)


def test_integers_and_quantized_weights_are_refused(states, tmp_path):
    config, _ = bundled("cifar10-ldm")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    state = {**states["cifar10-ldm"], name: (states["cifar10-ldm"][name] * 100).to(torch.int8)}
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    fails(ValueError, lambda: load_model(config, path), path, name, "expected floating-point numbers, found int8")
    save_file({**state, "model.diffusion_model.input_blocks.0.0.scale_weight": torch.ones(1)}, path)
    fails(ValueError, lambda: load_model(config, path), path, "0.0.scale_weight belongs to a quantized weight")


def test_unknown_names_are_a_warning(states, lightning, caplog):
    path = lightning({**states["cifar10-ldm"], **{f"extra.{i}": torch.zeros(1) for i in range(4)}})
    with caplog.at_level(logging.WARNING):
        load_model(bundled("cifar10-ldm")[0], path)
    assert caplog.messages == [f"{path}: ignored 4 unknown tensors: extra.0, extra.1, extra.2, …"]


def test_missing_weights_and_other_shapes_are_errors(states, lightning):
    config, _ = bundled("cifar10-ldm")
    state = dict(states["cifar10-ldm"])
    del state["first_stage_model.quantize.embedding.weight"]
    path = lightning(state)
    fails(ValueError, lambda: load_model(config, path), path, "1 missing: first_stage_model.quantize.embedding.weight")
    config.model.params.unet_config.params.model_channels = 32
    fails(ValueError, lambda: load_model(config, path), path, "of another shape", "expected [128, 32], found [256, 64]")


def test_what_only_training_needs_is_left_alone(states, lightning):
    overrides = [
        "model.params.ckpt_path=nowhere.ckpt",
        "model.params.first_stage_config.params.ckpt_path=nowhere.ckpt",
        "model.params.first_stage_config.params.lossconfig={target: ldm.modules.losses.Nowhere}",
        "model.params.scheduler_config={target: ldm.lr_scheduler.Nowhere}",
    ]
    config, path = bundled("cifar10-ldm", *overrides)
    assert isinstance(load_model(config, path), LatentDiffusion)
    assert config.model.params.first_stage_config.params.ckpt_path == "nowhere.ckpt"  # the caller's own is as it was


def test_text_encoder_folder_is_looked_for_beside_checkpoint_and_configuration(states, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(states["cifar10-sd"], tmp_path / "model.safetensors")
    text = OmegaConf.load(MODELS / "cifar10-sd" / "config.yaml")
    for place in ("beside the configuration", "beside the checkpoint"):
        config = OmegaConf.create(text)
        path = MODELS / "cifar10-sd" / "model.safetensors"
        if place == "beside the configuration":
            config.config_file, path = str(MODELS / "cifar10-sd" / "config.yaml"), tmp_path / "model.safetensors"
        assert load_model(config, path).cond_stage_model.count_tokens("a cat") == 4
    config.model.params.cond_stage_config.params.version = str(MODELS / "cifar10-sd" / "text")
    assert load_model(config, tmp_path / "model.safetensors").cond_stage_model.count_tokens("a cat") == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_its_unet(name, states, caplog):
    """Everything else is there, the U-Net has no weights, and nothing is said of those in the file."""
    model = load_model(*bundled(name), network=False)
    loaded = model.state_dict()
    assert not [key for key in loaded if key.startswith("model.")] and not caplog.records
    assert set(loaded) - {"scale_factor"} == {key for key in states[name] if not key.startswith("model.")}
    assert all(torch.equal(loaded[key], states[name][key].float()) for key in loaded if key in states[name])


def test_the_unet_alone():
    config, _ = bundled("cifar10-sd")
    state = torch.random.get_rng_state()
    first, again, other = (build_network(config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(first, UNetModel) and not first.training
    weights = [network.input_blocks[0][0].weight for network in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# configurations and paths


def test_overrides_change_and_add_settings():
    config, _ = bundled("cifar10-ldm", "model.params.timesteps=10", "model.params.new.list=[1, 2]", "data=x=y")
    assert config.model.params.timesteps == 10 and config.model.params.new.list == [1, 2] and config.data == "x=y"
    assert config.config_file.endswith("config.yaml")
    for override in ("model.params.timesteps", "=3", "a=[1"):
        fails(ValueError, lambda override=override: bundled("cifar10-ldm", override), "override", override)


@pytest.mark.parametrize(
    "content, mentions",
    [
        ("model: {target: a\n", ["YAML"]),
        ("- 1\n", ["section `model`"]),
        ("data: {}\n", ["missing section model", "found data"]),
        ("model: {target: a.b}\n", ["target and params", "found target"]),
        ("model: {params: {}}\n", ["target and params", "found params"]),
    ],
)
def test_configuration_errors_name_the_file(tmp_path, content, mentions):
    path = tmp_path / "a.yaml"
    fails(FileNotFoundError, lambda: load_config(path), path)
    path.write_text(content)
    fails(ValueError, lambda: load_config(path), path, *mentions)


def test_finding_a_checkpoint(tmp_path):
    fails(FileNotFoundError, lambda: find_checkpoint(tmp_path / "a"), tmp_path / "a")
    fails(FileNotFoundError, lambda: find_checkpoint(tmp_path), tmp_path, "model.ckpt", "model.safetensors")
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/last.ckpt", "model.safetensors", "model.ckpt"):
        (tmp_path / name).touch()
        assert find_checkpoint(tmp_path) == tmp_path / name
        assert find_checkpoint(tmp_path / name) == tmp_path / name


def test_finding_the_configuration_of_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    inner, outer = tmp_path / "checkpoints" / "last.ckpt", tmp_path / "model.ckpt"
    fails(FileNotFoundError, lambda: find_config(inner), inner, tmp_path / "config.yaml")
    (tmp_path / "config.yaml").touch()
    assert find_config(inner) == find_config(outer) == tmp_path / "config.yaml"
    (tmp_path / "checkpoints" / "config.yaml").touch()
    assert find_config(inner) == tmp_path / "checkpoints" / "config.yaml"


def test_a_configuration_nested_without_end_is_refused(tmp_path):
    (tmp_path / "deep.yaml").write_text("model: " + "[" * 20_000)
    fails(ValueError, lambda: load_config(tmp_path / "deep.yaml"), "deep.yaml", "not valid YAML")

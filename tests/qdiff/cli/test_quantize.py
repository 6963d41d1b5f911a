"""From flags to a network: contradictions, calibration data that fit or not, what is loaded and what is written."""

import logging
import re
from contextlib import contextmanager

import pytest
import torch

from qdiff.calibration.trajectories import Trajectories, original_layout
from qdiff.checkpoints.native import load_checkpoint
from qdiff.cli.errors import told
from qdiff.cli.flags import add_run_flags
from qdiff.cli.parser import make_parser
from qdiff.cli.quantize import calibrate_and_write, load_calibrated, plan_quantization, read_inputs
from qdiff.cli.recipe_flags import QuantizationOptions, add_quantization_flags
from qdiff.nn.layers import act_quantizers, quant_layers
from qdiff.recipes.recipe import Recipe
from qdiff.recipes.stages import ActivationRanges, Reconstruct, WeightRanges

NEAREST = ("--ptq", "--weight_bit", 4, "--method", "nearest", "--cali_st", 2, "--cali_n", 2)
ACTS = ("--quant_act", "--act_bit", 8)
SHAPE = (3, 8, 8)


def flags(*given, family="latent"):
    parser = make_parser("")
    add_quantization_flags(parser)
    add_run_flags(parser)
    parser.set_defaults(family=family)
    return parser.parse_args([str(word) for word in given])


def plan(*given, steps=10, **options):
    return plan_quantization(flags(*given, **options), steps, "--custom_steps 10")


@contextmanager
def refused_as(pattern):
    """What the command line says of the error within the block."""
    with pytest.raises(ValueError) as error:
        yield
    assert re.search(pattern, told(error.value)), told(error.value)


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Neither it nor a report: they take longer than a calibration, and tests of their own look at them."""
    monkeypatch.setattr("qdiff.cli.quantize.write_report", lambda folder: None)
    monkeypatch.setattr("qdiff.cli.quantize.plot_losses", lambda reports, path: None)


@pytest.fixture
def models(make_latent, latent_adapter, make_network, adapter):
    """name -> (adapter, function that makes its network, whether it takes conditioning)"""
    narrow = {"model_channels": 32, "channel_mult": [1], "attention_resolutions": [1]}
    return {
        "plain": (latent_adapter, lambda: make_latent("plain", **narrow), False),
        "transformer": (latent_adapter, lambda: make_latent("transformer", **narrow), True),
        "labels": (latent_adapter, lambda: make_latent("labels", **narrow), True),
        "pixel": (adapter, lambda: make_network(32, ch_mult=[1], attn_resolutions=[8]), False),
    }


def context(form, unconditional=False):
    if form == "labels":
        return torch.full((2,), 6 if unconditional else 1)
    return torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(int(unconditional)))


def trajectories(timesteps, **extra):
    generator = torch.Generator().manual_seed(0)
    xs = tuple(torch.randn(2, *SHAPE, generator=generator) for _ in timesteps)
    columns = {key: (value,) * len(timesteps) for key, value in extra.items()}
    return Trajectories(xs, tuple(torch.full((2,), float(t)) for t in timesteps), columns)


@pytest.fixture
def data(tmp_path, timesteps):
    """(conditioning) -> a file of sampling states in the original's layout."""

    def write(**extra):
        torch.save(original_layout(trajectories(timesteps, **extra)), tmp_path / "data.pt")
        return tmp_path / "data.pt"

    return write


@pytest.fixture
def read(models, timesteps):
    """(model's name, plan) -> what the run reads."""

    def inputs(name, planned):
        adapter, build, conditional = models[name]
        return read_inputs(planned, adapter, build, SHAPE, timesteps, conditional)

    return inputs


@pytest.fixture
def calibrated(models, read, timesteps, tmp_path):
    """(model's name, flags) -> (network, folder) of a run that calibrates."""

    def run(name, *given):
        adapter, build, conditional = models[name]
        planned, folder = plan(*given), tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        folder.mkdir()
        extra = {"cs": context(name), "ucs": context(name, True)} if conditional else {}
        inputs = read(name, planned)
        record = lambda count: trajectories(timesteps, **extra)  # noqa: E731
        return calibrate_and_write(planned, inputs, adapter, build(), record, folder, {"sampling": {}}), folder

    return run


# Flags against one another


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--weight_bit", 4], "--weight_bit: quantizes, so it needs --ptq"),
        (["--quant_act"], "--quant_act: quantizes, so it needs --ptq"),
        (["--method", "quick"], "--method: quantizes"),
        (["--recipe", "a.yaml"], "--recipe: quantizes"),
        (["--cali_ckpt", "a.pth"], "--cali_ckpt: quantizes"),
        (["--resume"], "--resume: quantizes"),
        (["--resume_w"], "--resume_w: quantizes"),
        (["--ptq", "--resume", "--resume_w", "--quant_act", "--cali_ckpt", "a.pth"], "--resume, --resume_w: one loads"),
        (["--ptq", "--resume"], "--resume: needs --cali_ckpt FILE"),
        (["--ptq", "--resume_w", "--quant_act"], "--resume_w: needs --cali_ckpt FILE"),
        (
            ["--ptq", "--resume_w", "--cali_ckpt", "a.pth"],
            "--resume_w: calibrates activations, so it needs --quant_act",
        ),
        (["--ptq", "--cali_st", 11], "--cali_st 11: --custom_steps 10 makes only 10 steps"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(str(word).strip("-") for word in value),
)
def test_flags_that_contradict_one_another_are_named(given, message):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        plan(*given)
    assert "\n" not in str(error.value)


def test_steps_of_given_data_are_counted_when_they_are_read(data, read):
    planned = plan("--ptq", "--method", "nearest", "--cali_st", 11, "--cali_n", 2, "--cali_data_path", data())
    with refused_as("--cali_st 11: the calibration data have only 10 steps"):
        read("plain", planned)


def test_plans():
    assert (plan().recipe, plan().loads) == (None, None)
    assert plan("--ptq").recipe.name == "q-diffusion" and plan("--ptq").loads is None
    loading = plan("--ptq", "--cali_ckpt", "a.pth")
    assert loading.recipe is None and str(loading.loads) == "a.pth"
    assert loading.describe() == {"calibrated_checkpoint": "a.pth", "calibration_data": None}
    assert plan("--ptq").describe() == {"calibrated_checkpoint": None, "calibration_data": "made by this run"}


def test_with_given_weights_only_activations_are_calibrated():
    recipe = plan("--ptq", "--quant_act", "--resume_w", "--cali_ckpt", "a.pth").recipe
    assert [type(stage) for stage in recipe.stages] == [ActivationRanges, Reconstruct]
    assert list(recipe.stages[1].learn) == ["scale"] and recipe.stages[1].penalty is None


@pytest.mark.parametrize(
    "flag", [["--running_stat"], ["--rs_sm_only"], ["--a_min_max"], ["--compat", "first_step_ranges"]], ids="".join
)
def test_a_recipe_holds_these_itself(tmp_path, flag):
    path = tmp_path / "recipe.yaml"
    path.write_text(plan(*NEAREST).recipe.to_yaml())
    assert plan("--ptq", "--recipe", path).recipe == plan(*NEAREST).recipe
    with pytest.raises(ValueError, match=f"^{flag[0]}: the recipe holds it, so say it in .*recipe.yaml"):
        plan("--ptq", "--recipe", path, *flag)


# Calibration data and what the network is conditioned on


@pytest.mark.parametrize("form", ["transformer", "labels"])
@pytest.mark.parametrize("keys", [["cs"], ["cs", "ucs"]], ids=["cs", "cs-and-ucs"])
def test_conditional_networks_take_conditional_data(data, read, form, keys):
    path = data(**{key: context(form, key == "ucs") for key in keys})
    inputs = read(form, plan(*NEAREST, *ACTS, "--cali_data_path", path))
    assert list(inputs.trajectories.extra) == keys and inputs.trajectories.extra["cs"][0].shape == context(form).shape


@pytest.mark.parametrize("keys", [[], ["ucs"]], ids=["none", "ucs-only"])
def test_conditional_networks_need_conditioning(data, read, keys):
    path = data(**{key: context("transformer") for key in keys})
    with pytest.raises(ValueError, match=r"data.pt: expected .* with conditioning \(cs, ucs\), found none"):
        read("transformer", plan(*NEAREST, "--cali_data_path", path))


@pytest.mark.parametrize("form", ["plain", "pixel"])
def test_unconditional_networks_take_none(data, read, form):
    assert read(form, plan(*NEAREST, "--cali_data_path", data())).trajectories.extra == {}
    with pytest.raises(ValueError, match=r"data.pt: has conditioning \(cs, ucs\), but the network takes none"):
        read(form, plan(*NEAREST, "--cali_data_path", data(cs=context("transformer"))))


@pytest.mark.parametrize(
    ("form", "wrong", "found"),
    [
        ("transformer", torch.zeros(2, 5, 23), r"of shape \(N, L, 24\), found \(2, 5, 23\)"),
        ("transformer", torch.zeros(2, 24), r"of shape \(N, L, 24\), found \(2, 24\)"),
        ("transformer", torch.tensor([1, 2]), r"of shape \(N, L, 24\), found \(2,\)"),
        ("labels", torch.zeros(2, 5, 24), r"to be labels \(N\), found torch.float32 \(2, 5, 24\)"),
        ("labels", torch.tensor([1, 10**9]), r"expected labels 0 \.\.\. \d+, found 1 \.\.\. 1000000000"),
        ("labels", torch.zeros(2), r"to be labels \(N\), found torch.float32 \(2,\)"),
    ],
    ids=["width", "no-tokens", "labels", "embeddings", "beyond", "fractions"],
)
def test_conditioning_of_another_model_is_refused_before_anything_is_written(data, read, form, wrong, found):
    with pytest.raises(ValueError, match=f"data.pt: (expected cs )?{found}") as error:
        read(form, plan(*NEAREST, "--cali_data_path", data(cs=wrong)))
    assert "\n" not in str(error.value)


def test_states_of_another_shape_are_refused(data, models, timesteps):
    adapter, build, _ = models["plain"]
    planned = plan(*NEAREST, "--cali_data_path", data())
    with pytest.raises(ValueError, match=r"data.pt: expected calibration states of shape \(4, 8, 8\)"):
        read_inputs(planned, adapter, build, (4, 8, 8), timesteps)


# Calibrated, written, loaded again


@pytest.mark.parametrize("name", ["plain", "transformer", "labels", "pixel"])
@pytest.mark.parametrize("file", ["ckpt.pth", "ckpt.safetensors"])
@pytest.mark.cases("ckpt.pth-transformer", "ckpt.pth-pixel", "ckpt.safetensors-labels", "ckpt.safetensors-plain")
def test_what_was_calibrated_is_what_is_loaded(calibrated, models, read, assert_same_numbers, name, file):
    network, folder = calibrated(name, *NEAREST, *ACTS)
    adapter, build, conditional = models[name]
    planned = plan("--ptq", "--weight_bit", 4, *ACTS, "--cali_ckpt", folder / file)
    inputs = read(name, planned)
    assert inputs.label(planned) == "W4A8" and inputs.trajectories is None
    assert_same_numbers(network, inputs.loaded)
    assert inputs.recipe == load_checkpoint(folder / "ckpt.safetensors").recipe
    x, t = torch.randn(2, *SHAPE), torch.tensor([900.0, 100.0])
    given = adapter.conditioning(network, context(name) if conditional else None)
    with torch.no_grad():
        assert torch.equal(inputs.loaded(x, t, **given), network(x, t, **given))


@pytest.mark.parametrize("file", ["ckpt.pth", "ckpt.safetensors"])
def test_without_quant_act_a_files_activations_stay_out(calibrated, models, file):
    network, folder = calibrated("transformer", *NEAREST, *ACTS)
    adapter, build, _ = models["transformer"]
    loaded, recipe = load_calibrated(
        QuantizationOptions.of(flags("--ptq", "--weight_bit", 4, "--cali_ckpt", folder / file)), build, adapter
    )
    assert recipe.activations is None and not any(q.enabled for q in act_quantizers(loaded).values())
    for name, layer in quant_layers(network).items():
        assert torch.equal(layer.codes, quant_layers(loaded)[name].codes)


@pytest.mark.parametrize("file", ["ckpt.pth", "ckpt.safetensors"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--weight_bit", 8, *ACTS], "--weight_bit 8: contradicts"),
        (["--weight_bit", 4, "--quant_act", "--act_bit", 6], "--act_bit 6: contradicts"),
        (["--weight_bit", 4, *ACTS, "--sm_abit", 16], "--sm_abit 16: contradicts"),
        (["--weight_bit", 4, *ACTS, "--a_sym"], "--a_sym: contradicts"),
        (["--weight_bit", 4, *ACTS, "--split"], "--split: contradicts"),
    ],
    ids=["weights", "acts", "softmax", "symmetry", "split"],
)
@pytest.mark.cases(
    "weights-ckpt.pth", "acts-ckpt.safetensors", "softmax-ckpt.pth", "symmetry-ckpt.safetensors", "split-ckpt.*"
)
def test_flags_that_contradict_a_file_are_named(calibrated, models, file, given, message):
    _, folder = calibrated("transformer", *NEAREST, *ACTS)
    adapter, build, _ = models["transformer"]
    with refused_as(f"^{message} .*{file}"):
        load_calibrated(QuantizationOptions.of(flags("--ptq", *given, "--cali_ckpt", folder / file)), build, adapter)


def test_a_file_without_activations_has_none_to_use(calibrated, models):
    _, folder = calibrated("plain", *NEAREST)
    adapter, build, _ = models["plain"]
    for file in ("ckpt.pth", "ckpt.safetensors"):
        with refused_as(f"--quant_act: contradicts .*{file}, which holds no activation"):
            load_calibrated(
                QuantizationOptions.of(flags("--ptq", "--weight_bit", 4, *ACTS, "--cali_ckpt", folder / file)),
                build,
                adapter,
            )


@pytest.mark.parametrize("other", ["plain", "labels", "pixel"])
@pytest.mark.parametrize("file", ["ckpt.pth", "ckpt.safetensors"])
@pytest.mark.cases("ckpt.pth-plain", "ckpt.pth-labels", "ckpt.safetensors-labels", "ckpt.safetensors-pixel")
def test_a_file_of_another_model_is_refused(calibrated, models, other, file):
    _, folder = calibrated("transformer", *NEAREST)
    adapter, build, _ = models[other]
    with pytest.raises(ValueError, match=file) as error:
        load_calibrated(
            QuantizationOptions.of(flags("--ptq", "--weight_bit", 4, "--cali_ckpt", folder / file)), build, adapter
        )
    assert "\n" not in str(error.value)
    if (other, file) == ("pixel", "ckpt.safetensors"):
        assert "made for a ldm model, the configuration is of a ddim one" in str(error.value)


@pytest.mark.parametrize("file", ["ckpt.pth", "ckpt.safetensors"])
@pytest.mark.parametrize("name", ["plain", "transformer"])
@pytest.mark.cases("plain-ckpt.pth", "plain-ckpt.safetensors")
def test_weights_of_a_file_with_new_activations(calibrated, name, file):
    """Activations are calibrated to the bits of the flags, on the data of this run; weights stay those of the file."""
    network, folder = calibrated(name, *NEAREST)
    resumed = [*NEAREST, "--quant_act", "--act_bit", 6, "--resume_w", "--cali_ckpt", folder / file]
    again, folder = calibrated(name, *resumed)
    for layer, module in quant_layers(network).items():
        assert torch.equal(quant_layers(again)[layer].codes, module.codes), layer
    assert {q.spec.bits for n, q in act_quantizers(again).items() if not n.endswith("_w")} == {6}
    assert load_checkpoint(folder / "ckpt.safetensors").recipe.activations.bits == 6


@pytest.mark.parametrize("file", ["ckpt.pth", "ckpt.safetensors"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--weight_bit", 4, "--split"], "--split"),
        (["--weight_bit", 8], "--weight_bit 8"),
    ],
    ids=["split", "bits"],
)
def test_weights_of_another_structure_are_refused(calibrated, read, file, given, message):
    _, folder = calibrated("plain", *NEAREST)
    planned = plan("--ptq", *given, *ACTS, "--method", "nearest", "--cali_st", 2, "--resume_w", "--cali_ckpt",
                   folder / file)  # fmt: skip
    with refused_as(f"{message}.*{file}"):
        read("plain", planned)


def test_weights_that_contradict_a_recipe_are_refused(calibrated, read, tmp_path):
    """The flags agree with the file; what the recipe says of one layer does not."""
    _, folder = calibrated("plain", *NEAREST)
    recipe = plan(*NEAREST, *ACTS).recipe.to_dict() | {"rules": [{"pattern": "out.2", "weight_bits": 8}]}
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.from_dict(recipe).to_yaml())
    planned = plan("--ptq", "--weight_bit", 4, "--quant_act", "--recipe", path, "--resume_w", "--cali_ckpt",
                   folder / "ckpt.pth")  # fmt: skip
    with pytest.raises(ValueError, match=r"--resume_w .*ckpt.pth: contradicts .*: out.2: .* 4 bits.* 8 bits"):
        read("plain", planned)


def test_a_missing_checkpoint_is_named(models):
    adapter, build, _ = models["plain"]
    with pytest.raises(FileNotFoundError, match="--cali_ckpt nowhere.pth: no such file"):
        load_calibrated(QuantizationOptions.of(flags("--ptq", "--cali_ckpt", "nowhere.pth")), build, adapter)


def test_what_ckpt_pth_cannot_express_is_said(calibrated, tmp_path, caplog):
    recipe = plan(*NEAREST).recipe.to_dict() | {"rules": [{"pattern": "out.2", "weight_bits": 8}]}
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.from_dict(recipe).to_yaml())
    with caplog.at_level(logging.WARNING):
        _, folder = calibrated("plain", "--ptq", "--recipe", path)
    assert [file.name for file in folder.glob("ckpt.*")] == ["ckpt.safetensors"]
    assert "no ckpt.pth: ckpt.pth holds one weight width" in caplog.text
    assert [type(stage) for stage in load_checkpoint(folder / "ckpt.safetensors").recipe.stages] == [WeightRanges]


def test_a_seed_and_the_data_determine_the_files(calibrated):
    first, again = (calibrated("labels", *NEAREST, *ACTS)[1] for _ in range(2))
    for name in ("ckpt.pth", "ckpt.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes()

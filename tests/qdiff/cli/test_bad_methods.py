"""What a user may get wrong about methods and their recipes: exit code 2, one line that says what, and no file."""

import pytest
import yaml
from running import call, passed, refused, tree

from qdiff.methods import METHODS, MethodOptions, make_recipe
from qdiff.recipes.recipe import COMPAT

SAMPLE = "sample_diffusion_ddim"
W4A8 = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8)
FEW = ("--cali_st", 2, "--cali_n", 2, "--cali_iters", 2, "--cali_iters_a", 2)


@pytest.fixture
def lines(tiny, latent, tmp_path):
    """Script -> it with the flags of a run of four steps, for its tiny model."""
    out = tmp_path / "out"
    return {
        SAMPLE: (SAMPLE, *tiny.sampling, "-l", out),
        "sample_diffusion_ldm": (
            "sample_diffusion_ldm",
            "-r",
            latent.ldm.ckpt,
            "-c",
            4,
            "--seed",
            1,
            "-n",
            1,
            "-l",
            out,
        ),
        "txt2img": ("txt2img", "--ckpt", latent.sd.ckpt, "--prompt", "a cat", "--ddim_steps", 4, "--outdir", out),
    }


@pytest.fixture
def fails(lines, tmp_path):
    """(*flags, names=parts, script=name): the run is refused with a line that names `parts`, and leaves nothing."""

    def check(*flags, names=(), script=SAMPLE):
        before = tree(tmp_path)
        line = refused(call(*lines[script], *flags), *names)
        assert tree(tmp_path) == before
        return line

    return check


SCRIPTS = pytest.mark.parametrize("script", [SAMPLE, "sample_diffusion_ldm", "txt2img"])


@SCRIPTS
def test_an_unknown_method(fails, script):
    for name in ("magic", "Q-Diffusion", "eda_dm", ""):
        fails("--ptq", "--method", name, names=("--method", repr(name), *METHODS), script=script)


@SCRIPTS
def test_an_unknown_fault(fails, script):
    names = ("--compat", "'backward'", *COMPAT)
    fails("--ptq", "--method", "eda-dm", "--compat", "backward", names=names, script=script)


# --set


@SCRIPTS
def test_fields_without_anything_to_quantize(fails, script):
    fails("--set", "weights.bits=4", names=("--set", "--ptq"), script=script)


SETTINGS = [
    ("quest", "weigths.bits=4", ("--set weigths.bits", "weights", "finetune")),
    ("quest", "weights.bit=4", ("--set weights.bit", "bits", "kind", "axis")),
    ("quest", "weights.bits=9", ("--set weights.bits", "2 to 8", "9")),
    ("quest", "finetune[3].iterations=4", ("finetune[1] to finetune[2]", "finetune[3]")),
    ("quest", "finetune.rate=1", ("--set finetune.rate", "iterations", "learn", "'rate'")),
    ("quest", "finetune.order=backwards", ("--set finetune.order", "interleaved", "sequential", "backwards")),
    ("quest", "finetune.layers=[role:magic]", ("--set finetune.layers", "time", "attention", "feed_forward", "magic")),
    ("quest", "step_groups.size=5", ("--set step_groups.size", "count", "5")),
    ("quest", "rollout.iterations=4", ("--set rollout.iterations", "no rollout", "finetune")),
    ("eda-dm", "selector.name=magic", ("--set selector.name", "uniform", "density_variety", "group_starts", "magic")),
    ("eda-dm", "selector.radius=-1", ("--set selector.radius", "-1")),
    ("eda-dm", "reconstruct.drop=2", ("--set reconstruct.drop", "0", "1", "2")),
    ("eda-dm", "reconstruct.drop=often", ("--set reconstruct.drop", "'often'")),
    ("eda-dm", "reconstruct.learn.weight.rate=1", ("--set reconstruct.learn.weight.rate", "rounding", "scale", "bias")),
    ("accuquant", "rollout.gradient=magic", ("--set rollout.gradient", "two_pass", "exact", "unrolled", "magic")),
    ("accuquant", "rollout.start=quantized", ("--set rollout.start", "sequential")),
    ("accuquant", "compat=[magic]", ("--set compat", "hold_every_ten", "magic")),
    ("accuquant", "rollout=4", ("--set rollout", "rollout.learn")),
    ("accuquant", "rollout.iterations", ("--set", "PATH=VALUE", "'rollout.iterations'")),
]


@pytest.mark.parametrize(("method", "setting", "names"), SETTINGS, ids=lambda v: v if isinstance(v, str) else "")
def test_settings(fails, method, setting, names):
    fails(*W4A8, "--method", method, *FEW, "--set", setting, names=names)


def test_settings_beside_a_checkpoint_that_is_used_as_it_is(fails, calibrated):
    path = calibrated.folder / "ckpt.safetensors"
    fails("--ptq", "--cali_ckpt", path, "--set", "weights.bits=4", names=("--set", "--cali_ckpt", path))


# Recipe files


@pytest.mark.parametrize(
    ("method", "change", "names"),
    [
        ("eda-dm", {"selector": {"name": "magic"}}, ("selector", "uniform", "density_variety", "magic")),
        ("eda-dm", {"selector": {"radios": 1}}, ("selector", "radius", "radios")),
        ("quest", {"stages": [{"stage": "magic"}]}, ("stage", "finetune", "rollout", "magic")),
        ("quest", {"rules": [{"pattern": "role:magic"}]}, ("rule", "input", "output", "magic")),
        ("quest", {"step_groups": {"lookup": "magic"}}, ("lookup", "nearest", "hold", "magic")),
        ("accuquant", {"stages": [{"stage": "rollout"}]}, ("stages", "weight_ranges")),
        ("accuquant", {"compat": ["magic"]}, ("compat", "hold_every_ten", "magic")),
    ],
    ids=["selector", "selector-field", "stage", "role", "lookup", "stages-alone", "compat"],
)
def test_recipe_files(fails, tmp_path, method, change, names):
    plain = make_recipe(method, MethodOptions(weight_bits=4, act_bits=8, selector_steps=2, per_step=2)).to_dict()
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(plain | change))
    fails("--ptq", "--recipe", "mine.yml", names=("mine.yml", *names))


def test_layers_that_the_network_does_not_have(fails):
    """A pixel model has no feed-forward layers."""
    setting = "finetune.layers=[role:feed_forward]"
    fails(*W4A8, "--method", "quest", *FEW, "--set", setting, names=("finetune", "role:feed_forward"))


# Samplers and their states


def test_a_sampler_that_clips(fails):
    """Errors then do not add up linearly, which rollouts need."""
    names = ("accuquant", "ddpm_noisy", "clips")
    fails(*W4A8, "--method", "accuquant", *FEW, "--sample_type", "ddpm_noisy", names=names)


def test_fewer_samples_than_states_of_different_samples(fails, data):
    """Two times three, each of another sample; the file has five samples."""
    flags = (*W4A8, "--method", "eda-dm", "--cali_st", 2, "--cali_n", 3, "--cali_data_path", data.shards)
    fails(*flags, names=("--cali_st 2 --cali_n 3", "6 states", "5 samples"))


def test_fewer_samples_or_steps_than_asked_for(fails, data):
    for method in ("q-diffusion", "quest", "accuquant"):
        flags = (*W4A8, "--method", method, "--cali_data_path", data.shards)
        fails(*flags, "--cali_st", 2, "--cali_n", 6, names=("--cali_n 6", "5 samples"))
        fails(*flags, "--cali_st", 5, "--cali_n", 2, names=("--cali_st 5", "4 steps"))


def test_states_of_another_sampler(fails, data, tiny, tmp_path):
    """Of four steps, as they are recorded; and of as many steps at other timesteps."""
    flags = (*W4A8, "--method", "accuquant", *FEW, "--cali_data_path")
    names = (data.shards, "same sampler", "5 steps", "4 steps")
    fails(*flags, data.shards, "--timesteps", 5, names=names)
    quad = tmp_path / "quad"
    recorded = (*tiny.model, "--timesteps", 4, "--skip_type", "quad", "--n_samples", 2, "--out", quad)
    passed(call("make_calibration_data", *recorded))
    fails(*flags, quad, names=(quad, "same sampler", "4 steps"))


def test_fewer_steps_than_sets(fails):
    """QuEST has a set for each calibration step; groups of one step cannot be more than there are."""
    names = ("--cali_st 9", "--timesteps 4", "4 steps")
    for method in ("q-diffusion", "quest", "accuquant"):
        fails(*W4A8, "--method", method, *FEW, "--cali_st", 9, names=names)
    fails(*W4A8, "--method", "quest", *FEW, "--set", "step_groups.count=9", names=("step_groups", "9", "4"))

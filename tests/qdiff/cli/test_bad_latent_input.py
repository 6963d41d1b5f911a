"""What a user may get wrong with the latent models' scripts: exit code 2, one line that says what, and no file."""

import copy
import shutil

import pytest
import torch
import yaml
from latents import CONFIGS, LDM, TXT2IMG
from running import call, refused, tree
from safetensors.torch import save_file

NEAREST = ("--method", "nearest", "--cali_st", 2, "--cali_n", 2)


class Foreign:
    """Stands for any object a pickle may bring along."""


@pytest.fixture
def fails(latent, tmp_path):
    """(name of a model, *flags, names=parts): its script refuses with a line that names `parts`, and leaves nothing."""

    def check(name, *flags, names=()):
        before, model = tree(tmp_path), getattr(latent, name)
        if name == "sd":
            prompt = () if {"--prompt", "--from-file"} & {*flags} else ("--prompt", "a cat")
            line = ("txt2img", "--ckpt", model.folder, *TXT2IMG, *prompt, "--outdir", tmp_path / "out")
        else:
            line = ("sample_diffusion_ldm", "-r", model.folder, *LDM, "-l", tmp_path / "out")
        message = refused(call(*line, *flags), *names)
        assert tree(tmp_path) == before
        return message

    return check


# Flags alone

LDM_FLAGS = [
    ("-n 0", ("--n_samples", "at least 1", "'0'")),
    ("--batch_size 0", ("--batch_size", "at least 1")),
    ("-c 0", ("--custom_steps", "at least 1")),
    ("-c 2000", ("--custom_steps 2000", "1..1000")),
    ("-c 1000", ("--custom_steps 1000", "next smaller number that fits is 500")),
    ("-e 2", ("--eta", "from 0 to 1", "'2'")),
    ("--seed -1", ("--seed", "'-1'")),
    ("-v --dpm", ("--vanilla_sample, --dpm",)),
    ("--scale nan", ("--scale", "'nan'")),
    ("--scale 2", ("--scale 2", "conditional")),
    ("--classes 1", ("--classes", "not class-conditional")),
    ("--samples_per_class 1", ("--samples_per_class", "not class-conditional")),
    ("--uncond_class 1", ("--uncond_class", "not class-conditional")),
    ("--device nonsense", ("--device nonsense",)),
    ("--bogus 3", ("unrecognized arguments: --bogus",)),
    ("--custom 3", ("unrecognized arguments: --custom",)),
    ("--weight_bit 4", ("--weight_bit", "--ptq")),
    ("--ptq --cali_st 9", ("--cali_st 9", "--custom_steps 4", "4 steps")),
    ("--ptq --resume", ("--resume", "--cali_ckpt")),
    ("--ptq --cali_ckpt nope.pth", ("--cali_ckpt nope.pth", "no such file")),
    ("--ptq --recipe nope.yml", ("--recipe nope.yml", "no such file")),
]
CIN_FLAGS = [
    ("--classes 5", ("--classes 5", "0 to 4")),
    ("--classes 3-1", ("--classes 3-1", "0 to 4")),
    ("--classes 1-9", ("--classes 1-9", "0 to 4")),
    ("--classes x", ("--classes x", "0-9")),
    ("--classes", ("--classes", "expected at least one argument")),
    ("--classes -3", ("--classes",)),
    ("--uncond_class 5", ("--uncond_class 5", "up to 4")),
    ("--uncond_class -2", ("--uncond_class -2", "-1")),
    ("--uncond_class -1 --scale 2", ("--scale 2", "--uncond_class")),
    ("--samples_per_class 0", ("--samples_per_class", "at least 1")),
]
SD_FLAGS = [
    ("--prompt a --from-file b", ("--prompt, --from-file", "give one")),
    ("--from-file nope.txt", ("--from-file nope.txt", "no such file")),
    ("--ptq --cali_prompts nope.txt", ("--cali_prompts nope.txt", "no such file")),
    ("--plms --dpm", ("--plms, --dpm",)),
    ("--plms --ddim_eta 1", ("--ddim_eta 1", "PLMS")),
    ("--dpm --ddim_eta 1", ("--ddim_eta 1", "DPM-Solver++")),
    ("--skip_grid --skip_save", ("--skip_grid, --skip_save",)),
    ("--ddim_steps 5000", ("--ddim_steps 5000", "1..1000")),
    ("--H 17", ("--H 17", "multiple of 2")),
    ("--W 19", ("--W 19", "multiple of 2")),
    ("--C 3", ("--C 3", "has 4")),
    ("--f 8", ("--f 8", "has 2")),
    ("--n_rows -1", ("--n_rows", "'-1'")),
    ("--n_iter 0", ("--n_iter", "'0'")),
    ("--precision half", ("--precision", "autocast", "full", "half")),
    ("--laion400m", ("models/ldm/text2img-large/model.ckpt", "no such")),
    ("model.params.timesteps=9", ("unrecognized arguments",)),
]


@pytest.mark.parametrize(
    ("name", "flags", "names"),
    [(name, *case) for name, cases in {"ldm": LDM_FLAGS, "cin": CIN_FLAGS, "sd": SD_FLAGS}.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flags(fails, name, flags, names):
    fails(name, *flags.split(), names=names)


def test_nothing_at_all(tmp_path):
    refused(call("sample_diffusion_ldm"), "-r/--resume_base, --seed", "required")
    refused(call("txt2img"), "models/ldm/stable-diffusion-v1/model.ckpt", "no such")
    assert tree(tmp_path) == {}


# Prompts


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"", ("line 1", "empty line")),
        (b" \n\n", ("line 1", "empty line")),
        (b"a cat\n\na dog\n", ("line 2", "empty line")),
        (b"a cat\n \t\na dog\n", ("line 2", "empty line")),
        (b"a cat\na \xe9 dog\n", ("line 2", "UTF-8", "0xe9")),
        ("a cat\n".encode("utf-16"), ("line 1", "UTF-8", "0xff")),
        (b"a cat\nthe\x07bell\n", ("line 2", "U+0007")),
        (b"a cat\ra dog\r", ("line 1", "U+000D")),
        (b"a cat\n\x1b[31mred\n", ("line 2", "U+001B")),
        ("a cat\u2028a dog\n".encode(), ("line 1", "U+2028")),
        ("a cat\na \ufeffdog\x00\n".encode(), ("line 2", "U+0000")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("flag", ["--from-file", "--cali_prompts"])
def test_a_bad_file_of_prompts_names_its_line(fails, tmp_path, content, names, flag):
    (tmp_path / "prompts.txt").write_bytes(content)
    fails("sd", flag, "prompts.txt", names=(f"{flag} prompts.txt", *names))


def test_a_prompt_of_several_lines(fails):
    fails("sd", "--prompt", "a cat\na dog", names=("--prompt", "U+000A"))


# The checkpoint and the configuration


def test_no_checkpoint_or_configuration(latent, fails, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(latent.ldm.ckpt, tmp_path / "alone.ckpt")
    fails("ldm", "-r", "nope", names=("nope", "no such checkpoint or folder"))
    fails("ldm", "-r", "empty", names=("empty", "model.ckpt", "model.safetensors"))
    fails("ldm", "-r", "alone.ckpt", names=("alone.ckpt", "config.yaml"))
    fails("ldm", "--config", "nope.yaml", names=("nope.yaml", "no such configuration"))
    # A checkpoint alone is one of SD 1.x, as the original's default configuration says.
    fails("sd", "--ckpt", "alone.ckpt", names=("alone.ckpt", "does not fit", "v1-inference.yaml"))


def test_checkpoints_that_do_not_fit(latent, fails, tmp_path):
    fails("ldm", "-r", latent.cin.ckpt, "--config", latent.ldm.config, names=(latent.cin.ckpt, "does not fit"))
    (tmp_path / "short.ckpt").write_bytes(latent.ldm.ckpt.read_bytes()[:5000])
    torch.save([1], tmp_path / "list.ckpt")
    torch.save({"state_dict": {"a": Foreign()}}, tmp_path / "foreign.ckpt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("short.ckpt", "list.ckpt", "other.safetensors"):
        fails("ldm", "-r", name, "--config", latent.ldm.config, names=(name,))
    fails("ldm", "-r", "foreign.ckpt", "--config", latent.ldm.config, names=("foreign.ckpt", "Foreign"))


def without(*path):
    def change(config):
        section = config
        for key in path[:-1]:
            section = section[key]
        del section[path[-1]]

    return change


def given(value, *path):
    def change(config):
        section = config
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value

    return change


def two_levels_of_seven(config):
    given([1, 1], *UNET, "params", "channel_mult")(config)
    given(7, *PARAMS, "image_size")(config)


PARAMS = ("model", "params")
UNET = (*PARAMS, "unet_config")
STAGE = (*PARAMS, "first_stage_config")
CONDITION = (*PARAMS, "cond_stage_config")
EITHER_CONFIG = {
    "no-image-size": (without(*PARAMS, "image_size"), ("model.params.image_size", "whole number", "nothing")),
    "image-size-text": (given("big", *PARAMS, "image_size"), ("model.params.image_size", "'big'")),
    "image-size-list": (given([8, 8], *PARAMS, "image_size"), ("model.params.image_size", "[8, 8]")),
    "image-size-huge": (given(2**40, *PARAMS, "image_size"), ("model.params.image_size", "at most 16384", 2**40)),
    "image-size-odd": (two_levels_of_seven, ("model.params.image_size", "multiple of 2", "7")),
    "no-channels": (without(*PARAMS, "channels"), ("model.params.channels", "nothing")),
    "channels": (given(5, *PARAMS, "channels"), ("unet_config.params.in_channels", "5 as model.params.channels")),
    "timesteps": (given(0, *PARAMS, "timesteps"), ("model.params.timesteps", "at least 1", "0")),
    "linear_start": (given("low", *PARAMS, "linear_start"), ("model.params.linear_start", "a number", "'low'")),
    "given_betas": (
        given([0.1], *PARAMS, "given_betas"),
        ("model.params: given_betas", "1000", "found 1"),
    ),
    "betas": (given(7, *PARAMS, "linear_start"), ("betas", "7")),
    "no-unet": (without(*UNET), ("model.params.unet_config", "a section")),
    "unet-target": (given("torch.nn.Identity", *UNET, "target"), ("unet_config.target", "UNetModel", "torch.nn")),
    "unet-argument": (given(1, *UNET, "params", "colour"), ("UNetModel", "colour")),
    "channel_mult": (given(2, *UNET, "params", "channel_mult"), ("channel_mult", "a list", "2")),
    "width": (given(33, *UNET, "params", "model_channels"), ("model_channels", "33")),
    "no-stage": (without(*STAGE), ("model.params.first_stage_config", "a section")),
    "stage-target": (given("os.system", *STAGE, "target"), ("first_stage_config.target", "AutoencoderKL", "os.system")),
    "stage-colours": (
        given(4, *STAGE, "params", "ddconfig", "out_ch"),
        ("mine.yaml", "ddconfig.out_ch", "1 (grey) or 3 (RGB)", "found 4"),
    ),
    "stage-width": (
        given(2**40, *STAGE, "params", "ddconfig", "ch"),
        ("mine.yaml", "ch", "32768", 2**40),
    ),
    "ch_mult": (given(None, *STAGE, "params", "ddconfig", "ch_mult"), ("ddconfig.ch_mult", "a list")),
    "target": (given("os.system", "model", "target"), ("model.target", "LatentDiffusion", "os.system")),
    "argument": (given(1, *PARAMS, "colour"), ("LatentDiffusion", "colour")),
    "no-params": (without(*PARAMS), ("model", "params")),
    "no-model": (without("model"), ("missing section model",)),
    "condition-target": (given({"target": "os.system"}, *CONDITION), ("cond_stage_config.target", "os.system")),
    "condition-image": (given("__is_first_stage__", *CONDITION), ("conditioned on images",)),
}


@pytest.mark.parametrize("name", ["ldm", "sd"])
@pytest.mark.parametrize("case", EITHER_CONFIG)
def test_wrong_configurations(fails, tmp_path, name, case):
    change, names = EITHER_CONFIG[case]
    config = copy.deepcopy(CONFIGS[name])
    change(config)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    fails(name, "--config", "mine.yaml", names=names)


def test_a_text_encoder_that_does_not_fit(latent, fails, tmp_path):
    for value, path, parts in (
        (99, (*CONDITION, "params", "max_length"), ("max_length 99", "16")),
        (
            64,
            (*UNET, "params", "context_dim"),
            ("does not fit", "attn2.to_k.weight (expected [32, 64], found [32, 32])"),
        ),
    ):
        config = copy.deepcopy(CONFIGS["sd"])
        given(value, *path)(config)
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
        fails("sd", "--config", "mine.yaml", names=parts)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("surplus", ("'surplus'", "KEY=VALUE")),
        ("=3", ("'=3'", "KEY=VALUE")),
        ("timesteps=20", ("'timesteps=20'", "config.yaml has no timesteps")),
        ("modle.params.timesteps=20", ("has no modle.params.timesteps",)),
        ("model.timesteps=20", ("has no model.timesteps",)),
        ("model.params.unet_config.dropout=0", ("has no model.params.unet_config.dropout",)),
        ("model.params.tinesteps=20", ("tinesteps",)),
        ("model.params.timesteps=many", ("model.params.timesteps", "whole number", "'many'")),
        ("model.params.timesteps.x=1", ("model.params.timesteps",)),
        ("model.params.channels=[1", ("channels",)),
        ("model.params.linear_end=2", ("betas", "2")),
        ("model.params.unet_config.params.model_channels=64", ("model.ckpt", "does not fit")),
    ],
)
def test_overrides(fails, override, names):
    fails("ldm", override, names=names)


# Calibrated checkpoints of another model


@pytest.mark.parametrize("file", ["ckpt.pth", "ckpt.safetensors"])
def test_a_calibrated_checkpoint_of_another_model(latent, fails, calibrated_latent, file):
    path = calibrated_latent / file
    flags = ("--ptq", "--weight_bit", 4, "--quant_act", "--split", "--cali_ckpt", path)
    fails("cin", *flags, names=(path,))
    fails("sd", *flags, names=(path,))
    fails("ldm", *flags, "--act_bit", 6, names=("--act_bit 6", "contradicts", path))
    fails("ldm", "--ptq", "--weight_bit", 5, "--split", "--cali_ckpt", path, names=("--weight_bit 5", path))


@pytest.fixture(scope="module")
def calibrated_latent(latent, tmp_path_factory):
    """The folder of a W4A8 run of the unconditional model."""
    out = tmp_path_factory.mktemp("calibrated")
    flags = ("--ptq", "--weight_bit", 4, "--quant_act", "--split", *NEAREST)
    assert call("sample_diffusion_ldm", "-r", latent.ldm.ckpt, *LDM, "-n", 1, *flags, "-l", out).code == 0
    return next((out / "samples").iterdir())


def test_a_calibrated_checkpoint_of_a_pixel_model(tiny, calibrated, fails):
    for file in ("ckpt.pth", "ckpt.safetensors"):
        path = calibrated.folder / file
        fails("ldm", *tiny.w4a8, "--cali_ckpt", path, names=(path,))


@pytest.mark.parametrize("out", ["a-file", "a-file/out"])
@pytest.mark.parametrize("name", ["ldm", "sd"])
def test_an_output_folder_that_cannot_be_made(fails, tmp_path, name, out):
    (tmp_path / "a-file").touch()
    fails(name, "--outdir" if name == "sd" else "-l", out, names=("a-file",))

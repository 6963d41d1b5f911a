"""What a user may get wrong with sample_diffusion_ddim.py: exit code 2, one line that says what, and no file."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from running import call, launch, refused, shorten, tree
from safetensors.torch import load_file, save_file

SAMPLE = "sample_diffusion_ddim"
GOLDEN = Path(__file__).parents[2] / "fixtures" / "ddim_split_w4a8_sym"


class Foreign:
    """Stands for any object a pickle may bring along."""


# Flags alone


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--timesteps", 0), ("--timesteps", "at least 1", "'0'")),
        (("--timesteps", 2000), ("--timesteps 2000", "at most 1000", "tiny.yml")),
        (("--timesteps", "many"), ("--timesteps", "'many'")),
        (("--max_images", 0), ("--max_images", "at least 1", "'0'")),
        (("--max_images", -1), ("--max_images", "'-1'")),
        (("--max_images", 1.5), ("--max_images", "whole number", "'1.5'")),
        (("--eta", 2), ("--eta", "from 0 to 1", "'2'")),
        (("--eta", "nan"), ("--eta", "'nan'")),
        (("--seed", -1), ("--seed", "'-1'")),
        (("--seed", 2**64), ("--seed", str(2**64))),
        (("--skip_type", "cubic"), ("--skip_type", "uniform", "quad", "cubic")),
        (("--sample_type", "plms"), ("--sample_type", "generalized", "dpm_solver", "plms")),
        (("--device", "nonsense"), ("--device nonsense", "cpu")),
        (("--device", "meta"), ("--device meta",)),
        (("--resume",), ("--resume", "needs --ptq")),
        (("--ptq", "--resume"), ("--resume", "--cali_ckpt")),
        (("--ptq", "--resume_w", "--quant_act"), ("--resume_w", "--cali_ckpt")),
        (("--weight_bit", 4), ("--weight_bit", "--ptq")),
        (("--quant_act",), ("--quant_act", "--ptq")),
        (("--method", "quick"), ("--method", "--ptq")),
        (("--cali_ckpt", "ckpt.pth"), ("--cali_ckpt", "--ptq")),
        (("--ptq", "--method", "magic"), ("--method", "nearest", "q-diffusion", "magic")),
        (("--ptq", "--quant_mode", "magic"), ("--quant_mode", "qdiff", "magic")),
        (("--ptq", "--compat", "magic"), ("--compat", "train_mode", "magic")),
        (("--ptq", "--cali_iters", 0), ("--cali_iters", "at least 1", "'0'")),
        (("--ptq", "--cali_iters_a", 0), ("--cali_iters_a", "at least 1", "'0'")),
        (("--ptq", "--cali_batch_size", 0), ("--cali_batch_size", "at least 1")),
        (("--ptq", "--cali_n", 0), ("--cali_n", "at least 1")),
        (("--ptq", "--cali_st", 0), ("--cali_st", "at least 1")),
        (("--ptq", "--cali_st", 9), ("--cali_st 9", "--timesteps 4", "4 steps")),
        (("--ptq", "--cali_lr", 0), ("--cali_lr", "'0'")),
        (("--ptq", "--cali_p", "x"), ("--cali_p", "'x'")),
        (("--ptq", "--ckpt", "nope.pt", "--cali_st", 2), ("nope.pt", "no such")),
        (("--weight_bits", 4), ("--weight_bits",)),
        (("--time", 4), ("--time",)),
        (("surplus",), ("surplus",)),
        (("--max_images",), ("--max_images", "expected one argument")),
    ],
    ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "",
)
def test_flags(fails, flags, names):
    if flags == ("--max_images",):
        flags = ("--max_images", "--ptq")
    fails(*flags, names=names)


@pytest.mark.parametrize("bits", [1, 0, 9, 17, -4, "four"])
@pytest.mark.parametrize("flag", ["--weight_bit", "--act_bit", "--sm_abit"])
def test_bit_widths(fails, flag, bits):
    if flag == "--sm_abit" and bits == 9:
        bits = 32
    fails("--ptq", "--quant_act", flag, bits, names=(flag, "from 2 to", repr(str(bits))))


def test_nothing_and_help(tmp_path):
    refused(call(SAMPLE), "--config", "required")
    result = call(SAMPLE, "--help")
    assert result.code == 0 and result.err == ""
    assert tree(tmp_path) == {}


def test_a_mistake_in_a_process_of_its_own(tiny, tmp_path):
    """One line there too, where no test has touched the logging."""
    result = launch(SAMPLE, *tiny.sampling, "--ckpt", "nope.pt", "-l", "out", cwd=tmp_path)
    assert result.err == "sample_diffusion_ddim.py: error: nope.pt: no such checkpoint\n" and result.code == 2
    assert tree(tmp_path) == {}


def test_verbose_shows_where_it_went_wrong(tiny):
    result = call(SAMPLE, *tiny.sampling, "--ckpt", "nope.pt", "--verbose")
    assert result.code == 2 and result.err.count("sample_diffusion_ddim.py: error: nope.pt") == 1


# The configuration and the float weights


def test_no_configuration(fails, tmp_path):
    fails(model=("--config", "nope.yml", "--use_pretrained"), names=("nope.yml", "no such"))
    fails(model=("--config", tmp_path, "--use_pretrained"), names=(tmp_path, "no such"))


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("ch: 32", "ch: wide", ("model.ch", "whole number", "'wide'")),
        ("ch: 32", "ch: 33", ("multiple of 32", "33")),
        ("ch: 32", "ch: 64", ("tiny.safetensors", "does not fit", "conv_in.bias")),
        ("ch_mult: [1]", "ch_mult: 2", ("model.ch_mult", "list", "2")),
        ("ch_mult: [1]", "ch_mult: []", ("ch_mult",)),
        ("ch_mult: [1]", "ch_mult: [1, 1, 1, 1, 1, 1]", ("image_size", "16")),
        ("image_size: 16", "image_size: '16'", ("data.image_size", "'16'")),
        ("channels: 3, r", "channels: 1, r", ("data.channels", "model.in_channels", "1, 3")),
        ("ch_mult: [1]", "ch_mult: [1000000]", ("ch_mult", "32768", "1000000")),
        ("batch_size: 2", "batch_size: 0", ("sampling.batch_size", "0")),
        ("batch_size: 2", "size: 2", ("sampling.batch_size", "missing")),
        ("dropout: 0.1", "dropout: 7", ("model.dropout", "7")),
        ("num_diffusion_timesteps: 1000", "num_diffusion_timesteps: -1", ("num_diffusion_timesteps", "-1")),
        ("beta_start: 0.0001", "beta_start: -3", ("betas", "-3")),
        ("beta_schedule: linear", "beta_schedule: steep", ("linear", "'steep'")),
        ("sampling: {", "samples: {", ("missing section sampling",)),
        ("pretrained: tiny.safetensors", "pretrained: nope.ckpt", ("nope.ckpt", "not found", "ema_cifar10")),
        ("pretrained: tiny.safetensors", "pretrained: 5", ("pretrained", "5")),
        ("pretrained: tiny.safetensors", "", ("pretrained",)),
        ("rescaled: true", "rescaled: false", ("rescaled",)),
        ("model:", "model: [", ("not valid YAML",)),
    ],
    ids=lambda value: value.strip("{: [") if isinstance(value, str) else "",
)
def test_a_wrong_configuration(tiny, fails, tmp_path, old, new, names):
    text = tiny.config.read_text()
    assert old in text
    (tmp_path / "wrong.yml").write_text(text.replace(old, new))
    shutil.copy(tiny.weights, tmp_path)
    line = fails(model=("--config", "wrong.yml", "--use_pretrained", "--timesteps", 4), names=names)
    assert "wrong.yml" in line or "tiny.safetensors" in line or "nope.ckpt" in line


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_which_no_picture_can_be_made(tiny, fails, tmp_path, channels):
    """Refused with the configuration, not at the first picture, after a calibration."""
    text = tiny.config.read_text()
    for name in ("channels: ", "in_channels: ", "out_ch: "):
        text = text.replace(f"{name}3", f"{name}{channels}")
    (tmp_path / "wrong.yml").write_text(text)
    names = ("wrong.yml", "data.channels", "1 (grey) or 3 (RGB)", channels)
    fails(model=("--config", "wrong.yml", "--use_pretrained"), names=names)


@pytest.mark.parametrize("content", ["", "- 1\n", "words", "\x00"], ids=["empty", "list", "words", "binary"])
def test_a_file_that_is_no_configuration(fails, tmp_path, content):
    (tmp_path / "wrong.yml").write_text(content)
    fails(model=("--config", "wrong.yml", "--use_pretrained"), names=("wrong.yml",))


def test_no_weights_asked_for(tiny, fails):
    fails(model=("--config", tiny.config), names=("--use_pretrained", "--ckpt"))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_truncated_weights(tiny, fails, tmp_path, form, share):
    whole, path = tmp_path / f"whole.{form}", tmp_path / f"cut.{form}"
    save_file(load_file(tiny.weights), whole) if form == "safetensors" else torch.save(load_file(tiny.weights), whole)
    shorten(whole, path, share)
    fails("--ckpt", path, names=(path, "not a readable checkpoint"))


@pytest.fixture
def two_levels(tiny, tmp_path):
    """Flags of the tiny model with the levels of the golden case, at another width."""
    text = (
        tiny.config.read_text()
        .replace("ch_mult: [1]", "ch_mult: [1, 2]")
        .replace("resolutions: []", "resolutions: [8]")
    )
    (tmp_path / "two.yml").write_text(text)
    return "--config", "two.yml", "--timesteps", 4, "--max_images", 3


@pytest.mark.parametrize("beside", [(), ("--ptq", "--method", "nearest", "--cali_st", 2, "--cali_n", 2)])
def test_weights_of_another_architecture(fails, two_levels, beside):
    path = GOLDEN / "fp.safetensors"
    fails("--ckpt", path, *beside, model=two_levels, names=(path, "does not fit", "expected [64", "found [32"))


@pytest.mark.parametrize("content", [{"a": 1}, [torch.zeros(2)], Foreign()], ids=["numbers", "list", "foreign"])
def test_weights_that_are_none(fails, tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    line = fails("--ckpt", "a.ckpt", names=("a.ckpt",))
    assert "Foreign" in line or not isinstance(content, Foreign)


# The calibrated checkpoint


def test_no_calibrated_checkpoint(tiny, fails, tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("nope.pth", "nope.safetensors", "folder"):
        fails(*tiny.w4a8, "--cali_ckpt", name, names=(f"--cali_ckpt {name}", "no such file"))


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
def test_a_truncated_calibrated_checkpoint(tiny, fails, calibrated, tmp_path, name, share):
    path = shorten(calibrated.folder / name, tmp_path / name, share)
    fails(*tiny.w4a8, "--cali_ckpt", path, names=(path, "not a readable"))


@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
def test_a_calibrated_checkpoint_of_another_architecture(tiny, tiny32, two_levels, fails, calibrated, name, tmp_path):
    path = calibrated.folder / name
    if name == "ckpt.safetensors":
        fails(*tiny.w4a8, "--cali_ckpt", path, model=tiny32.sampling, names=(path, "ch_mult [1]", "[1, 1]"))
        (tmp_path / "large.yml").write_text(tiny.config.read_text().replace("image_size: 16", "image_size: 32"))
        model = ("--config", "large.yml", "--timesteps", 4, "--max_images", 3)
        fails(*tiny.w4a8, "--cali_ckpt", path, model=model, names=(path, "image_size 16", "32"))
    else:
        line = fails(*tiny.w4a8, "--cali_ckpt", path, model=tiny32.sampling, names=(path, "architecture"))
        assert "downsample" in line
    golden = GOLDEN / "qdiff_wa.pth"
    fails(
        *tiny.w4a8,
        "--ckpt",
        tiny.weights,
        "--cali_ckpt",
        golden,
        model=two_levels,
        names=(golden, "architecture", "[32, 32, 3, 3]", "[64, 32, 3, 3]"),
    )


def test_files_that_are_no_calibrated_checkpoint(tiny, fails, data, tmp_path):
    torch.save(load_file(tiny.weights), tmp_path / "float.pth")
    torch.save([1], tmp_path / "list.pth")
    fails(
        *tiny.w4a8, "--cali_ckpt", "float.pth", names=("float.pth", "expected a Q-Diffusion checkpoint", "74 entries")
    )
    fails(*tiny.w4a8, "--cali_ckpt", "list.pth", names=("list.pth", "expected a Q-Diffusion checkpoint", "found list"))
    fails(*tiny.w4a8, "--cali_ckpt", data.file, names=(data.file, "expected a Q-Diffusion checkpoint"))
    fails(*tiny.w4a8, "--cali_ckpt", tiny.weights, names=(tiny.weights, "expected a calibrated checkpoint"))
    shard = data.shards / "shard_00000.safetensors"
    fails(*tiny.w4a8, "--cali_ckpt", shard, names=(shard, "expected a calibrated checkpoint", "qdiff-trajectories-1"))
    fails(*tiny.w4a8, "--cali_ckpt", tiny.config, names=(tiny.config, "not a readable Q-Diffusion checkpoint"))


@pytest.mark.parametrize("flag", ["--cali_ckpt", "--cali_data_path"])
@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_a_pickle_with_a_foreign_object_names_its_class(tiny, fails, tmp_path, recwarn, flag, protocol):
    """Saved by torch, or a plain pickle (of protocol 4, which a weights-only load does not follow that far)."""
    path = tmp_path / "foreign.pth"
    content = {"model.a.weight_quantizer.delta": torch.zeros(1), "xs": torch.zeros(1), "ts": Foreign()}
    torch.save(content, path) if protocol is None else path.write_bytes(pickle.dumps(Foreign(), protocol))
    flags = ("--ptq", *tiny.nearest) if flag == "--cali_data_path" else tiny.w4a8
    fails(*flags, flag, path, names=(path, "not a PyTorch file" if protocol == 4 else "Foreign"))
    assert not recwarn.list  # they would be further lines on standard error


# Flags that contradict the checkpoint


@pytest.mark.parametrize("file", ["ckpt.pth", "original"])
@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--weight_bit 4 --quant_act --act_bit 8 --a_sym", ("--split left out", "split shortcuts")),
        ("--weight_bit 8 --quant_act --act_bit 8 --a_sym --split", ("--weight_bit 8", "4 bits")),
        ("--weight_bit 2 --quant_act --act_bit 8 --a_sym --split", ("--weight_bit 2", "4 bits")),
        ("--quant_act --act_bit 8 --a_sym --split", ("--weight_bit 8", "4 bits")),
        ("--weight_bit 4 --quant_act --act_bit 8 --split", ("--a_sym left out", "symmetric")),
    ],
    ids=["no-split", "w8", "w2", "w-left-out", "no-a_sym"],
)
def test_flags_against_ckpt_pth(fails, calibrated, published, file, flags, names):
    path = published.both if file == "original" else calibrated.folder / file
    for beside in ((), ("--resume",)):
        fails("--ptq", *flags.split(), "--cali_ckpt", path, *beside, names=(*names, "contradicts", path))


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """A W4A8 run without split and with asymmetric activations."""
    out = tmp_path_factory.mktemp("plain")
    flags = ("--ptq", "--weight_bit", 4, "--quant_act")
    assert call(SAMPLE, *tiny.sampling, "--max_images", 1, *flags, *tiny.nearest, "-l", out).code == 0
    (folder,) = (out / "samples").iterdir()
    return folder


@pytest.mark.parametrize("name", ["ckpt.pth", "ckpt.safetensors"])
@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--weight_bit 4 --quant_act --split", ("--split",)),
        ("--weight_bit 4 --split", ("--split",)),
        ("--weight_bit 4 --quant_act --a_sym", ("--a_sym",)),
        ("--weight_bit 5 --quant_act", ("--weight_bit 5", "4 bits")),
        ("--weight_bit 4 --quant_act --act_bit 6", ("--act_bit 6", "8 bits")),
        ("--weight_bit 4 --quant_act --sm_abit 16", ("--sm_abit 16", "8 bits")),
    ],
    ids=["split", "split-weights-only", "a_sym", "w5", "a6", "sm16"],
)
def test_flags_against_a_file_of_ours(fails, plain, name, flags, names):
    fails("--ptq", *flags.split(), "--cali_ckpt", plain / name, names=(*names, "contradicts", plain / name))


def test_activations_of_a_file_that_has_none(tiny, fails, published, tmp_path):
    path = published.weights
    fails(*tiny.w4a8, "--cali_ckpt", path, names=("--quant_act", "contradicts", path, "no activation quantizers"))
    out = tmp_path / "made"
    flags = ("--ptq", "--weight_bit", 4, "--split")
    assert call(SAMPLE, *tiny.sampling, "--max_images", 1, *flags, *tiny.nearest, "-l", out).code == 0
    for path in out.glob("samples/*/ckpt.*"):
        fails(*tiny.w4a8, "--cali_ckpt", path, names=("--quant_act", "contradicts", path, "no activation quantizers"))


def test_resume_w_with_a_structure_that_the_weights_do_not_have(tiny, fails, calibrated):
    path = calibrated.folder / "ckpt.safetensors"
    flags = ("--ptq", "--quant_act", *tiny.nearest, "--resume_w", "--cali_ckpt", path)
    fails(*flags, "--weight_bit", 4, names=(f"--resume_w {path}", "--split", "nin_shortcut"))
    fails(*flags, "--split", names=(f"--resume_w {path}", "--weight_bit", "4 bits", "8"))
    fails(*flags, "--split", "--weight_bit", 8, names=("--weight_bit 8", "contradicts", path))
    fails(*flags, "--resume", names=("--resume", "--resume_w"))
    fails("--ptq", "--resume_w", "--cali_ckpt", path, names=("--resume_w", "--quant_act"))


def test_activation_flags_without_quant_act_are_said_to_do_nothing(tiny, tmp_path):
    flags = ("--ptq", "--weight_bit", 4, "--act_bit", 4, "--a_sym", *tiny.nearest)
    result = call(SAMPLE, *tiny.sampling, *flags, "-l", tmp_path / "out")
    assert result.code == 0 and "W4A32" in result.out
    (line,) = result.complaints
    assert "--act_bit, --a_sym: no effect without --quant_act" in line

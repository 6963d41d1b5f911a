"""Two processes do what one does: the same images, calibration data and checkpoints, byte for byte."""

import socket
import subprocess

import pytest
from latents import txt2img
from running import ENVIRONMENT, Result, call, command, launch, only_run, passed, tree

TEAM = ("--devices", 2, "--device", "cpu")


def logs(files):
    """Which processes have kept a log; their own files are taken out."""
    return [name for name in list(files) if name.startswith("run.rank") and files.pop(name)]


def same_but_for_logs(run, alone):
    """Assert that a team has written what one process has, and a log of the second process."""
    found, expected = tree(run), tree(alone)
    assert logs(found) == ["run.rank1.log"] and logs(expected) == []
    assert found.pop("calibration.jsonl", None) == expected.pop("calibration.jsonl", None)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def started_from_outside(script, *args):
    """Both processes of a team started as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    about |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": False}
    started = []
    for rank in (1, 0):
        own = {key: str(value) for key, value in (about | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command(script, *args, *TEAM), env=ENVIRONMENT | own, **pipes))
    return [Result(process.wait(), *process.communicate(timeout=120)) for process in started]


def test_a_pixel_model(tiny, tmp_path):
    """Float states recorded, ranges found, images sampled, by two; the checkpoint and the images as by one."""
    flags = (*tiny.sampling, *tiny.w4a8, *tiny.nearest, "--sequence")
    alone = passed(call("sample_diffusion_ddim", *flags, "-l", tmp_path / "alone"))
    team = passed(launch("sample_diffusion_ddim", *flags, "-l", tmp_path / "team", *TEAM))
    same_but_for_logs(only_run(tmp_path / "team"), only_run(tmp_path / "alone"))
    assert team.out.count("3 images of the W4A8 model") == 1 and team.bars == alone.bars


@pytest.mark.long
def test_a_text_to_image_model(latent, tmp_path):
    """With guidance, and grids of images that both processes have written."""
    flags = ("--prompt", "a cat", "--ptq", "--weight_bit", 4, "--method", "nearest", "--cali_st", 2, "--cali_n", 3)
    alone = txt2img(latent.sd, tmp_path / "alone", *flags)
    options = ("--n_samples", 2, "--n_iter", 2, "--ddim_steps", 4, "--outdir", tmp_path / "team")
    passed(launch("txt2img", "--ckpt", latent.sd.ckpt, *options, *flags, *TEAM))
    (run,) = (tmp_path / "team").iterdir()
    same_but_for_logs(run, alone)


@pytest.mark.long
def test_calibration_data_by_processes_that_were_started_from_outside(latent, tmp_path):
    flags = ("-r", latent.cin.ckpt, "--timesteps", 4, "--n_samples", 5, "--batch_size", 2, "--scale", 3)
    passed(call("make_calibration_data", *flags, "--out", tmp_path / "alone"))
    second, first = started_from_outside("make_calibration_data", *flags, "--out", tmp_path / "team")
    passed(first), passed(second)
    assert second.out == second.err == "" and first.bars == ["calibration data"]
    same_but_for_logs(tmp_path / "team", tmp_path / "alone")

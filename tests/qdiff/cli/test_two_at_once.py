"""Two processes with the same command: the second does not work in the first one's folder."""

import pytest
from latents import LDM
from running import call, passed, refused

from qdiff.cli.runs import run as latent_model
from qdiff.cli.sample import ddim as sample_diffusion_ddim
from qdiff.utils.files import sole_user

BUSY = "another process is at work in this folder"


@pytest.fixture
def meanwhile(monkeypatch):
    """(module, name of the function that samples, command): run it, and the same again while it samples."""

    def run(module, name, *command):
        original, seconds = getattr(module, name), []

        def sampling(*args):
            if not seconds:
                seconds.append(None)  # what the second one samples, if it comes that far, is not a third
                seconds[0] = call(*command)
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, sampling)
            return passed(call(*command)), seconds[0]

    return run


def test_pixel_models(tiny, tmp_path, meanwhile):
    command = ("sample_diffusion_ddim", *tiny.sampling, "-l", tmp_path / "out")
    _, second = meanwhile(sample_diffusion_ddim, "sample", *command)
    (folder,) = (tmp_path / "out" / "samples").iterdir()
    refused(second, folder, BUSY)


def test_latent_models(latent, tmp_path, meanwhile):
    command = ("sample_diffusion_ldm", "-r", latent.ldm.ckpt, *LDM, "-l", tmp_path / "out")
    _, second = meanwhile(latent_model, "write_images", *command)
    (folder,) = (tmp_path / "out" / "samples").iterdir()
    refused(second, folder, BUSY)


def test_another_command_has_a_folder_of_its_own(tiny, tmp_path, meanwhile):
    command = ("sample_diffusion_ddim", *tiny.sampling, "-l", tmp_path / "out")
    folder = tmp_path / "out" / "samples"
    original = sample_diffusion_ddim.sample
    with pytest.MonkeyPatch.context() as patch:

        def sampling(*args):
            patch.setattr(sample_diffusion_ddim, "sample", original)
            passed(call(*command, "--seed", 9))
            return original(*args)

        patch.setattr(sample_diffusion_ddim, "sample", sampling)
        passed(call(*command))
    assert [len(list((run / "img").iterdir())) for run in folder.iterdir()] == [3, 3]


def test_calibration_data(data, tmp_path):
    (tmp_path / "out").mkdir()
    with sole_user(tmp_path / "out"):
        refused(call("make_calibration_data", *data.flags, "--out", tmp_path / "out"), tmp_path / "out", BUSY)
    passed(call("make_calibration_data", *data.flags, "--out", tmp_path / "out"))

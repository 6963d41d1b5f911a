"""What sampling keeps: features as evaluate.py finds them, images that need not be kept, and runs that are killed."""

import os
import random
import signal
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
from running import ENVIRONMENT, call, command, only_run, passed, pictures, refused, tree
from torch_fidelity.metric_fid import fid_features_to_statistics

from qdiff.evaluation.extractors import CIFAR10, CIFAR10_LAYER, Extractor, found_weights
from qdiff.evaluation.images import open_images

SAMPLE = "sample_diffusion_ddim"


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory):
    """The tiny model at the size of CIFAR-10, which the bundled features take."""
    config = tmp_path_factory.mktemp("model32") / "tiny.yml"
    text = tiny.config.read_text().replace("image_size: 16", "image_size: 32").replace("[8]", "[16]")
    config.write_text(text.replace("batch_size: 2", "batch_size: 4"))
    flags = ("--config", config, "--ckpt", tiny.weights, "--timesteps", 2)
    return SimpleNamespace(config=config, flags=flags)


def statistics(run):
    with np.load(run / "statistics.npz") as found:
        return {key: found[key] for key in found.files}


def test_features_are_those_of_the_png_files(model, tmp_path):
    flags = (*model.flags, "--max_images", 10, "--features", "cifar10", "-l", tmp_path / "out")
    result = passed(call(SAMPLE, *flags))
    run = only_run(tmp_path / "out")
    extractor = Extractor(CIFAR10, (CIFAR10_LAYER,), found_weights(CIFAR10), batch_size=4)
    expected = fid_features_to_statistics(extractor.features(open_images(run))[CIFAR10_LAYER])
    found = statistics(run)
    assert found["n"] == 10 and found["mu"].dtype == np.float64
    for key in ("mu", "sigma"):
        assert np.allclose(found[key], expected[key], atol=1e-5)
    assert "statistics.npz: of 10 images" in result.out and "FD (CIFAR-10 features)" in result.out
    evaluated = call(
        "evaluate", run, "--reference", run / "statistics.npz", "--metrics", "fd"
    )  # a reference of its own
    assert evaluated.code == 0 and "10 images, fewer than features" in evaluated.err


def test_images_need_not_be_kept(model, tmp_path):
    """The features are the same; a run that has lost a file makes what is missing, to the same bytes."""
    flags = (*model.flags, "--max_images", 10, "--features", "cifar10")
    passed(call(SAMPLE, *flags, "-l", tmp_path / "with"))
    passed(call(SAMPLE, *flags, "--no_images", "-l", tmp_path / "out"))
    run, other = only_run(tmp_path / "out"), only_run(tmp_path / "with")
    features = {name: bytes_ for name, bytes_ in tree(run).items() if name.startswith("features/")}
    assert len(features) == 3 and not (run / "img").exists() and len(pictures(other)) == 10
    assert features == {name: bytes_ for name, bytes_ in tree(other).items() if name.startswith("features/")}
    whole = (run / "statistics.npz").read_bytes()
    (run / "features" / "0000004.safetensors").unlink()
    (run / "statistics.npz").unlink()
    result = passed(call(SAMPLE, *flags, "--no_images", "-l", tmp_path / "out"))
    assert result.out.startswith(f"going on with {run}: 6 of 10 images are there")
    assert {name: b for name, b in tree(run).items() if name.startswith("features/")} == features
    assert statistics(run)["sigma"].tobytes() in whole


def test_a_latent_model(latent, tmp_path):
    flags = ("-r", latent.ldm.ckpt, "-n", 3, "--batch_size", 2, "-c", 4, "-e", 0, "--seed", 1, "-l", tmp_path / "out")
    message = refused(
        call("sample_diffusion_ldm", *flags, "--features", "cifar10", "--no_images"), "--features cifar10"
    )
    assert "takes images of [3, 32, 32], the model makes" in message


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--no_images",), ("--no_images: keeps nothing without --features",)),
        (("--inception", "a.pth"), ("--inception: for --features inception",)),
        (("--features", "inception", "--inception", "nowhere.pth"), ("--inception nowhere.pth: no such file",)),
        (("--features", "vgg"), ("--features", "'vgg'")),
    ],
)
def test_bad_input(model, flags, parts):
    refused(call(SAMPLE, *model.flags, "--max_images", 2, *flags), *parts)


@pytest.mark.long
def test_a_team_that_is_killed_at_random_ends_with_the_images_of_one_process(tiny, tmp_path):
    """512 images by two processes, all killed after some number of them, then gone on with."""
    config = tmp_path / "big.yml"
    text = tiny.config.read_text().replace("image_size: 16", "image_size: 8").replace("[8]", "[4]")
    config.write_text(text.replace("batch_size: 2", "batch_size: 32"))
    flags = ("--config", config, "--ckpt", tiny.weights, "--timesteps", 2, "--max_images", 512)
    team = command(SAMPLE, *flags, "-l", tmp_path / "team", "--devices", 2, "--device", "cpu")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(team, env=ENVIRONMENT, start_new_session=True, **quiet)
    enough = random.randint(1, 300)
    while len(list(tmp_path.glob("team/samples/*/img/[0-9]*.png"))) < enough:
        assert process.poll() is None
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)  # both processes
    process.wait()
    run = only_run(tmp_path / "team")
    survived = {path.name: path.stat().st_mtime_ns for path in (run / "img").glob("[0-9]*.png")}
    assert enough <= len(survived) < 512
    (run / "img" / ".511.png.half.tmp").touch()  # as a process leaves it that is killed while it writes
    assert subprocess.run(team, env=ENVIRONMENT, timeout=120, **quiet, check=False).returncode == 0
    assert only_run(tmp_path / "team") == run
    passed(call(SAMPLE, *flags, "-l", tmp_path / "alone"))
    assert pictures(run) == pictures(only_run(tmp_path / "alone")) and len(pictures(run)) == 512

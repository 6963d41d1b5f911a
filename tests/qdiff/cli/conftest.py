"""The scripts run as a user runs them: a tiny model with random weights, from a folder that is not the repository's."""

import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from latents import CONFIGS, write_model  # noqa: E402
from running import call, only_run, passed, refused, tree  # noqa: E402

from ddim.pretrained import build_network, load_config  # noqa: E402
from qdiff.evaluation.report import Report  # noqa: E402
from qdiff.evaluation.report_runs import calibration_report  # noqa: E402

# A shell starts its background jobs with Ctrl-C ignored, and every process that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

CONFIG = """
pretrained: tiny.safetensors
data: {dataset: CIFAR10, image_size: 16, channels: 3, rescaled: true}
model:
  type: simple
  in_channels: 3
  out_ch: 3
  ch: 32
  ch_mult: [1]
  num_res_blocks: 1
  attn_resolutions: []
  dropout: 0.1
  resamp_with_conv: true
diffusion: {beta_schedule: linear, beta_start: 0.0001, beta_end: 0.02, num_diffusion_timesteps: 1000}
sampling: {batch_size: 2}
"""
# Flags that many tests give: four bits and eight, a method that takes a second, data that the run makes itself.
W4A8 = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8, "--a_sym", "--split")
QUICK = ("--method", "quick", "--cali_iters", 2, "--cali_st", 4, "--cali_n", 3)
NEAREST = ("--method", "nearest", "--cali_st", 2, "--cali_n", 2)


@pytest.fixture(scope="session", autouse=True)
def one_thread_of_the_cpu():
    """Like the processes that tests start: the same everywhere, and fastest for networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def plots_of_a_pixel():
    """In this process calibrations draw no losses and report nothing: that takes longer than they do.
    cli/test_progress.py looks at the real plot, cli/test_report.py at the reports, and runs in processes of their own
    make both."""

    def write(reports, path):
        if reports:
            Image.new("RGB", (1, 1)).save(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qdiff.cli.quantize.plot_losses", write)
        patch.setattr("qdiff.cli.quantize.calibration_report", lambda *files: Report("left out", "", "", []))
        yield


@pytest.fixture(scope="module")
def real_reports():
    """Calibrations report as they do for a user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qdiff.cli.quantize.calibration_report", calibration_report)
        yield


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The current folder is neither the repository nor the model's."""
    monkeypatch.chdir(tmp_path)


def make_model(folder: Path, config_text: str) -> SimpleNamespace:
    """config and weights of a model with random weights; flags: `model`, and `sampling` for 3 images of 4 steps."""
    config, weights = folder / "tiny.yml", folder / "tiny.safetensors"
    config.write_text(config_text)
    save_file(build_network(load_config(config), seed=3).state_dict(), weights)
    model = ("--config", config, "--use_pretrained")
    sampling = (*model, "--timesteps", 4, "--max_images", 3)
    return SimpleNamespace(config=config, weights=weights, model=model, sampling=sampling)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The model that nearly all tests use: 16 pixels, one level, attention in its middle alone."""
    model = make_model(tmp_path_factory.mktemp("model"), CONFIG)
    return SimpleNamespace(**vars(model), w4a8=W4A8, quick=QUICK, nearest=NEAREST)


@pytest.fixture(scope="session")
def tiny32(tmp_path_factory):
    """Its likeness with 32 pixels, of which the Fréchet distance can be taken, and a second level."""
    config = CONFIG.replace("image_size: 16", "image_size: 32").replace("ch_mult: [1]", "ch_mult: [1, 1]")
    return make_model(tmp_path_factory.mktemp("model32"), config)


@pytest.fixture(scope="session")
def calibrated(tiny, tmp_path_factory):
    """A run of sample_diffusion_ddim.py that calibrates W4A8: its Result and its folder."""
    logdir = tmp_path_factory.mktemp("calibrated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qdiff.cli.quantize.calibration_report", calibration_report)
        result = passed(call("sample_diffusion_ddim", *tiny.sampling, *W4A8, *QUICK, "-l", logdir))
    return SimpleNamespace(result=result, folder=only_run(logdir))


@pytest.fixture(scope="session")
def published(calibrated, tmp_path_factory):
    """Its ckpt.pth as the original code would have written it, without our recipe: `both`, and `weights` alone."""
    state = torch.load(calibrated.folder / "ckpt.pth", weights_only=True)
    folder = tmp_path_factory.mktemp("published")
    torch.save(dict(state), folder / "both.pth")
    torch.save({key: value for key, value in state.items() if "act_quantizer" not in key}, folder / "weights.pth")
    return SimpleNamespace(both=folder / "both.pth", weights=folder / "weights.pth")


@pytest.fixture(scope="session")
def data(tiny, tmp_path_factory):
    """Five float samples of four steps: a folder of three shards, and the original's one file."""
    folder = tmp_path_factory.mktemp("data")
    flags = (*tiny.model, "--timesteps", 4, "--n_samples", 5, "--batch_size", 2)
    for out in (folder / "shards", folder / "data.pt"):
        passed(call("make_calibration_data", *flags, "--out", out))
    return SimpleNamespace(shards=folder / "shards", file=folder / "data.pt", flags=flags)


@pytest.fixture(scope="session")
def latent(tmp_path_factory):
    """Tiny latent models: `ldm` unconditional, `cin` class-conditional, `sd` text-to-image."""
    folder = tmp_path_factory.mktemp("latent")
    return SimpleNamespace(**{name: write_model(folder / name, name) for name in CONFIGS})


@pytest.fixture
def fails(tiny, tmp_path):
    """(*flags, names=parts, model=flags): sampling pixels is refused with a line that names `parts`, and leaves
    nothing."""

    def check(*flags, names=(), model=None):
        before = tree(tmp_path)
        model = tiny.sampling if model is None else model
        result = call("sample_diffusion_ddim", *model, *flags, "-l", tmp_path / "out")
        line = refused(result, *names)
        assert tree(tmp_path) == before
        return line

    return check

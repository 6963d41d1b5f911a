"""train.py: a few steps of each of the five models, going on after an interruption, exports that load, bad flags."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from running import call, passed, refused
from safetensors.torch import load_file

from ddim.pretrained import build_network, load_state, load_weights
from ddim.pretrained import load_config as load_pixel_config
from ldm.pretrained import load_config, load_model
from ldm.util import instantiate_from_config
from qdiff.cli import training

REPOSITORY = Path(__file__).parents[3]
DATA = REPOSITORY / "tests" / "fixtures" / "cifar10_test_200.npz"
LAST = Path("checkpoints") / "last.ckpt"
CONFIGS = REPOSITORY / "configs" / "train"
COMMON = (
    "data.params.num_workers=0",
    "lightning.trainer.val_check_interval=2",
    "lightning.trainer.log_every_n_steps=1",
)
TINY_UNET = ("model.params.unet_config.params.model_channels=32", "model.params.unet_config.params.channel_mult=[1]")
TINY_STAGE = ("ddconfig.num_res_blocks=1", "ddconfig.ch_mult=[1,1]")
STAGE_OF_LATENT = tuple(f"model.params.first_stage_config.params.{text}" for text in TINY_STAGE)
TINY = {
    "ddim": tuple(
        f"model.params.unet_config.params.{text}"
        for text in ("ch=32", "ch_mult=[1,1]", "num_res_blocks=1", "attn_resolutions=[]", "dropout=0.1")
    ),
    "vq": tuple(f"model.params.{text}" for text in TINY_STAGE),
    "kl": tuple(f"model.params.{text}" for text in TINY_STAGE),
    "ldm": (*TINY_UNET, *STAGE_OF_LATENT),
    "sd": (
        *TINY_UNET,
        *STAGE_OF_LATENT,
        f"model.params.cond_stage_config.params.version={REPOSITORY / 'models' / 'cifar10-sd' / 'text'}",
    ),
}


def flags(name, folder, *more, steps=3):
    """A training of a tiny model: `steps` steps of 2 images, the schedule of the learning rate that of 6 steps."""
    rate = "model.params.scheduler_config.params.max_decay_steps=6"
    warm_up = "model.params.scheduler_config.params.warm_up_steps=2"
    run = ("--config", CONFIGS / f"cifar10-{name}.yaml", "--data", DATA, "--max_steps", steps, "--batch_size", 2)
    return (*run, "--accelerator", "cpu", "-l", folder, *more, *COMMON, *TINY[name], rate, warm_up)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Both first stages, trained for three steps and exported: {name: its folder}."""
    folders = {}
    for name in ("vq", "kl"):
        folders[name] = tmp_path_factory.mktemp(name)
        passed(call("train", *flags(name, folders[name] / "run", "--export", folders[name] / "out")))
    return folders


@pytest.fixture(scope="module")
def trainings(stages):
    """The overrides that name the latent models' trained first stages."""
    used = {"ldm": "vq", "sd": "kl"}
    return {
        name: (f"model.params.first_stage_config.params.ckpt_path={stages[stage] / 'out' / 'model.safetensors'}",)
        for name, stage in used.items()
    }


def plain(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", ["vq", "kl"])
def test_first_stages(stages, name):
    folder = stages[name] / "out"
    tensors, config = load_file(folder / "model.safetensors"), plain(folder / "config.yaml")
    model = instantiate_from_config(config["model"])
    load_weights(model, load_state(folder / "model.safetensors"), folder)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    trained = torch.load(stages[name] / "run" / LAST, weights_only=True)
    assert trained["global_step"] == 3
    weight = trained["state_dict"]["encoder.conv_in.weight"]
    torch.testing.assert_close(model.encoder.conv_in.weight.detach(), weight, rtol=1e-3, atol=1e-4)
    metrics = (stages[name] / "run" / "metrics" / "version_0" / "metrics.csv").read_text()
    assert "val/psnr" in metrics.splitlines()[0] and len(metrics.splitlines()) == 5  # three steps, one validation


def test_pixel_model_loads_in_the_sampling_script(tmp_path):
    out = tmp_path / "out"
    result = passed(call("train", *flags("ddim", tmp_path / "run", "--export", out)))
    assert result.out == f"3 steps; {out / 'model.safetensors'}\n" and result.bars == ["training"]
    config = load_pixel_config(out / "config.yaml")
    load_weights(build_network(config), load_state(out / "model.safetensors"), out)
    run = ("--config", out / "config.yaml", "--timesteps", 2, "--max_images", 1, "-l", tmp_path / "images")
    passed(call("sample_diffusion_ddim", *run, "--ckpt", out / "model.safetensors"))
    trained = torch.load(tmp_path / "run" / LAST, weights_only=True)["state_dict"]
    exported = load_file(out / "model.safetensors")
    average = trained["model_ema.diffusion_modelconv_outweight"]
    assert torch.equal(exported["conv_out.weight"], average.half())
    assert not torch.equal(average, trained["model.diffusion_model.conv_out.weight"])


@pytest.mark.parametrize("name", ["ldm", "sd"])
@pytest.mark.cases("sd")
def test_latent_models_load(trainings, tmp_path, name):
    out, run = tmp_path / "out", tmp_path / "run"
    passed(call("train", *flags(name, run, "--export", out, *trainings[name])))
    shutil.move(out, tmp_path / "elsewhere")  # nothing in it points back
    out = tmp_path / "elsewhere"
    model = load_model(load_config(out / "config.yaml"), out / "model.safetensors")
    trained = torch.load(run / LAST, weights_only=True)["state_dict"]
    assert model.scale_factor == trained["scale_factor"] != 1
    average = trained["model_ema.diffusion_modelout2weight"]
    assert torch.equal(model.model.diffusion_model.out[2].weight, average.half().float())
    expected = {key for key in trained if not key.startswith("model_ema.")} - {"scale_factor"}
    assert set(load_file(out / "model.safetensors")) == expected
    stage = trainings[name][0].split("=")[1]
    for key, value in load_file(stage).items():
        assert torch.equal(trained[f"first_stage_model.{key}"], value.float()), key  # frozen
    if name == "sd":
        assert model.get_learned_conditioning(["a photo of a cat"]).shape == (1, 16, 128)
    with torch.no_grad():
        shape = (1, model.channels, 16, 16)
        assert model.decode_first_stage(torch.zeros(shape)).shape == (1, 3, 32, 32)


CASES = {
    "ddim": (),  # with dropout
    "accumulated": ("lightning.trainer.accumulate_grad_batches=2",),
    "kl": (),
    "vq": (),
    "ldm": (),
    "sd": (),
}


@pytest.fixture(scope="module")
def uninterrupted(trainings, tmp_path_factory):
    """case -> (its flags, the checkpoint after five steps in one go)"""
    made = {}

    def train(case):
        if case not in made:
            name = case if case in TINY else "ddim"
            more = (*CASES[case], *trainings.get(name, ()), "lightning.checkpoint_every=2")
            folder = tmp_path_factory.mktemp(case)
            passed(call("train", *flags(name, folder, *more, steps=5)))
            made[case] = (name, more, torch.load(folder / LAST, weights_only=True))
        return made[case]

    return train


def assert_same_training(one, path):
    other = torch.load(path, weights_only=True)
    assert one["global_step"] == other["global_step"] == 5
    different = [key for key, value in one["state_dict"].items() if not torch.equal(value, other["state_dict"][key])]
    assert different == [] and one["state_dict"].keys() == other["state_dict"].keys()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.cases("vq")
def test_a_training_goes_on_as_if_it_had_not_ended(uninterrupted, tmp_path, case):
    name, more, whole = uninterrupted(case)
    passed(call("train", *flags(name, tmp_path, *more, steps=3)))
    passed(call("train", *flags(name, tmp_path, "--resume", *more, steps=5)))
    assert_same_training(whole, tmp_path / LAST)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.cases("accumulated")
def test_a_killed_training_goes_on_as_if_it_had_not_been(uninterrupted, tmp_path, monkeypatch, case):
    name, more, whole = uninterrupted(case)

    def full_disk(self, trainer, *rest):
        if trainer.global_step == 3:
            raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(training.StepBar, "on_train_batch_end", full_disk)
        refused(call("train", *flags(name, tmp_path / "run", *more, steps=5)), "the disk is full")
    assert torch.load(tmp_path / "run" / LAST, weights_only=True)["global_step"] == 2
    # From the folder of the killed run into another one, whose own is left as it is.
    resume = ("--resume", tmp_path / "run")
    passed(call("train", *flags(name, tmp_path / "rest", *resume, *more, steps=5)))
    assert_same_training(whole, tmp_path / "rest" / LAST)
    assert torch.load(tmp_path / "run" / LAST, weights_only=True)["global_step"] == 2


def test_ctrl_c_ends_with_130_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    def press(self, trainer, *rest):
        if trainer.global_step == 3:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(training.StepBar, "on_train_batch_end", press)
    try:
        result = call("train", *flags("ddim", tmp_path / "run", "lightning.checkpoint_every=2", steps=5))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
    assert result.code == 130
    assert result.complaints == ["interrupted"]
    assert torch.load(tmp_path / "run" / LAST, weights_only=True)["global_step"] == 2


def test_export_without_further_steps(uninterrupted, trainings, tmp_path):
    name, more, whole = uninterrupted("ldm")
    torch.save(whole, tmp_path / "given.ckpt")
    given = ("--resume", tmp_path / "given.ckpt", "--export", tmp_path / "model.safetensors")
    passed(call("train", *flags(name, tmp_path / "run", *given, *more, steps=5)))
    average = whole["state_dict"]["model_ema.diffusion_modelout2weight"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["model.diffusion_model.out.2.weight"], average.half())


def test_a_run_writes_into_its_folder_alone(tmp_path):
    passed(call("train", *flags("ddim", tmp_path / "run", steps=1)))
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    metrics = {f"run/metrics/version_0/{name}" for name in ("metrics.csv", "hparams.yaml")}
    assert found - metrics == {"run/run.log", "run/config.yaml", f"run/{LAST}"}
    log = (tmp_path / "run" / "run.log").read_text()
    assert "command: " in log and "WARNING" not in log and "ERROR" not in log
    assert plain(tmp_path / "run" / "config.yaml")["lightning"]["trainer"]["max_steps"] == 1


def test_mixed_precision_keeps_float32_weights(tmp_path):
    passed(call("train", *flags("ddim", tmp_path / "run", "--precision", "bf16-mixed", steps=1)))
    state = torch.load(tmp_path / "run" / LAST, weights_only=True)["state_dict"]
    assert {value.dtype for name, value in state.items() if not name.endswith("num_updates")} == {torch.float32}
    assert all(value.isfinite().all() for value in state.values())


def test_dry_run_writes_nothing(tmp_path):
    result = passed(call("train", *flags("sd", tmp_path / "run", "--dry_run", "--export", tmp_path / "out", steps=7)))
    plan = yaml.safe_load(result.out)
    assert plan["lightning"]["trainer"]["max_steps"] == 7 and plan["seed"] == 1234
    assert plan["data"]["params"]["train"]["params"]["path"] == str(DATA)
    assert plan["model"]["params"]["unet_config"]["params"]["model_channels"] == 32
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TINY)
def test_configurations_have_the_bundled_models_sizes(name):
    config = plain(CONFIGS / f"cifar10-{name}.yaml")["model"]["params"]
    bundled = REPOSITORY / "models"
    if name == "ddim":
        network = plain(REPOSITORY / "configs" / "cifar10-small.yml")["model"]
        ours = config["unet_config"]["params"]
        assert all(ours[key] == network[key] for key in ours if key != "image_size") and ours["image_size"] == 32
        return
    model = plain(bundled / f"cifar10-{ {'vq': 'ldm', 'kl': 'sd'}.get(name, name) }" / "config.yaml")["model"]["params"]
    if name in ("vq", "kl"):
        assert {**model["first_stage_config"]["params"]}.items() <= config.items()
        return
    for key in ("linear_start", "linear_end", "timesteps", "image_size", "channels", "unet_config"):
        assert config[key] == model[key]
    stage = dict(config["first_stage_config"]["params"])
    assert stage.pop("ckpt_path") and stage == model["first_stage_config"]["params"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--max_steps", "-1"), "--max_steps: expected a whole number of at least 0, found '-1'"),
        (("--max_steps", "0"), "--max_steps 0: trains nothing, so it needs --resume"),
        (("--batch_size", "0"), "--batch_size: expected a whole number of at least 1"),
        (("--precision", "16-mixed"), "--precision 16-mixed: needs a GPU"),
        (("--precision", "8"), "--precision: invalid choice: '8'"),
        (("--colour", "red"), "unrecognized arguments: --colour red"),
        (("colour",), "unrecognized arguments: colour"),
        (("model.params.colour=red",), "unexpected argument 'colour'"),
        (("model.target=os.system",), "target 'os.system'"),
        (("model.target=torch.nn.Identity",), "cannot be trained"),
        (("lightning.trainer.colour=red",), "lightning.trainer: expected max_steps"),
        (("lightning.trainer.max_steps=many", "--max_steps"), "--max_steps"),
        (("model.params.beta_schedule=cosine", "--export", "out"), "beta_schedule: a pixel model"),
        (("--accelerator", "abacus"), "--accelerator abacus"),
        (("--devices", "none"), "--devices none"),
        (("--data", "nowhere.npz"), "nowhere.npz: expected an .npz file"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--resume",), "--resume: no checkpoint"),
        (("--resume", "nowhere.ckpt"), "--resume: no checkpoint nowhere.ckpt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_a_user_may_get_wrong(tmp_path, more, words):
    refused(call("train", *flags("ddim", tmp_path / "run"), *more), words)
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_do_not_fit(uninterrupted, tmp_path):
    _, _, whole = uninterrupted("ldm")
    run = flags("ddim", tmp_path / "run")
    torch.save(whole, tmp_path / "other.ckpt")
    refused(call("train", *run, "--resume", tmp_path / "other.ckpt"), "other.ckpt does not fit the network")
    torch.save(whole["state_dict"], tmp_path / "weights.ckpt")
    refused(call("train", *run, "--resume", tmp_path / "weights.ckpt"), "weights.ckpt", "state of a training")
    (tmp_path / "damaged.ckpt").write_bytes((tmp_path / "other.ckpt").read_bytes()[:5000])
    refused(call("train", *run, "--resume", tmp_path / "damaged.ckpt"), "damaged.ckpt")
    assert not (tmp_path / "run").exists()


def test_a_training_is_not_overwritten_nor_continued_with_another_seed(tmp_path):
    run = flags("ddim", tmp_path / "run", steps=1)
    passed(call("train", *run))
    before = (tmp_path / "run" / LAST).read_bytes()
    refused(call("train", *run), f"--logdir {tmp_path / 'run'}", "--resume")
    refused(call("train", *run, "--seed", 5, "--resume"), "--seed 5", "seed 1234")
    assert (tmp_path / "run" / LAST).read_bytes() == before


def test_a_diverged_training_ends(tmp_path):
    result = call("train", *flags("ddim", tmp_path / "run", steps=10), "model.base_learning_rate=1e30")
    refused(result, "the loss is nan after 10 steps; lower model.base_learning_rate")


def test_curves_for_tensorboard(tmp_path):
    """Beside the file of metrics, and only where they are asked for."""
    passed(call("train", *flags("ddim", tmp_path / "run", "--tensorboard", steps=2)))
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert list((tmp_path / "run").rglob("metrics.csv"))

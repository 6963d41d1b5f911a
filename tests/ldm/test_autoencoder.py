from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel, VQModelInterface, psnr
from ldm.util import instantiate_from_config

REPOSITORY = Path(__file__).parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures"
PERCEPTUAL = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": {"disc_start": 50001}}

DDCONFIG = {"ch": 32, "out_ch": 3, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
DDCONFIG |= {"in_channels": 3, "resolution": 16}
KL = {"ddconfig": {**DDCONFIG, "z_channels": 4, "double_z": True}, "embed_dim": 4}
VQ = {"ddconfig": {**DDCONFIG, "z_channels": 3, "double_z": False}, "embed_dim": 3, "n_embed": 64}
CASES = [(AutoencoderKL, KL), (VQModel, VQ), (VQModelInterface, VQ)]
NAMES = ["kl", "vq", "vq-interface"]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def seeded(cls, config, seed=0, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return cls(**{**config, **changes})


def trainer(steps, folder, **changes):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0}
    return pl.Trainer(**{**quiet, "max_steps": steps, "default_root_dir": folder, **changes})


@pytest.fixture(scope="session")
def golden():
    return load_file(FIXTURES / "autoencoders.safetensors")


@pytest.fixture
def part(golden):
    """The tensors below a prefix."""
    return lambda prefix: {name[len(prefix) :]: v for name, v in golden.items() if name.startswith(prefix)}


@pytest.fixture(scope="session")
def photographs():
    """CIFAR-10 test images, [200, 32, 32, 3] in [-1, 1]."""
    with np.load(FIXTURES / "cifar10_test_200.npz") as file:
        return torch.from_numpy(file["images"]).float() / 127.5 - 1


@pytest.fixture
def batches(photographs):
    """A loader of one batch, over and over."""
    images = [{"image": image} for image in photographs[:8, 8:24, 8:24]]
    return DataLoader(images * 100, batch_size=8)


# Golden cases: `encoded` is what leaves `quant_conv`, the moments of the posterior or the latents before quantization.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden_kl_first_stage(part, dtype):
    model, io = AutoencoderKL(**KL).eval().requires_grad_(False), part("io.kl.")
    model.load_state_dict(part("kl."))
    model.to(dtype)
    posterior = model.encode(io["image"].to(dtype))
    assert posterior.parameters.dtype == dtype and relative(posterior.parameters, io["encoded"]) < 1e-5
    assert relative(model.decode(posterior.mode()), io["decoded"]) < 1e-5
    assert torch.equal(model(io["image"].to(dtype))[0], model.decode(posterior.mode()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden_vq_first_stage(part, dtype):
    model, io = VQModel(**VQ).eval().requires_grad_(False), part("io.vq.")
    model.load_state_dict(part("vq."))
    model.to(dtype)
    latents = model.encode_to_prequant(io["image"].to(dtype))
    quantized, _, (_, _, indices) = model.encode(io["image"].to(dtype))
    assert quantized.dtype == dtype and relative(latents, io["encoded"]) < 1e-5
    assert relative(quantized, io["quantized"]) < 1e-5
    assert relative(model.decode(quantized), io["decoded"]) < 1e-5
    nearest = torch.cdist(latents.permute(0, 2, 3, 1).flatten(0, 2), model.quantize.embedding.weight).argmin(1)
    assert torch.equal(indices, nearest) and nearest.unique().numel() > 4


def test_interface_quantizes_when_it_decodes(part):
    model, io = VQModelInterface(**VQ).eval().requires_grad_(False), part("io.vq.")
    model.load_state_dict(part("vq."))
    latents = model.encode(io["image"])
    assert relative(latents, io["encoded"]) < 1e-5
    assert relative(model.decode(latents), io["decoded"]) < 1e-5
    assert relative(model.decode(io["quantized"], force_not_quantize=True), io["decoded"]) < 1e-5
    assert relative(model.decode(latents, force_not_quantize=True), io["decoded"]) > 0.01


# models/README.md gives 30.7 dB (KL) and 29.4 dB (VQ) on the test images. From the squared error over all of these 200
# come 30.6 dB, and 29.0 dB with quantized latents (29.3 dB without); the mean over images is about 1.5 dB higher.


@pytest.mark.parametrize(
    "name, size, expected, per_image",
    [("cifar10-sd", [4, 16, 16], 30.62, 32.24), ("cifar10-ldm", [3, 16, 16], 28.96, 30.28)],
)
@pytest.mark.cases("cifar10-sd-*")
def test_bundled_first_stages_reconstruct_photographs(photographs, name, size, expected, per_image):
    config = OmegaConf.load(REPOSITORY / "models" / name / "config.yaml")
    model = instantiate_from_config(config.model.params.first_stage_config).eval().requires_grad_(False)
    state, prefix = load_file(REPOSITORY / "models" / name / "model.safetensors"), "first_stage_model."
    model.load_state_dict({key[len(prefix) :]: v for key, v in state.items() if key.startswith(prefix)})
    image = model.get_input({"image": photographs})
    latents = model.encode(image)
    latents = latents.mode() if isinstance(model, AutoencoderKL) else latents
    reconstruction = model.decode(latents)
    assert list(latents.shape[1:]) == size
    over_all = 10 * torch.log10(4 / (reconstruction.clamp(-1, 1) - image).square().mean())
    assert over_all.item() == pytest.approx(expected, abs=0.1)
    assert psnr(image, reconstruction).mean().item() == pytest.approx(per_image, abs=0.1)


def test_first_stage_of_stable_diffusion_has_the_published_size_and_names():
    ddconfig = {**DDCONFIG, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "resolution": 256, "z_channels": 4}
    with torch.device("meta"):
        model = AutoencoderKL(ddconfig, 4, {"target": "torch.nn.Identity"})
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    assert {name.split(".")[0] for name in shapes} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    assert shapes["quant_conv.weight"] == (8, 8, 1, 1) and shapes["post_quant_conv.weight"] == (4, 4, 1, 1)
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == (512, 256, 1, 1)
    assert shapes["decoder.up.1.block.0.nin_shortcut.weight"] == (256, 512, 1, 1)
    assert shapes["decoder.up.3.upsample.conv.weight"] == shapes["encoder.mid.block_1.conv1.weight"]
    assert shapes["encoder.conv_out.weight"] == (8, 512, 3, 3) and shapes["decoder.conv_in.weight"] == (512, 4, 3, 3)


@pytest.mark.parametrize("cls, config", CASES, ids=NAMES)
def test_configurations_may_be_omegaconf_objects(cls, config):
    lossconfig = {"target": "torch.nn.Identity"}
    config = OmegaConf.create({**config, "lossconfig": lossconfig})
    model = cls(**{name: config[name] for name in config})
    assert (
        model.state_dict().keys()
        == cls(**{name: config[name] for name in config if name != "lossconfig"}).state_dict().keys()
    )
    assert model.lossconfig == lossconfig and type(model.lossconfig) is dict


@pytest.mark.parametrize("cls, other", [(AutoencoderKL, VQ), (VQModel, KL)], ids=["kl", "vq"])
def test_double_z_must_agree(cls, other):
    with pytest.raises(ValueError, match=f"double_z must be .* for {cls.__name__}"):
        cls(**{**KL, **VQ, "ddconfig": other["ddconfig"]} if cls is VQModel else {**KL, "ddconfig": other["ddconfig"]})


def test_identity_first_stage_is_one():
    x = torch.arange(4.0)
    stage = IdentityFirstStage()
    assert all(f(x) is x for f in (stage, stage.encode, stage.decode, stage.quantize))
    assert IdentityFirstStage(vq_interface=True).quantize(x)[0] is x


def test_psnr():
    image = torch.zeros(2, 3, 4, 4)
    off = torch.stack([image[0] + 0.2, image[1] + 3])  # the second one is clamped to 1
    assert psnr(image, off).tolist() == pytest.approx([20.0, 10 * np.log10(4)])


# Training


@pytest.mark.parametrize("cls, config", CASES, ids=NAMES)
def test_training_lowers_the_loss_and_repeats_from_its_seed(cls, config, batches, tmp_path):
    def trained():
        model = seeded(cls, config, lossconfig={"target": "torch.nn.Identity"})
        model.learning_rate = 2e-3
        losses = []
        model.on_train_batch_end = lambda outputs, *_: losses.append(outputs["loss"].item())
        trainer(12, tmp_path).fit(model, batches)
        return losses, model.state_dict()

    (losses, state), (again, state_again) = trained(), trained()
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]
    assert losses == again and all(torch.equal(state[name], state_again[name]) for name in state)


def test_noise_of_training_depends_on_the_seed_and_the_batch(batches):
    batch = next(iter(batches))
    model = seeded(AutoencoderKL, KL)
    model.log_dict = lambda *_, **__: None  # there is no trainer

    def loss(seed, index):
        model.seed = seed
        return model.training_step(batch, index).item()

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


@pytest.mark.parametrize("cls, config", CASES, ids=NAMES)
def test_validation_logs_the_reconstruction_of_the_mean(cls, config, photographs, tmp_path):
    model = seeded(cls, config)
    loader = DataLoader([{"image": image} for image in photographs[:8]], batch_size=8)
    logged = trainer(1, tmp_path).validate(model, loader, verbose=False)[0]
    image = model.get_input({"image": photographs[:8]})
    with torch.no_grad():
        reconstruction = model.eval()(image)[0]
    assert logged["val/psnr"] == pytest.approx(psnr(image, reconstruction).mean().item(), rel=1e-5)
    assert logged["val/rec_loss"] == pytest.approx((image - reconstruction).abs().mean().item(), rel=1e-5)
    assert ("val/kl_loss" if cls is AutoencoderKL else "val/quant_loss") in logged


def test_learning_rate_follows_its_schedule():
    schedule = {"warm_up_steps": 10, "lr_start": 0.1, "lr_max": 1.0, "lr_min": 0.5, "max_decay_steps": 20}
    target = "ldm.lr_scheduler.LambdaWarmUpCosineScheduler"
    model = VQModel(**VQ, scheduler_config={"target": target, "params": schedule}, lr_g_factor=0.5)
    model.learning_rate = 1e-3
    (optimizer,), (schedule,) = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["betas"] == (0.5, 0.9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 1e-3 * 0.1) and schedule["interval"] == "step"
    assert sum(p.numel() for p in optimizer.param_groups[0]["params"]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"lossconfig": PERCEPTUAL}, "ReconstructionLoss or none, found .*LPIPSWithDiscriminator"),
        ({"use_ema": True, "batch_resize_range": [128, 256]}, "batch_resize_range, use_ema"),
    ],
)
def test_published_training_that_is_not_supported_is_named_when_training_starts(changes, match, part):
    model = VQModel(**VQ, **changes)
    model.load_state_dict(part("vq."))  # inference needs none of it
    with pytest.raises(ValueError, match=match):
        model.configure_optimizers()


def test_images_come_with_channels_last(photographs):
    model = AutoencoderKL(**KL, image_key="picture").double()
    image = model.get_input({"picture": photographs})
    assert image.dtype == torch.float64 and torch.equal(image, photographs.permute(0, 3, 1, 2).double())
    single = AutoencoderKL({**KL["ddconfig"], "in_channels": 1, "out_ch": 1}, 4)
    assert single.get_input({"image": torch.zeros(2, 8, 8)}).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match=r"picture: .*\[N, H, W, 3\].*found \[200, 3, 32, 32\]"):
        model.get_input({"picture": image})
    with pytest.raises(ValueError, match="image_key: .*'picture' .found image"):
        model.get_input({"image": image})


# Checkpoints


def test_own_training_checkpoints_load_by_path(batches, tmp_path):
    model = seeded(VQModel, VQ)
    run = trainer(1, tmp_path)
    run.fit(model, batches)
    run.save_checkpoint(tmp_path / "model.ckpt")
    again = seeded(VQModel, VQ, seed=1, ckpt_path=str(tmp_path / "model.ckpt"))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_weights_of_a_published_loss_are_left_out_and_others_refused(part, tmp_path):
    state, path = part("kl."), tmp_path / "model.safetensors"
    save_file({**state, "loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}, path)
    model = AutoencoderKL(**KL, ckpt_path=path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    save_file({**state, "encoder.down.2.block.0.conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit .*1 unexpected: encoder\.down\.2"):
        AutoencoderKL(**KL, ckpt_path=path)
    save_file({name: value for name, value in state.items() if name != "quant_conv.bias"}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors .*quant_conv\.bias"):
        AutoencoderKL(**KL, ckpt_path=path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        AutoencoderKL(**KL, ckpt_path=tmp_path / "nowhere.ckpt")


def test_ignored_names_keep_their_initial_values(part, tmp_path):
    save_file(part("vq."), tmp_path / "model.safetensors")
    fresh = seeded(VQModel, VQ).state_dict()
    ignore = {"ckpt_path": tmp_path / "model.safetensors", "ignore_keys": ["quantize.", "decoder.conv_in"]}
    loaded = seeded(VQModel, VQ, **ignore).state_dict()
    kept = {name for name in fresh if name.startswith(("quantize.", "decoder.conv_in"))}
    assert len(kept) == 3 and all(torch.equal(loaded[name], fresh[name]) for name in kept)
    assert all(torch.equal(loaded[name], value) for name, value in part("vq.").items() if name not in kept)

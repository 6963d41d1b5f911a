"""Tiny latent models with random weights, in the layout of published files: a checkpoint, config.yaml beside it."""

import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from PIL import Image
from running import call, only_run, passed
from safetensors.torch import save_file

from ldm.util import instantiate_from_config

BUNDLED = Path(__file__).parents[3] / "models"
TEXT = BUNDLED / "cifar10-sd" / "text"
CLASSES = 5  # of the class-conditional model; the last one stands for no class

UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {"image_size": 8, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1]},
}
STAGE = {"double_z": False, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1]}
STAGE |= {"num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
ENCODERS = "ldm.modules.encoders.modules."


def configuration(channels: int, unet: dict, stage: dict, condition) -> dict:
    """A model of 16×16 images over 8×8 latents."""
    unet = {"in_channels": channels, "out_channels": channels, **unet}
    params = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "image_size": 8,
        "channels": channels,
        "scale_factor": 1.1,
        "unet_config": UNET | {"params": UNET["params"] | unet},
        "first_stage_config": stage,
        "cond_stage_config": condition,
    }
    if isinstance(condition, dict):
        params["conditioning_key"] = "crossattn"
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


def vq() -> dict:
    params = {"embed_dim": 3, "n_embed": 32, "ddconfig": STAGE | {"z_channels": 3}}
    return {"target": "ldm.models.autoencoder.VQModelInterface", "params": params}


def kl() -> dict:
    params = {"embed_dim": 4, "ddconfig": STAGE | {"z_channels": 4, "double_z": True}}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


CROSS_ATTENTION = {"num_heads": 2, "use_spatial_transformer": True, "context_dim": 32, "legacy": False}
CONFIGS = {
    "ldm": configuration(3, {"attention_resolutions": [1], "num_head_channels": 32}, vq(), "__is_unconditional__"),
    "cin": configuration(
        3,
        CROSS_ATTENTION | {"attention_resolutions": [1]},
        vq(),
        {"target": ENCODERS + "ClassEmbedder", "params": {"embed_dim": 32, "n_classes": CLASSES, "key": "class_label"}},
    ),
    "sd": configuration(
        4,
        CROSS_ATTENTION | {"attention_resolutions": [1]},
        kl(),
        {"target": ENCODERS + "FrozenCLIPEmbedder", "params": {"version": "text", "max_length": 16}},
    ),
}


def write_text_encoder(folder: Path) -> None:
    """The bundled model's tokenizer, and a description of a smaller network."""
    shutil.copytree(TEXT, folder, dirs_exist_ok=True)
    described = json.loads((TEXT / "config.json").read_text())
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(described | small))


@dataclass(frozen=True)
class TinyModel:
    """A model's folder, its two files, and the tensors of the first."""

    folder: Path
    ckpt: Path
    config: Path
    state: dict[str, torch.Tensor] = field(repr=False)


def write_model(folder: Path, name: str) -> TinyModel:
    """One of CONFIGS as `folder`/model.ckpt as Lightning writes it, and `folder`/config.yaml.

    All weights are drawn anew, since U-Nets begin with zeros in their last layers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(CONFIGS[name])
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if name == "sd":
        write_text_encoder(folder / "text")
        config["model"]["params"]["cond_stage_config"]["params"]["version"] = str(folder / "text")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = instantiate_from_config({**config["model"], "params": config["model"]["params"] | {"use_ema": False}})
    draws = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            spread = 0.8 / parameter[0].numel() ** 0.5
            parameter.data = spread * torch.randn(parameter.shape, generator=draws)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    content = {"epoch": 1, "global_step": 7, "pytorch-lightning_version": "1.4.2", "state_dict": state}
    torch.save(content, folder / "model.ckpt")
    return TinyModel(folder, folder / "model.ckpt", folder / "config.yaml", state)


def as_safetensors(model: TinyModel, folder: Path) -> Path:
    """A copy of a model's folder with model.safetensors in place of model.ckpt; returns the folder."""
    shutil.copytree(model.folder, folder, ignore=shutil.ignore_patterns("model.ckpt"))
    save_file(model.state, folder / "model.safetensors")
    return folder


def images(run: Path, where: str = "samples") -> dict[str, bytes]:
    """The images of a run's folder: name -> bytes, in order of their names."""
    return {path.name: path.read_bytes() for path in sorted((run / where).iterdir())}


def pixels(path: Path) -> torch.Tensor:
    """[H, W, 3] uint8, read without the package's own functions."""
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)


# Runs of the two sampling scripts: 3 images of 4 steps in batches of 2, in the folder of their own that they make

LDM = ("-n", 3, "--batch_size", 2, "-c", 4, "-e", 0, "--seed", 41)
TXT2IMG = ("--n_samples", 2, "--n_iter", 2, "--ddim_steps", 4)


def sample_ldm(model: TinyModel, out: Path, *flags) -> Path:
    """The folder of a run of sample_diffusion_ldm.py that succeeds."""
    passed(call("sample_diffusion_ldm", "-r", model.ckpt, *LDM, "-l", out, *flags))
    return only_run(out)


def txt2img(model: TinyModel, out: Path, *flags) -> Path:
    """The folder of a run of txt2img.py that succeeds."""
    passed(call("txt2img", "--ckpt", model.ckpt, *TXT2IMG, "--outdir", out, *flags))
    (folder,) = out.iterdir()
    return folder


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], levels: int = 1) -> None:
    """Images [H, W, 3] that differ by float noise: by one of the 256 levels at most."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one.int() - other.int()).abs().max() <= levels


def all_pixels(run: Path, where: str = "samples") -> list[torch.Tensor]:
    """The images of a run's folder in their order."""
    return [pixels(path) for path in sorted((run / where).iterdir())]

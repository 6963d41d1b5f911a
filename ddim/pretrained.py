"""Configurations, and float checkpoints found, checked and loaded."""

import hashlib
import os
from pathlib import Path

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ddim.checkpoints import NARROW, first_names, one_line, open_checkpoint, require_float
from ddim.network import DDPMUNet

REPOSITORY = Path(__file__).resolve().parents[1]

# The DDPM authors' weights (EMA) in PyTorch's format: name -> path in the cache, md5.
PUBLISHED = {
    "ema_cifar10": ("ema_diffusion_cifar10_model/model-790000.ckpt", "1fa350b952534ae442b1d5235cce5cd3"),
    "ema_lsun_bedroom": ("ema_diffusion_lsun_bedroom_model/model-2388000.ckpt", "1921fa46b66a3665e450e42f36c2720f"),
    "ema_lsun_church": ("ema_diffusion_lsun_church_model/model-4432000.ckpt", "fdc68a23938c2397caba4a260bc2445f"),
}
SOURCE = "the DDPM authors' weights as converted by the project https://github.com/pesser/pytorch_diffusion"

REQUIRED = {
    "data": ("image_size", "channels"),
    "model": ("in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "attn_resolutions"),
    "diffusion": ("beta_schedule", "beta_start", "beta_end", "num_diffusion_timesteps"),
    "sampling": ("batch_size",),
}


def load_config(path: str | os.PathLike) -> DictConfig:
    """Reads a configuration in the DDIM repository's layout; `config_file` in it is the path it came from.

    Raises FileNotFoundError, and ValueError for a file that is no such configuration.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:  # the last for what is nested too deep
        raise ValueError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path}: expected the sections {', '.join(REQUIRED)}, found no sections")
    _check_config(config, path)
    config.config_file = str(path)
    return config


def _check_config(config: DictConfig, path: Path) -> None:
    missing = [section for section in REQUIRED if not isinstance(config.get(section), DictConfig)]
    if missing:
        found = ", ".join(map(str, config)) or "none"
        raise ValueError(f"{path}: missing section {', '.join(missing)} (found {found})")
    missing = [f"{section}.{key}" for section, keys in REQUIRED.items() for key in keys if key not in config[section]]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    if not config.data.get("rescaled", True) or config.data.get("logit_transform", False):
        raise ValueError(f"{path}: only images rescaled to [-1, 1] are supported, found other data transforms")


def build_network(config: DictConfig, seed: int = 0) -> DDPMUNet:
    """The network of a configuration: float32, evaluation mode, weights drawn with `seed`."""
    model = config.model
    optional = {key: model[key] for key in ("resamp_with_conv", "dropout", "conv_shortcut") if key in model}
    with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator only
        torch.default_generator.manual_seed(seed)
        network = DDPMUNet(
            in_channels=model.in_channels,
            out_ch=model.out_ch,
            ch=model.ch,
            ch_mult=list(model.ch_mult),
            num_res_blocks=model.num_res_blocks,
            attn_resolutions=list(model.attn_resolutions),
            image_size=config.data.image_size,
            num_diffusion_timesteps=config.diffusion.num_diffusion_timesteps,
            **optional,
        )
    return network.eval()


def find_pretrained(config: DictConfig) -> Path:
    """The checkpoint that `pretrained` names: a published one in the cache, its md5 verified, or a path.

    The cache is $XDG_CACHE_HOME or ~/.cache; a path is relative to the repository, the current folder or the folder
    of the configuration. Raises FileNotFoundError where there is none, ValueError for a wrong md5.
    """
    name = config.get("pretrained")
    if not name:
        where = config.get("config_file", "the configuration")
        raise ValueError(f"{where}: `pretrained` must be a path or one of {', '.join(PUBLISHED)}, found none")
    if name in PUBLISHED:
        return _find_published(name)
    folders = [REPOSITORY, Path.cwd(), Path(config.get("config_file", ".")).resolve().parent]
    candidates = list(dict.fromkeys(folder / Path(name).expanduser() for folder in folders))
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = ", ".join(map(str, candidates))
    bundled = "bundled models are in the repository's folder models"
    known = ", ".join(PUBLISHED)
    raise FileNotFoundError(f"pretrained model {name!r} not found, looked for {looked} (known: {known}; {bundled})")


def _find_published(name: str) -> Path:
    relative, md5 = PUBLISHED[name]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "diffusion_models_converted" / relative
    if not path.is_file():
        raise FileNotFoundError(f"{name} not found at {path}; put {path.name} there, md5 {md5}: {SOURCE}")
    found = _digest(path, hashlib.md5(usedforsecurity=False))
    if found != md5:
        raise ValueError(f"{path} is not the published {name}: expected md5 {md5}, found {found}")
    return path


def load_pretrained(
    config: DictConfig, dtype: torch.dtype = torch.float32, path: str | os.PathLike | None = None
) -> tuple[DDPMUNet, Path]:
    """The network of a configuration with its pretrained weights, in evaluation mode, and the file they came from.

    path: of other weights. Memory is taken once the file is known to fit.
    Raises what `find_pretrained`, `load_state` and `load_weights` raise.
    """
    path = find_pretrained(config) if path is None else Path(path)
    state = load_state(path)
    with torch.device("meta"):  # every weight comes from the file
        network = build_network(config).to(dtype)
    _check_fit(network, state, path)
    load_weights(network.to_empty(device="cpu"), state, path)
    return network, path


def load_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name. Half precision becomes float32. Raises what `open_checkpoint` raises."""
    with open_checkpoint(path) as checkpoint:
        return {name: value.float() if value.dtype in NARROW else value for name, value in checkpoint.items()}


def load_weights(network: torch.nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Copies `state` into the network, strictly.

    Raises ValueError naming `path` and what does not fit, or a tensor of integers or of numbers that are not finite.
    """
    _check_fit(network, state, path)
    for name, target in network.state_dict().items():
        if target.is_floating_point():
            require_float(name, state[name], path, target.dtype)
    network.load_state_dict(state)


def _check_fit(network: torch.nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Raise ValueError naming `path` and names or shapes that are not the network's, which may be on any device."""
    expected = network.state_dict()
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} (expected {list(expected[name].shape)}, found {list(value.shape)})"
            for name, value in state.items()
            if name in expected and value.shape != expected[name].shape
        ],
    }
    found = [f"{len(names)} {kind}: {first_names(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"{path} does not fit the network: {'; '.join(found)}")


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    return _digest(Path(path), hashlib.sha256())


def _digest(path: Path, digest, block: int = 1 << 20) -> str:
    with path.open("rb") as file:
        while chunk := file.read(block):
            digest.update(chunk)
    return digest.hexdigest()

"""Configurations of latent models, and every value that the scripts read of them checked before anything is built."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ddim.limits import CLASSES, SIDE, WIDTH
from ldm.pretrained import load_config
from ldm.schedules import betas_of
from qdiff.families.ldm.conditioning import UNCONDITIONAL
from qdiff.utils.images import PICTURE_CHANNELS, PICTURE_CHANNELS_SAID

IS_FIRST_STAGE = "__is_first_stage__"  # which then encodes images that condition
PARTS = {
    "unet_config": ("UNetModel",),
    "first_stage_config": ("AutoencoderKL", "VQModel", "VQModelInterface", "IdentityFirstStage"),
    "cond_stage_config": ("FrozenCLIPEmbedder", "BERTEmbedder", "ClassEmbedder"),
}


def read_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of a latent diffusion model. overrides: settings in dot-list form, which it must have.

    Raises FileNotFoundError, and ValueError naming the file, the setting, what is expected and what is found.
    """
    config, known = load_config(path, overrides), load_config(path)
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not _is_setting(known, key):
            raise ValueError(f"override {override!r}: {path} has no {key}")
    values = OmegaConf.to_container(config, resolve=True)
    model = Settings(path, "model", values["model"])
    model.class_("target", ("LatentDiffusion",))
    _check_params(model.section("params"))
    try:
        config.model.params.timesteps = len(betas_of(values["model"]["params"]))
    except ValueError as error:
        raise ValueError(f"{path}: model.params: {error}") from error
    return config


def _is_setting(known: DictConfig, key: str) -> bool:
    """Whether a dotted key is in the configuration, or a new argument of a class in it, which knows its arguments."""
    parent, _, name = key.rpartition(".")
    try:
        section = OmegaConf.select(known, parent) if parent else known
    except OmegaConfBaseException:
        return False
    if not isinstance(section, DictConfig):
        return False
    return name in section or (parent.startswith("model.params") and "target" not in section)


class Settings:
    """A section of a configuration, whose values are asked for with what they must be."""

    def __init__(self, path: str | os.PathLike, name: str, values: Any):
        self.path, self.name, self.values = path, name, values
        if not isinstance(values, Mapping):
            self._refuse(name, "a section", values)

    def _refuse(self, name: str, expected: str, found: Any) -> None:
        found = "nothing" if found is None else repr(found)
        raise ValueError(f"{self.path}: {name}: expected {expected}, found {found:.80}")

    def section(self, key: str) -> Settings:
        """The section of that name within this one."""
        return Settings(self.path, f"{self.name}.{key}", self.values.get(key))

    def whole(self, key: str, most: int = 2**63) -> int:
        """A whole number of at least 1."""
        value = self.values.get(key)
        if type(value) is not int or value < 1:
            self._refuse(f"{self.name}.{key}", "a whole number of at least 1", value)
        if value > most:
            self._refuse(f"{self.name}.{key}", f"at most {most}", value)
        return value

    def picture(self, key: str) -> None:
        """Channels of images."""
        if (value := self.whole(key)) not in PICTURE_CHANNELS:
            self._refuse(f"{self.name}.{key}", PICTURE_CHANNELS_SAID, value)

    def same(self, key: str, as_key: str, expected: int) -> None:
        """A whole number that another setting gives too."""
        if (value := self.whole(key)) != expected:
            self._refuse(f"{self.name}.{key}", f"{expected} as {as_key}", value)

    def number(self, key: str) -> None:
        """A number."""
        value = self.values.get(key)
        if type(value) not in (int, float):
            self._refuse(f"{self.name}.{key}", "a number", value)

    def levels(self, key: str) -> int:
        """The length of a list of whole numbers."""
        value = self.values.get(key)
        if not isinstance(value, list) or not value or any(type(item) is not int or item < 1 for item in value):
            self._refuse(f"{self.name}.{key}", "a list of whole numbers of at least 1", value)
        return len(value)

    def class_(self, key: str, names: Sequence[str]) -> None:
        """The dotted name of one of several classes."""
        value = self.values.get(key)
        if not isinstance(value, str) or value.rpartition(".")[2] not in names:
            self._refuse(f"{self.name}.{key}", f"the class {' or '.join(names)}", value)


def _check_params(params: Settings) -> None:
    params.whole("image_size", SIDE)
    params.whole("channels", WIDTH)
    for key in ("linear_start", "linear_end", "cosine_s"):
        if params.values.get(key) is not None:
            params.number(key)
    if params.values.get("timesteps") is not None:
        params.whole("timesteps")
    parts = {key: params.section(key) for key in ("unet_config", "first_stage_config")}
    if params.values.get("cond_stage_config") != UNCONDITIONAL:
        if params.values.get("cond_stage_config") == IS_FIRST_STAGE:
            raise ValueError(f"{params.path}: conditioned on images, which the scripts cannot sample")
        parts["cond_stage_config"] = params.section("cond_stage_config")
    for key, part in parts.items():
        part.class_("target", PARTS[key])
    unet = parts["unet_config"].section("params")
    for key in ("in_channels", "out_channels"):
        unet.same(key, "model.params.channels", params.values["channels"])
    step = 2 ** (unet.levels("channel_mult") - 1)
    if params.values["image_size"] % step:
        params._refuse("model.params.image_size", f"a multiple of {step}", params.values["image_size"])
    if "ddconfig" in (parts["first_stage_config"].values.get("params") or {}):
        images = parts["first_stage_config"].section("params").section("ddconfig")
        images.levels("ch_mult")
        images.picture("out_ch")
    else:
        params.picture("channels")
    condition = parts.get("cond_stage_config")
    if condition is not None and "n_classes" in (condition.values.get("params") or {}):
        condition.section("params").whole("n_classes", CLASSES)

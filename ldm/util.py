"""Objects from configurations: {"target": dotted class name, "params": {...}}, the layout of CompVis YAML files."""

import importlib
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

# A configuration comes with a downloaded checkpoint; it must not be able to name anything that runs.
PACKAGES = ("ldm.", "ddim.", "taming.", "torch.nn.", "pytorch_lightning.")


def get_obj_from_str(target: str) -> type:
    """The class called `target`. Raises ValueError for one outside `PACKAGES`, or that does not exist."""
    if not isinstance(target, str) or not target.startswith(PACKAGES):
        known = ", ".join(package.rstrip(".") for package in PACKAGES)
        raise ValueError(f"target {target!r}: expected a class of one of the packages {known}")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"target {target!r}: no such class ({error})") from error
    if not isinstance(found, type):
        raise ValueError(f"target {target!r}: expected a class, found a {type(found).__name__}")
    return found


def instantiate_from_config(config: Mapping[str, Any], **extra: Any) -> Any:
    """The object that a configuration describes; `extra` is added to its parameters.

    Raises ValueError for a configuration without target, or as `get_obj_from_str`, or for parameters that the class
    does not take.
    """
    if OmegaConf.is_config(config):
        config = OmegaConf.to_container(config, resolve=True)
    if not isinstance(config, Mapping) or "target" not in config:
        raise ValueError(f"expected a configuration with a target, found {config!r:.80}")
    cls = get_obj_from_str(config["target"])
    try:
        return cls(**{**(config.get("params") or {}), **extra})
    except TypeError as error:  # a parameter that the constructor does not have
        raise ValueError(f"{config['target']}: {error}") from error

"""From a path that people have to the model it names, of whatever family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from qdiff.families.source import Source
from qdiff.utils.files import find_shipped

CONFIGURATIONS = (".yml", ".yaml")


def open_model(
    path: str | Path, config: str | Path | None = None, weights: str | Path | None = None, overrides: Sequence[str] = ()
) -> Source:
    """The model that a path names; its configuration is read and checked, its weights are not.

    path: a configuration (.yml, .yaml), a checkpoint of a latent model, or the folder it lies in. config: its
    configuration, by default the one beside it. weights: float weights in place of those that a configuration names.
    overrides: settings of a latent model's configuration in dot-list form. Raises FileNotFoundError, or ValueError
    naming the file and what is wrong with it.
    """
    path = Path(path)
    if path.suffix in CONFIGURATIONS and config is None:
        config, path = path, weights if weights is None else Path(weights)
        if not is_latent_config(config):
            return pixel_model(config, path)
        return latent_model(path, config, overrides)
    if weights is not None:
        raise ValueError(f"weights {weights}: go with a configuration, found {path}")
    return latent_model(path, config, overrides)


def pixel_model(config: str | Path, weights: Path | None = None, **options) -> Source:
    """A pixel model by its configuration; options as for `PixelSource`."""
    from qdiff.families.ddim.source import PixelSource, read_config

    return PixelSource(read_config(find_shipped(config)), weights, **options)


def latent_model(
    checkpoint: str | Path | None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    read: bool = True,
    **options,
) -> Source:
    """A latent model by its checkpoint or the folder it lies in, or by its configuration alone; options as for
    `LatentSource`. read: whether the checkpoint is to be read; else it need not be there, only its configuration."""
    from ldm.pretrained import find_checkpoint, find_config
    from qdiff.families.ldm.config import read_config
    from qdiff.families.ldm.source import LatentSource

    found = find_checkpoint(checkpoint) if read and checkpoint is not None else None
    path = find_shipped(config) if config else find_config(found or checkpoint)
    return LatentSource(read_config(path, overrides), found, **options)


def is_latent_config(path: str | Path) -> bool:
    """Whether a configuration is a latent model's; files that are none are left to the readers to complain about."""
    try:
        return "target" in yaml.safe_load(find_shipped(path).read_text(encoding="utf8"))["model"]
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, RecursionError):
        return False

"""What it takes to train a model of a configuration, and to write its weights as published files have them."""

from ddim.pretrained import load_weights
from ldm.export import TEXT, exported_config, exported_state, scale_factor_of, text_folder
from ldm.models.diffusion.models import LatentDiffusion
from ldm.pretrained import find_checkpoint, find_config, load_config, load_model, without_lightning
from ldm.seeds import derived_seed
from ldm.util import instantiate_from_config

__all__ = [
    "TEXT",
    "LatentDiffusion",
    "derived_seed",
    "exported_config",
    "exported_state",
    "find_checkpoint",
    "find_config",
    "instantiate_from_config",
    "load_config",
    "load_model",
    "load_weights",
    "scale_factor_of",
    "text_folder",
    "without_lightning",
]

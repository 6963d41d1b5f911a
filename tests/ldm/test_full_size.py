"""The published models at full size, on the meta device: every tensor's name and shape, no weights.

`published_names.json.gz` maps a network to {name: shape}. It was made from the networks of other libraries at the
published widths (diffusers 0.42: `UNet2DConditionModel`, `UNet2DModel`, `AutoencoderKL`, `VQModel`, `LDMBertModel`;
transformers 5.23: `CLIPTextModel`), their names translated into those of the CompVis checkpoints; diffusers' own
conversion of such checkpoints takes the listings of the U-Nets with transformers and of the KL first stage as they
stand. Nothing in it comes from this package, so a name or width that drifts here is seen here.
"""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from ldm.pretrained import build_network, load_config
from ldm.util import instantiate_from_config

REPOSITORY = Path(__file__).parents[2]
SD = "configs/stable-diffusion/v1-inference.yaml"
# Configuration -> U-Net, first stage and conditioning, as in the listings; the number is the classes'.
MODELS = {
    SD: ("sd_v1_unet", "kl_f8", "clip_vit_large_text"),
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml": ("text2img_large_unet", "kl_f8", "text2img_large_text"),
    "models/ldm/cin256-v2/config.yaml": ("cin256_v2_unet", "vq_f4", 1001),
    "models/ldm/cin256/config.yaml": ("cin256_unet", "vq_f8", 1000),
    "models/ldm/lsun_beds256/config.yaml": ("lsun_beds256_unet", "vq_f4", None),
    "models/ldm/celeba256/config.yaml": ("lsun_beds256_unet", "vq_f4", None),  # the same networks
    "models/ldm/ffhq256/config.yaml": ("lsun_beds256_unet", "vq_f4", None),
    "models/ldm/lsun_churches256/config.yaml": ("lsun_churches256_unet", "kl_f8", None),
}
WITH_EMA = ("lsun_beds256", "lsun_churches256", "celeba256", "ffhq256", "models/ldm/cin256/")
# Numbers that are published: SD v1's three parts, and what the original code prints for the text-to-image model.
COUNTS = {
    "sd_v1_unet": (686, 859_520_964),
    "kl_f8": (248, 83_653_863),
    "clip_vit_large_text": (196, 123_060_480),
    "text2img_large_unet": (686, 872_300_484),
}


@pytest.fixture(scope="module")
def published():
    path = REPOSITORY / "tests" / "fixtures" / "published_names.json.gz"
    listings = json.loads(gzip.decompress(path.read_bytes()))
    return {network: {name: tuple(shape) for name, shape in names.items()} for network, names in listings.items()}


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def conditioning_names(published, conditioning):
    if conditioning is None:
        return {}
    if isinstance(conditioning, int):
        return {"embedding.weight": (conditioning, 512)}
    return {f"transformer.{name}": shape for name, shape in published[conditioning].items()}


@pytest.mark.parametrize("config", MODELS)
def test_models_have_exactly_the_published_names_and_shapes(published, config):
    unet, first_stage, conditioning = MODELS[config]
    expected = {"scale_factor": ()}
    expected |= {f"model.diffusion_model.{name}": shape for name, shape in published[unet].items()}
    if any(name in config for name in WITH_EMA):
        averaged = {f"diffusion_model.{name}".replace(".", ""): shape for name, shape in published[unet].items()}
        expected |= {f"model_ema.{name}": shape for name, shape in averaged.items()}
        expected |= {"model_ema.decay": (), "model_ema.num_updates": ()}
    expected |= {f"first_stage_model.{name}": shape for name, shape in published[first_stage].items()}
    names = conditioning_names(published, conditioning)
    expected |= {f"cond_stage_model.{name}": shape for name, shape in names.items()}
    with torch.device("meta"):
        model = instantiate_from_config(load_config(REPOSITORY / config).model)
    assert shapes(model) == expected


@pytest.mark.parametrize("network", COUNTS)
def test_listings_have_the_published_counts(published, network):
    names = published[network]
    assert (len(names), sum(math.prod(shape) for shape in names.values())) == COUNTS[network]


def test_the_network_alone_is_the_models(published):
    with torch.device("meta"):
        network = build_network(load_config(REPOSITORY / SD))
    assert shapes(network) == published["sd_v1_unet"]
    assert sum(p.numel() for p in network.parameters()) == 859_520_964


@pytest.mark.parametrize("config", MODELS)
def test_latents_fit_the_first_stage(config):
    params = load_config(REPOSITORY / config).model.params
    unet, ddconfig = params.unet_config.params, params.first_stage_config.params.ddconfig
    latent = ddconfig.resolution // 2 ** (len(ddconfig.ch_mult) - 1)
    assert params.channels == unet.in_channels == unet.out_channels == ddconfig.z_channels
    assert params.image_size == unet.image_size == latent

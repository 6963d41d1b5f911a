"""Sizes in descriptions of first stages and text encoders have limits, which are checked before anything is built."""

import json

import pytest
import torch

from ldm.models.first_stages import AutoencoderKL, VQModel
from ldm.modules.encoders.modules import BERTEmbedder, ClassEmbedder, FrozenCLIPEmbedder

STAGE = {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3, "out_ch": 3}
STAGE |= {"resolution": 16, "z_channels": 4, "double_z": False}


def refused(make, name, value):
    """In one line that names the size, before its modules are made."""
    expected = rf"{name}: expected whole numbers up to \d+, found {value!r}"
    with torch.device("meta"), pytest.raises(ValueError, match=expected.replace("[", r"\[")):
        make()


@pytest.mark.parametrize(
    ("name", "value"),
    [("ch", 2**40), ("num_res_blocks", 10**9), ("resolution", 10**12), ("z_channels", -1), ("out_ch", 10**12)],
)
def test_first_stages(name, value):
    refused(lambda: VQModel(STAGE | {name: value}, 4, 16), name, value)
    refused(lambda: AutoencoderKL(STAGE | {"double_z": True, name: value}, 4), name, value)


def test_levels_of_first_stages():
    refused(lambda: VQModel(STAGE | {"ch_mult": [1] * 10**5}, 4, 16), "levels", 10**5)
    refused(lambda: VQModel(STAGE | {"ch_mult": [10**6]}, 4, 16), "ch_mult", 10**6)


def test_latents():
    refused(lambda: VQModel(STAGE, 10**18, 16), "embed_dim", 10**18)
    refused(lambda: VQModel(STAGE, 4, 10**18), "n_embed", 10**18)


@pytest.mark.parametrize("name", ["n_embed", "n_layer", "vocab_size", "max_seq_len"])
def test_text_encoders(name):
    sizes = {"n_embed": 32, "n_layer": 1, name: 10**9}
    refused(lambda: BERTEmbedder(**sizes, use_tokenizer=False), name, 10**9)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
def test_descriptions_in_a_text_encoders_folder(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_text_model", name: 10**9}))
    refused(lambda: FrozenCLIPEmbedder(str(tmp_path)), name, 10**9)


@pytest.mark.parametrize("name", ["embed_dim", "n_classes"])
def test_class_embeddings(name):
    refused(lambda: ClassEmbedder(**{"embed_dim": 8, name: 10**12}), name, 10**12)

"""The U-Net of latent diffusion models and Stable Diffusion v1: plain attention or spatial transformers."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from ddim.attention import DotProductAttention
from ldm.modules.attention import GEGLU, BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.blocks import AttentionBlock, ResBlock
from ldm.modules.diffusionmodules.chain import LatentState, Segment
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from qdiff.nn.family import roles_of
from qdiff.nn.feeds import NormFeed
from qdiff.recipes.layer_names import Roles

# Options that change how a network is trained, not what it computes.
WITHOUT_EFFECT = ("image_size", "dropout", "use_checkpoint", "use_fp16", "legacy", "dims", "n_embed")


class LatentAdapter:
    """See `qdiff.nn.family.Adapter`."""

    family, network_class = "ldm", UNetModel

    def build(self, config: dict[str, Any]) -> UNetModel:
        return UNetModel(**{"image_size": 0, **config}).eval()

    def config_of(self, network: UNetModel) -> dict[str, Any]:
        return {key: value for key, value in network.config.items() if key not in WITHOUT_EFFECT}

    def num_timesteps(self, network: UNetModel) -> int:
        return network.num_diffusion_timesteps

    def conditioning(self, network: UNetModel, context: Tensor | None) -> dict[str, Tensor]:
        return {} if context is None else {"context": context}

    def start(self, network: UNetModel, x: Tensor, t: Tensor, context: Tensor | None = None) -> LatentState:
        return network.start(x, t, **self.conditioning(network, context))

    def chain(self, network: UNetModel) -> list[Segment]:
        return network.chain()

    def split_boundaries(self, network: UNetModel) -> dict[str, int]:
        return {
            f"{name}.skip_connection": block.shortcut_boundary
            for name, block in network.named_modules()
            if isinstance(block, ResBlock)
            and block.shortcut_boundary is not None
            and isinstance(block.skip_connection, nn.Conv2d)
        }

    def attention_products(self, network: UNetModel) -> dict[str, nn.Module]:
        return {name: m for name, m in network.named_modules() if isinstance(m, DotProductAttention)}

    def middle_attention(self, network: UNetModel) -> str:
        transformer = isinstance(network.middle_block[1], SpatialTransformer)
        return "middle_block.1.proj_in" if transformer else "middle_block.1"

    def roles(self, network: UNetModel) -> Roles:
        blocks = [name for name, m in network.named_modules() if isinstance(m, ResBlock)]
        # Keys and values of the second attention see the conditioning, not features.
        of_features = re.compile(r"\.(qkv|to_q|attn1\.to_[kv])$")
        names = [name for name, _ in network.named_modules()]
        return roles_of(
            network,
            input=["input_blocks.0.0"],
            output=["out.2"],
            time=[f"{name}.emb_layers.1" for name in blocks],
            attention=[name for name in names if of_features.search(name)],
            feed_forward=[name for name in names if re.search(r"\.ff\.net\.(0\.proj|2)$", name)],
        )

    def norm_feeds(self, network: UNetModel) -> list[NormFeed]:
        feeds = [NormFeed("out.0", ("out.2",), silu=True, activation="out.1")]
        for name, block in network.named_modules():
            if isinstance(block, ResBlock):
                feeds += _block_feeds(name, block)
            elif isinstance(block, AttentionBlock):
                feeds.append(NormFeed(f"{name}.norm", (f"{name}.qkv",)))
            elif isinstance(block, SpatialTransformer):
                feeds.append(NormFeed(f"{name}.norm", (f"{name}.proj_in",)))
            elif isinstance(block, BasicTransformerBlock):
                first = "ff.net.0.proj" if isinstance(block.ff.net[0], GEGLU) else "ff.net.0.0"
                # The second attention's keys and values see the context, which networks with transformers always have.
                readers = {"norm1": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "norm2": ("attn2.to_q",)}
                readers["norm3"] = (first,)
                feeds += [
                    NormFeed(f"{name}.{norm}", tuple(f"{name}.{n}" for n in read)) for norm, read in readers.items()
                ]
        return feeds

    def published_name(self, quantizer: str) -> str:
        if ".transformer_blocks." in quantizer:
            return quantizer.replace(".attention.act_quantizer_", ".act_quantizer_")
        quantizer = re.sub(r"\.attention\.(act_quantizer_[qk])$", r".attention.qkv_matmul.\1", quantizer)
        return re.sub(r"\.attention\.(act_quantizer_[vw])$", r".attention.smv_matmul.\1", quantizer)

    def published_softmax_kind(self, network: UNetModel, act_kind: str) -> str:
        return "signed" if act_kind == "signed" and network.config["use_spatial_transformer"] else "unsigned"


def _block_feeds(name: str, block: ResBlock) -> list[NormFeed]:
    """Norms of a residual block; a resampling, or the embedding's scale and shift, may stand before the convolution."""
    feeds = []
    if isinstance(block.resample, nn.Identity):
        feeds.append(NormFeed(f"{name}.in_layers.0", (f"{name}.in_layers.2",), True, f"{name}.in_layers.1"))
    if not block.use_scale_shift_norm:
        feeds.append(NormFeed(f"{name}.out_layers.0", (f"{name}.out_layers.3",), True, f"{name}.out_layers.1"))
    return feeds

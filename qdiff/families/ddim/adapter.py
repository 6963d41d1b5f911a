"""The pixel U-Net of the DDPM family (CIFAR-10, LSUN)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ddim.attention import DotProductAttention
from ddim.chain import Segment, State
from ddim.layers import AttnBlock, ResnetBlock
from ddim.network import DDPMUNet
from qdiff.nn.family import roles_of
from qdiff.nn.feeds import NormFeed
from qdiff.recipes.layer_names import Roles


class DDIMAdapter:
    """See `qdiff.nn.family.Adapter`."""

    family, network_class = "ddim", DDPMUNet

    def build(self, config: dict[str, Any]) -> DDPMUNet:
        return DDPMUNet(**config).eval()

    def config_of(self, network: DDPMUNet) -> dict[str, Any]:
        return dict(network.config)

    def num_timesteps(self, network: DDPMUNet) -> int:
        return network.num_diffusion_timesteps

    def conditioning(self, network: DDPMUNet, context: Tensor | None) -> dict[str, Tensor]:
        if context is not None:
            raise ValueError("pixel models are unconditional, found conditioning")
        return {}

    def start(self, network: DDPMUNet, x: Tensor, t: Tensor, context: Tensor | None = None) -> State:
        return network.start(x, t, **self.conditioning(network, context))

    def chain(self, network: DDPMUNet) -> list[Segment]:
        return network.chain()

    def split_boundaries(self, network: DDPMUNet) -> dict[str, int]:
        found = {}
        for name, block in network.named_modules():
            if (
                isinstance(block, ResnetBlock)
                and block.shortcut_boundary is not None
                and hasattr(block, "nin_shortcut")
            ):
                found[f"{name}.nin_shortcut"] = block.shortcut_boundary
        return found

    def attention_products(self, network: DDPMUNet) -> dict[str, nn.Module]:
        return {name: m for name, m in network.named_modules() if isinstance(m, DotProductAttention)}

    def middle_attention(self, network: DDPMUNet) -> str:
        return "mid.attn_1"

    def roles(self, network: DDPMUNet) -> Roles:
        blocks = [name for name, m in network.named_modules() if isinstance(m, ResnetBlock)]
        attentions = [name for name, m in network.named_modules() if isinstance(m, AttnBlock)]
        return roles_of(
            network,
            input=["conv_in"],
            output=["conv_out"],
            time=[f"{name}.temb_proj" for name in blocks],
            attention=[f"{name}.{operand}" for name in attentions for operand in "qkv"],
            feed_forward=[],
        )

    def norm_feeds(self, network: DDPMUNet) -> list[NormFeed]:
        feeds = [NormFeed("norm_out", ("conv_out",), silu=True)]
        for name, block in network.named_modules():
            if isinstance(block, ResnetBlock):
                feeds += [NormFeed(f"{name}.norm{i}", (f"{name}.conv{i}",), silu=True) for i in (1, 2)]
            elif isinstance(block, AttnBlock):
                feeds.append(NormFeed(f"{name}.norm", tuple(f"{name}.{operand}" for operand in "qkv")))
        return feeds

    def published_name(self, quantizer: str) -> str:
        return quantizer.replace(".attention.act_quantizer_", ".act_quantizer_")

    def published_softmax_kind(self, network: DDPMUNet, act_kind: str) -> str:
        return act_kind  # like every other activation: see `symmetric_softmax` in qdiff.recipes.recipe.COMPAT

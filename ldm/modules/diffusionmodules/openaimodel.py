"""The U-Net of latent diffusion models (arXiv 2112.10752, Stable Diffusion v1), with the published parameter names."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddim import chain
from ddim.limits import BLOCKS, CLASSES, LEVELS, TIMESTEPS, WIDTH, check_limits
from ldm.modules.attention import SpatialTransformer, zeroed
from ldm.modules.diffusionmodules.blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    Upsample,
    group_norm,
    timestep_embedding,
)
from ldm.modules.diffusionmodules.chain import LatentState, Segment, and_keep

LIMITS = {
    **dict.fromkeys(("in_channels", "out_channels", "model_channels", "channel_mult", "context_dim"), WIDTH),
    "levels": LEVELS,
    "num_res_blocks": BLOCKS,
    "transformer_depth": BLOCKS,
    "num_classes": CLASSES,
    "num_diffusion_timesteps": TIMESTEPS,
}


class TimestepEmbedSequential(nn.Sequential):
    """Modules of one step of the path; the network's chain runs them, each with the arguments it needs."""


class UNetModel(nn.Module):
    """ε(x, t, context) of a latent diffusion model. Raises ValueError where the sizes do not fit together.

    `config` holds the constructor's arguments: `UNetModel(**network.config)` has the same structure.
    """

    def __init__(
        self,
        image_size: int,  # of the latents; the network runs at any size its levels divide
        in_channels: int,
        model_channels: int,  # width of the first level, a multiple of 32
        out_channels: int,
        num_res_blocks: int,  # per level on the way down; one more on the way up
        attention_resolutions: Sequence[int],  # downsampling factors with attention after each block
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),  # width of each level, in units of model_channels
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,  # labels are embedded and added to the time embedding
        use_checkpoint: bool = False,  # training recomputes activations instead of keeping them
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,  # channels of a head; one of these two is given
        num_heads_upsample: int = -1,  # heads of plain attention on the way up, where they differ
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,  # residual blocks change the resolution
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        n_embed: int | None = None,
        legacy: bool = True,  # in published configurations; both values make the same network
        num_diffusion_timesteps: int = 1000,
    ):
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        lists = {"attention_resolutions": list(attention_resolutions), "channel_mult": list(channel_mult)}
        self.config = arguments | lists | {"context_dim": _single(context_dim)}
        _check(self.config)
        self.in_channels, self.out_channels, self.model_channels = in_channels, out_channels, model_channels
        self.num_diffusion_timesteps, self.use_checkpoint = num_diffusion_timesteps, use_checkpoint
        self.widths = [model_channels * mult for mult in channel_mult]
        embedded = 4 * model_channels
        self.time_embed = nn.Sequential(nn.Linear(model_channels, embedded), nn.SiLU(), nn.Linear(embedded, embedded))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, embedded)
        self.input_blocks = nn.ModuleList(self._input_blocks())
        middle = self.widths[-1]
        self.middle_block = TimestepEmbedSequential(
            self._block(middle, middle), self._attention(middle, num_heads), self._block(middle, middle)
        )
        self.output_blocks = nn.ModuleList(self._output_blocks())
        last = zeroed(nn.Conv2d(model_channels, out_channels, 3, padding=1))
        self.out = nn.Sequential(group_norm(model_channels), nn.SiLU(), last)

    def start(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> LatentState:
        """The state before the first segment; arguments as for `forward`. Raises ValueError for other shapes."""
        if y is None and self.config["context_dim"] is None and self.config["num_classes"] is not None:
            y, context = context, None
        divisor = 2 ** (len(self.widths) - 1)
        if x.dim() != 4 or x.shape[1] != self.in_channels or x.shape[2] % divisor or x.shape[3] % divisor:
            wanted = f"[N, {self.in_channels}, H, W] with H and W divisible by {divisor}"
            raise ValueError(f"the network takes latents of shape {wanted}, found {list(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"the network takes one timestep per image, [{x.shape[0]}], found {list(t.shape)}")
        width = self.config["context_dim"]
        if width is not None and (context is None or context.dim() != 3 or context.shape[::2] != (len(x), width)):
            found = "none" if context is None else list(context.shape)
            raise ValueError(f"the network takes a context of shape [{len(x)}, L, {width}], found {found}")
        if (self.config["num_classes"] is None) != (y is None):
            raise ValueError("labels are needed by class-conditional networks, and by these alone")
        dtype = self.out[0].weight.dtype  # norms stay float whatever replaces the convolutions
        return LatentState(
            h=x.to(dtype),
            temb=timestep_embedding(t, self.model_channels, dtype),
            context=None if context is None else context.to(dtype),
            label_emb=None if y is None else self.label_emb(y),
        )

    def chain(self) -> list[Segment]:
        """The modules in the order in which they run; modules are looked up at each call."""
        embed = self.time_embed
        return [
            Segment("time_embed.0", embed[0], lambda state: (state.temb,), chain.write_temb),
            Segment("time_embed.2", embed[2], lambda state: (embed[1](state.temb),), _write_embedding),
            *self._input_segments(),
            *self._segments("middle_block", self.middle_block),
            *self._output_segments(),
            Segment("out.2", self.out[2], self._read_out, chain.write_features),
        ]

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Predicted noise, [N, out_channels, H, W].

        x: [N, in_channels, H, W]; t: [N]; context: [N, L, context_dim] with spatial transformers; y: [N] labels of a
        class-conditional network, which may stand in the place of the context where there are no transformers.
        """
        state = self.start(x, t, context, y)
        recompute = self.use_checkpoint and self.training and torch.is_grad_enabled()
        for segment in self.chain():
            if recompute:
                output = checkpoint(segment.module, *segment.read(state), use_reentrant=False)
                state = segment.write(state, output)
            else:
                state = segment(state)
        return state.h

    def _input_segments(self) -> Iterator[Segment]:
        for i, block in enumerate(self.input_blocks):
            *first, last = self._segments(f"input_blocks.{i}", block)
            yield from first
            yield Segment(last.name, last.module, last.read, and_keep(last.write))

    def _output_segments(self) -> Iterator[Segment]:
        for i, block in enumerate(self.output_blocks):
            joins, *rest = self._segments(f"output_blocks.{i}", block)
            yield Segment(joins.name, joins.module, chain.read_joined_and_temb, chain.write_features_and_drop)
            yield from rest

    def _segments(self, name: str, block: TimestepEmbedSequential) -> Iterator[Segment]:
        for i, module in enumerate(block):
            if isinstance(module, SpatialTransformer):
                yield from module.segments(f"{name}.{i}")
            else:
                read = chain.read_features_and_temb if isinstance(module, ResBlock) else chain.read_features
                yield Segment(f"{name}.{i}", module, read, chain.write_features)

    def _read_out(self, state: LatentState) -> tuple[Tensor, ...]:
        norm, activation, _ = self.out
        return (activation(norm(state.h)),)

    def _block(self, channels: int, out_channels: int, skip: int = 0, up: bool = False, down: bool = False) -> ResBlock:
        config = self.config
        scale_shift = config["use_scale_shift_norm"]
        embedded = 4 * self.model_channels
        return ResBlock(channels, embedded, config["dropout"], out_channels, skip, scale_shift, up, down)

    def _attention(self, channels: int, num_heads: int) -> nn.Module:
        config, size = self.config, self.config["num_head_channels"]
        heads = num_heads if size == -1 else channels // size
        if heads < 1 or channels % heads:
            name = "num_heads" if size == -1 else "num_head_channels"
            raise ValueError(f"{name}: {channels} channels do not divide into {heads} heads")
        if not config["use_spatial_transformer"]:
            return AttentionBlock(channels, heads, config["use_new_attention_order"])
        depth, width = config["transformer_depth"], config["context_dim"]
        return SpatialTransformer(channels, heads, channels // heads, depth, context_dim=width)

    def _input_blocks(self) -> Iterator[nn.Module]:
        config, ch, factor = self.config, self.model_channels, 1
        yield TimestepEmbedSequential(nn.Conv2d(self.in_channels, ch, 3, padding=1))
        for level, width in enumerate(self.widths):
            for _ in range(config["num_res_blocks"]):
                layers: list[nn.Module] = [self._block(ch, width)]
                ch = width
                if factor in config["attention_resolutions"]:
                    layers.append(self._attention(ch, config["num_heads"]))
                yield TimestepEmbedSequential(*layers)
            if level < len(self.widths) - 1:
                factor *= 2
                resample = self._block(ch, ch, down=True) if config["resblock_updown"] else None
                yield TimestepEmbedSequential(resample or Downsample(ch, config["conv_resample"]))

    def _output_blocks(self) -> Iterator[nn.Module]:
        config, skips, ch = self.config, self._skip_widths(), self.widths[-1]
        upsample = -1 if config["use_spatial_transformer"] else config["num_heads_upsample"]
        heads = config["num_heads"] if upsample == -1 else upsample
        for level in reversed(range(len(self.widths))):
            for i in range(config["num_res_blocks"] + 1):
                layers: list[nn.Module] = [self._block(ch, self.widths[level], skips.pop())]
                ch = self.widths[level]
                if 2**level in config["attention_resolutions"]:
                    layers.append(self._attention(ch, heads))
                if level and i == config["num_res_blocks"]:
                    resample = self._block(ch, ch, up=True) if config["resblock_updown"] else None
                    layers.append(resample or Upsample(ch, config["conv_resample"]))
                yield TimestepEmbedSequential(*layers)

    def _skip_widths(self) -> list[int]:
        """Channels of what each step of the way down keeps for the way up, oldest first."""
        found = [self.model_channels]
        for level, width in enumerate(self.widths):
            found += [width] * self.config["num_res_blocks"]
            if level < len(self.widths) - 1:
                found.append(width)
        return found


def _write_embedding(state: LatentState, temb: Tensor) -> LatentState:
    return chain.write_temb(state, temb if state.label_emb is None else temb + state.label_emb)


def _single(context_dim: int | Sequence[int] | None) -> int | None:
    """Some configurations give the width of the context as a list of one."""
    return context_dim if context_dim is None or isinstance(context_dim, int) else list(context_dim)[0]


def _check(config: dict) -> None:
    """Raise ValueError for sizes that make no network, and for options that this network does not have."""
    check_limits(config | {"levels": len(config["channel_mult"])}, LIMITS)
    widths = {"model_channels * channel_mult": [config["model_channels"] * mult for mult in config["channel_mult"]]}
    check_limits(widths, dict.fromkeys(widths, WIDTH))
    if config["model_channels"] < 1 or config["model_channels"] % 32:
        found = config["model_channels"]
        raise ValueError(f"model_channels must be a positive multiple of 32 (group norm has 32 groups), found {found}")
    if not config["channel_mult"]:
        raise ValueError("channel_mult must name at least one level, found none")
    if config["dims"] != 2:
        raise ValueError(f"dims must be 2, found {config['dims']}")
    if config["n_embed"] is not None:
        raise ValueError("n_embed (prediction of codebook indices) is not supported")
    if config["num_heads"] == -1 and config["num_head_channels"] == -1:
        raise ValueError("num_heads or num_head_channels must be given, found neither")
    if config["use_spatial_transformer"] != (config["context_dim"] is not None):
        raise ValueError("use_spatial_transformer and context_dim belong together, found one without the other")

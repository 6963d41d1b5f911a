"""The DDPM U-Net (arXiv 2006.11239, appendix B) with the parameter names of the published checkpoints."""

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ddim import chain
from ddim.chain import Segment, State
from ddim.layers import AttnBlock, Downsample, ResnetBlock, Upsample, group_norm_silu, timestep_embedding
from ddim.limits import BLOCKS, LEVELS, SIDE, TIMESTEPS, WIDTH, check_limits

LIMITS = {
    **dict.fromkeys(("in_channels", "out_ch", "ch", "ch_mult"), WIDTH),
    "levels": LEVELS,
    "num_res_blocks": BLOCKS,
    "image_size": SIDE,
    "num_diffusion_timesteps": TIMESTEPS,
}


class Level(nn.Module):
    """One resolution of the down or up path. `attn` has as many entries as `block`, or none."""

    def __init__(self, blocks: list[ResnetBlock], attn: list[AttnBlock]):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attn)


class DDPMUNet(nn.Module):
    """ε(x, t) of a DDPM. Raises ValueError where the sizes do not fit together.

    `config` holds the constructor's arguments: `DDPMUNet(**network.config)` has the same structure.
    """

    def __init__(
        self,
        *,
        in_channels: int,  # of the image
        out_ch: int,  # of the prediction
        ch: int,  # width of the first level, a multiple of 32
        ch_mult: Sequence[int],  # width of each level, in units of ch
        num_res_blocks: int,  # per level on the way down; one more on the way up
        attn_resolutions: Sequence[int],  # feature-map sizes with attention after each block
        image_size: int,
        resamp_with_conv: bool = True,
        dropout: float = 0.0,
        conv_shortcut: bool = False,  # 3×3 shortcuts instead of 1×1
        num_diffusion_timesteps: int = 1000,
    ):
        super().__init__()
        self.config = {
            "in_channels": in_channels,
            "out_ch": out_ch,
            "ch": ch,
            "ch_mult": list(ch_mult),
            "num_res_blocks": num_res_blocks,
            "attn_resolutions": list(attn_resolutions),
            "image_size": image_size,
            "resamp_with_conv": resamp_with_conv,
            "dropout": dropout,
            "conv_shortcut": conv_shortcut,
            "num_diffusion_timesteps": num_diffusion_timesteps,
        }
        _check_sizes(self.config)
        self.num_diffusion_timesteps = num_diffusion_timesteps
        self.image_size = image_size
        self.widths = [ch * m for m in ch_mult]
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList(self._down_level(i) for i in range(len(self.widths)))
        self.mid = nn.Module()
        self.mid.block_1 = self._block(self.widths[-1], self.widths[-1])
        self.mid.attn_1 = AttnBlock(self.widths[-1])
        self.mid.block_2 = self._block(self.widths[-1], self.widths[-1])
        self.up = nn.ModuleList(self._up_level(i) for i in range(len(self.widths)))
        self.norm_out = group_norm_silu(self.widths[0])
        self.conv_out = nn.Conv2d(self.widths[0], out_ch, 3, padding=1)

    def start(self, x: Tensor, t: Tensor) -> State:
        """The state before the first segment. x: [N, in_channels, image_size, image_size]; t: [N], int or float.

        Raises ValueError for other shapes.
        """
        expected = [self.config["in_channels"], self.image_size, self.image_size]
        if x.dim() != 4 or list(x.shape[1:]) != expected:
            raise ValueError(f"the network takes a batch of images of shape {expected}, found {list(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"the network takes one timestep per image, [{x.shape[0]}], found {list(t.shape)}")
        dtype = self.norm_out.weight.dtype  # norms stay float whatever replaces the convolutions
        return State(x.to(dtype), timestep_embedding(t, self.config["ch"], dtype))

    def chain(self) -> list[Segment]:
        """The modules in the order in which they run; modules are looked up at each call."""
        dense = self.temb.dense
        return [
            Segment("temb.dense.0", dense[0], lambda state: (state.temb,), chain.write_temb),
            Segment("temb.dense.1", dense[1], lambda state: (F.silu(state.temb),), chain.write_temb),
            Segment("conv_in", self.conv_in, chain.read_features, chain.write_features_and_keep),
            *self._down_segments(),
            *self._mid_segments(),
            *self._up_segments(),
            Segment("conv_out", self.conv_out, self._read_out, chain.write_features),
        ]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise. x: [N, in_channels, H, W]; t: [N]. Returns [N, out_ch, H, W]."""
        state = self.start(x, t)
        for segment in self.chain():
            state = segment(state)
        return state.h

    def _down_segments(self) -> Iterator[Segment]:
        for i, level in enumerate(self.down):
            # What the up path joins is the features after the attention, where there is one.
            after_block = chain.write_features if len(level.attn) else chain.write_features_and_keep
            for j, block in enumerate(level.block):
                yield Segment(f"down.{i}.block.{j}", block, chain.read_features_and_temb, after_block)
                if len(level.attn):
                    name = f"down.{i}.attn.{j}"
                    yield Segment(name, level.attn[j], chain.read_features, chain.write_features_and_keep)
            if i < len(self.down) - 1:
                name = f"down.{i}.downsample"
                yield Segment(name, level.downsample, chain.read_features, chain.write_features_and_keep)

    def _mid_segments(self) -> Iterator[Segment]:
        mid = self.mid
        yield Segment("mid.block_1", mid.block_1, chain.read_features_and_temb, chain.write_features)
        yield Segment("mid.attn_1", mid.attn_1, chain.read_features, chain.write_features)
        yield Segment("mid.block_2", mid.block_2, chain.read_features_and_temb, chain.write_features)

    def _up_segments(self) -> Iterator[Segment]:
        for i in reversed(range(len(self.up))):
            level = self.up[i]
            for j, block in enumerate(level.block):
                name = f"up.{i}.block.{j}"
                yield Segment(name, block, chain.read_joined_and_temb, chain.write_features_and_drop)
                if len(level.attn):
                    yield Segment(f"up.{i}.attn.{j}", level.attn[j], chain.read_features, chain.write_features)
            if i > 0:
                yield Segment(f"up.{i}.upsample", level.upsample, chain.read_features, chain.write_features)

    def _read_out(self, state: State) -> tuple[Tensor, ...]:
        return (self.norm_out(state.h),)

    def _block(self, in_channels: int, out_channels: int, skip_channels: int = 0) -> ResnetBlock:
        config = self.config
        return ResnetBlock(
            in_channels, out_channels, 4 * config["ch"], config["dropout"], config["conv_shortcut"], skip_channels
        )

    def _attention(self, i: int, count: int) -> list[AttnBlock]:
        has_attention = self.image_size // 2**i in self.config["attn_resolutions"]
        return [AttnBlock(self.widths[i]) for _ in range(count)] if has_attention else []

    def _down_level(self, i: int) -> Level:
        width, count = self.widths[i], self.config["num_res_blocks"]
        inputs = [self._width_above(i)] + [width] * (count - 1)
        level = Level([self._block(n, width) for n in inputs], self._attention(i, count))
        if i < len(self.widths) - 1:
            level.downsample = Downsample(width, self.config["resamp_with_conv"])
        return level

    def _up_level(self, i: int) -> Level:
        width, count = self.widths[i], self.config["num_res_blocks"] + 1
        below = self.widths[min(i + 1, len(self.widths) - 1)]
        features = [below] + [width] * (count - 1)
        # The last block of a level joins what entered the level on the way down.
        skips = [width] * (count - 1) + [self._width_above(i)]
        blocks = [self._block(n, width, skip) for n, skip in zip(features, skips, strict=True)]
        level = Level(blocks, self._attention(i, count))
        if i > 0:
            level.upsample = Upsample(width, self.config["resamp_with_conv"])
        return level

    def _width_above(self, i: int) -> int:
        """Channels entering level i on the way down."""
        return self.widths[i - 1] if i > 0 else self.config["ch"]


def _check_sizes(config: dict) -> None:
    ch, levels, image_size = config["ch"], len(config["ch_mult"]), config["image_size"]
    check_limits(config | {"levels": levels}, LIMITS)
    widths = {"ch * ch_mult": [ch * mult for mult in config["ch_mult"]]}
    check_limits(widths, dict.fromkeys(widths, WIDTH))
    if ch < 1 or ch % 32:
        raise ValueError(f"ch must be a positive multiple of 32 (group norm has 32 groups), found {ch}")
    if levels < 1:
        raise ValueError("ch_mult must name at least one level, found none")
    if image_size < 1 or image_size % 2 ** (levels - 1):
        raise ValueError(f"image_size must be divisible by {2 ** (levels - 1)} for {levels} levels, found {image_size}")

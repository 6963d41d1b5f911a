"""Encoder and decoder of the first stages (arXiv 2012.09841; 2112.10752, appendix G), under the published names."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddim.layers import NORM_GROUPS, AttnBlock, Downsample, ResnetBlock, Upsample, group_norm_silu
from ddim.limits import BLOCKS, LEVELS, SIDE, WIDTH, check_limits
from ddim.network import Level

LIMITS = {
    **dict.fromkeys(("ch", "ch_mult", "in_channels", "z_channels", "out_ch"), WIDTH),
    "levels": LEVELS,
    "num_res_blocks": BLOCKS,
    "resolution": SIDE,
}
ATTENTION_TYPES = ("vanilla", "vanilla-xformers", "none")  # xformers names a faster kernel for the same arithmetic


class Middle(nn.Module):
    """Two residual blocks with attention between them, which only `attn_type: none` leaves out."""

    def __init__(self, width: int, dropout: float, with_attention: bool):
        super().__init__()
        self.block_1 = ResnetBlock(width, width, None, dropout, conv_shortcut=False)
        self.attn_1 = AttnBlock(width) if with_attention else nn.Identity()
        self.block_2 = ResnetBlock(width, width, None, dropout, conv_shortcut=False)

    def forward(self, h: Tensor) -> Tensor:
        """h: [N, width, H, W]. Returns the same shape."""
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Image to latents, 2^(levels - 1) times smaller. Arguments are a published `ddconfig`; others in it are ignored.

    Raises ValueError for widths that group norm cannot take and for unknown attention.
    """

    def __init__(
        self,
        *,
        ch: int,  # width of the first level, a multiple of 32
        ch_mult: Sequence[int] = (1, 2, 4, 8),  # width of each level, in units of ch
        num_res_blocks: int,  # per level; one more in the decoder
        attn_resolutions: Sequence[int],  # feature-map sizes with attention after each block, at `resolution`
        in_channels: int,  # of the image
        resolution: int,  # of the images trained on; others work, and keep the attention where it is
        z_channels: int,  # of the latents
        double_z: bool = True,  # mean and log-variance instead of one value
        out_ch: int | None = None,  # of the decoded image, the decoder's matter
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        **ignored,
    ):
        super().__init__()
        sizes = {"num_res_blocks": num_res_blocks, "resolution": resolution, "z_channels": z_channels}
        _check(ch, ch_mult, attn_type, use_linear_attn, in_channels=in_channels, out_ch=out_ch, **sizes)
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            attends = attn_type != "none" and resolution // 2**i in attn_resolutions
            level = _level(widths[i - 1] if i else ch, width, num_res_blocks, attends, dropout)
            if i < len(widths) - 1:
                level.downsample = Downsample(width, resamp_with_conv)
            self.down.append(level)
        self.mid = Middle(widths[-1], dropout, attn_type != "none")
        self.norm_out = group_norm_silu(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: image [N, in_channels, H, W]. Returns [N, z_channels or 2·z_channels, H/2^(levels-1), W/2^(levels-1)]."""
        h = self.conv_in(x)
        for i, level in enumerate(self.down):
            h = _run(level, h)
            if i < len(self.down) - 1:
                h = level.downsample(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class Decoder(nn.Module):
    """Latents to image, 2^(levels - 1) times larger. Takes the same `ddconfig` as the encoder, and raises the same."""

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,  # of the image
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,  # per level on the way down: here one more
        attn_resolutions: Sequence[int],
        resolution: int,
        z_channels: int,
        in_channels: int | None = None,  # of the encoded image, the encoder's matter
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        give_pre_end: bool = False,  # return the features in front of the output norm
        tanh_out: bool = False,  # squash the image into [-1, 1]
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        **ignored,
    ):
        super().__init__()
        sizes = {"num_res_blocks": num_res_blocks, "resolution": resolution, "z_channels": z_channels}
        _check(ch, ch_mult, attn_type, use_linear_attn, in_channels=in_channels, out_ch=out_ch, **sizes)
        self.give_pre_end = give_pre_end
        self.tanh_out = tanh_out
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], dropout, attn_type != "none")
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            attends = attn_type != "none" and resolution // 2**i in attn_resolutions
            below = widths[min(i + 1, len(widths) - 1)]
            level = _level(below, width, num_res_blocks + 1, attends, dropout)
            if i > 0:
                level.upsample = Upsample(width, resamp_with_conv)
            self.up.append(level)
        self.norm_out = group_norm_silu(widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z: [N, z_channels, h, w]. Returns the image [N, out_ch, h·2^(levels-1), w·2^(levels-1)]."""
        h = self.mid(self.conv_in(z))
        for i in reversed(range(len(self.up))):
            h = _run(self.up[i], h)
            if i > 0:
                h = self.up[i].upsample(h)
        if self.give_pre_end:
            return h
        image = self.conv_out(self.norm_out(h))
        return torch.tanh(image) if self.tanh_out else image


def _level(in_channels: int, width: int, count: int, attends: bool, dropout: float) -> Level:
    inputs = [in_channels] + [width] * (count - 1)
    blocks = [ResnetBlock(n, width, None, dropout, conv_shortcut=False) for n in inputs]
    return Level(blocks, [AttnBlock(width) for _ in range(count)] if attends else [])


def _run(level: Level, h: Tensor) -> Tensor:
    for j, block in enumerate(level.block):
        h = block(h)
        if len(level.attn):
            h = level.attn[j](h)
    return h


def _check(ch: int, ch_mult: Sequence[int], attn_type: str, use_linear_attn: bool, **sizes: int | None) -> None:
    check_limits({"ch": ch, "ch_mult": list(ch_mult), "levels": len(ch_mult)} | sizes, LIMITS)
    check_limits({"ch * ch_mult": [ch * mult for mult in ch_mult]}, {"ch * ch_mult": WIDTH})
    if not ch_mult:
        raise ValueError("ch_mult must name at least one level, found none")
    wrong = [width for width in (ch, *(ch * m for m in ch_mult)) if width < 1 or width % NORM_GROUPS]
    if wrong:
        raise ValueError(f"ch times ch_mult must be positive multiples of {NORM_GROUPS} (group norm), found {wrong[0]}")
    if use_linear_attn or attn_type not in ATTENTION_TYPES:
        found = "linear" if use_linear_attn else attn_type
        raise ValueError(f"attn_type: expected one of {', '.join(ATTENTION_TYPES)}, found {found}")

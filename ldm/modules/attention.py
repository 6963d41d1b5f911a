"""Transformer blocks of latent U-Nets (arXiv 2112.10752 §3.3, appendix E.2.1) under the published parameter names."""

import torch.nn.functional as F
from torch import Tensor, nn

from ddim import chain
from ddim.attention import DotProductAttention
from ldm.modules.diffusionmodules.chain import (
    LatentState,
    Segment,
    read_features_and_context,
    write_and_keep_entry,
    write_joined_entry,
)

NORM_GROUPS, NORM_EPS = 32, 1e-6
EXPANSION = 4  # width of the feed-forward layer, in units of the tokens' width


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all parameters 0, so that a residual branch starts as nothing (arXiv 2105.05233)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class GEGLU(nn.Module):
    """Gated linear unit with GELU (arXiv 2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim_in]. Returns [..., dim_out]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers with a gated (or plain) GELU between them."""

    def __init__(self, dim: int, glu: bool = True, dropout: float = 0.0):
        super().__init__()
        inner = EXPANSION * dim
        first = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(dropout), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim]. Returns the same shape."""
        return self.net(x)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a context, or to themselves; scores are scaled by dim_head^-1/2."""

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ):
        super().__init__()
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(context_dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(context_dim, heads * dim_head, bias=False)
        self.attention = DotProductAttention(score_scale=dim_head**-0.5)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: [N, L, query_dim]; context: [N, S, context_dim]. Returns [N, L, query_dim]."""
        context = x if context is None else context
        q, k, v = self._split(self.to_q(x)), self._split(self.to_k(context)), self._split(self.to_v(context))
        return self.to_out(self.attention(q, k, v).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """[N, L, heads·d] -> [N, heads, L, d]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross attention and a feed-forward layer, each after a layer norm and around a residual."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
    ):
        super().__init__()
        self.attn1 = CrossAttention(dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, gated_ff, dropout)
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: [N, L, dim]; context: [N, S, context_dim], the tokens themselves without one. Returns x's shape."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, around a residual connection."""

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
    ):
        super().__init__()
        inner = n_heads * d_head
        self.norm = nn.GroupNorm(NORM_GROUPS, in_channels, eps=NORM_EPS)
        self.proj_in = nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, n_heads, d_head, dropout, context_dim) for _ in range(depth)
        )
        self.proj_out = zeroed(nn.Conv2d(inner, in_channels, 1))

    def segments(self, name: str) -> list[Segment]:
        """The modules in the order in which they run; `name` is this module's dotted name."""
        blocks = [
            Segment(f"{name}.transformer_blocks.{i}", block, read_features_and_context, chain.write_features)
            for i, block in enumerate(self.transformer_blocks)
        ]
        return [
            Segment(f"{name}.proj_in", self.proj_in, self._read_entry, _write_tokens),
            *blocks,
            Segment(f"{name}.proj_out", self.proj_out, _read_map, write_joined_entry),
        ]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; context: [N, S, context_dim]. Returns x's shape."""
        state = LatentState(h=x, temb=x, context=context)
        for segment in self.segments(""):
            state = segment(state)
        return state.h

    def _read_entry(self, state: LatentState) -> tuple[Tensor, ...]:
        return (self.norm(state.h),)


def _write_tokens(state: LatentState, h: Tensor) -> LatentState:
    return write_and_keep_entry(state, h.flatten(2).transpose(1, 2))


def _read_map(state: LatentState) -> tuple[Tensor, ...]:
    return (state.h.transpose(1, 2).unflatten(2, state.entry.shape[2:]),)

"""The transformer encoder over tokens that LDM's text-to-image models condition on, with the published names."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.limits import BLOCKS, CLASSES, POSITIONS, WIDTH, check_limits

HEADS, HEAD_WIDTH = 8, 64  # whatever the model's width


class PositionalEmbedding(nn.Module):
    """A learned vector for each position, [max_seq_len, D]."""

    def __init__(self, max_seq_len: int, dim: int):
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, length: int) -> Tensor:
        return self.emb.weight[:length]


class SelfAttention(nn.Module):
    """Attention of every token to every token, padding included, as the published models were trained."""

    def __init__(self, dim: int):
        super().__init__()
        width = HEADS * HEAD_WIDTH
        self.to_q = nn.Linear(dim, width, bias=False)
        self.to_k = nn.Linear(dim, width, bias=False)
        self.to_v = nn.Linear(dim, width, bias=False)
        self.to_out = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2) for layer in self._projections())
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _projections(self) -> tuple[nn.Linear, ...]:
        return self.to_q, self.to_k, self.to_v


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between them, with GELU."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU()),
            nn.Identity(),  # the published networks have a dropout of rate 0 here, which numbers the next layer
            nn.Linear(4 * dim, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class AttentionLayers(nn.Module):
    """`depth` times attention and feed-forward, each with a layer norm in front and a residual connection."""

    def __init__(self, dim: int, depth: int):
        super().__init__()
        branches = [branch for _ in range(depth) for branch in (SelfAttention(dim), FeedForward(dim))]
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(dim), branch]) for branch in branches)

    def forward(self, x: Tensor) -> Tensor:
        for norm, branch in self.layers:
            x = x + branch(norm(x))
        return x


class TokenTransformer(nn.Module):
    """Tokens [N, L] -> embeddings [N, L, dim]. `to_logits`, the head of its training, is only kept for the files."""

    def __init__(self, num_tokens: int, max_seq_len: int, dim: int, depth: int, dropout: float = 0.0):
        super().__init__()
        sizes = {"vocab_size": num_tokens, "max_seq_len": max_seq_len, "n_embed": dim, "n_layer": depth}
        check_limits(sizes, {"vocab_size": CLASSES, "max_seq_len": POSITIONS, "n_embed": WIDTH, "n_layer": BLOCKS})
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = PositionalEmbedding(max_seq_len, dim)
        self.dropout = nn.Dropout(dropout)
        self.attn_layers = AttentionLayers(dim, depth)
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)
        nn.init.normal_(self.token_emb.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.token_emb(tokens) + self.pos_emb(tokens.shape[1]))
        return self.norm(self.attn_layers(x))


def check_tokens(tokens: Tensor, vocabulary: int, length: int) -> None:
    """Raises ValueError unless `tokens` are at most `length` whole numbers per prompt, each below `vocabulary`."""
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens: expected whole numbers [N, L], found {tokens.dtype} {list(tokens.shape)}")
    if tokens.shape[1] > length:
        raise ValueError(f"tokens: expected at most {length} per prompt, found {tokens.shape[1]}")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        found = f"{int(tokens.min())} … {int(tokens.max())}"
        raise ValueError(f"tokens: the network knows 0 … {vocabulary - 1}, the tokenizer gave {found}")

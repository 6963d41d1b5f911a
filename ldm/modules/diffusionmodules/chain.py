"""What flows through a latent U-Net; segments and the common readers and writers are those of `ddim.chain`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ddim import chain
from ddim.chain import Segment

__all__ = ["LatentState", "Segment", "read_features_and_context", "write_and_keep_entry", "write_joined_entry"]


@dataclass(frozen=True)
class LatentState(chain.State):
    """A `State` with conditioning. Inside a spatial transformer h is [N, H·W, C], tokens row by row."""

    context: Tensor | None = None  # what cross attention sees, [N, L, D]
    label_emb: Tensor | None = None  # class embedding [N, E], added to the time embedding
    entry: Tensor | None = None  # features [N, C, H, W] that entered the spatial transformer the state stands in


def read_features_and_context(state: LatentState) -> tuple[Tensor, ...]:
    return (state.h,) if state.context is None else (state.h, state.context)


def write_and_keep_entry(state: LatentState, h: Tensor) -> LatentState:
    """Into a spatial transformer: what entered is kept for its residual connection."""
    return replace(state, h=h, entry=state.h)


def write_joined_entry(state: LatentState, h: Tensor) -> LatentState:
    """Out of a spatial transformer, whose output is added to what entered it."""
    return replace(state, h=h + state.entry, entry=None)


def and_keep(write: Callable[[LatentState, Tensor], LatentState]) -> Callable[[LatentState, Tensor], LatentState]:
    """`write`, after which the features are also kept as a skip for the up path."""

    def kept(state: LatentState, h: Tensor) -> LatentState:
        after = write(state, h)
        return replace(after, skips=(*after.skips, after.h))

    return kept

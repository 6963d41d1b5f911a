"""EDA-DM's choice of calibration steps: how many states each step gives, from the network's deepest features.

A step is worth the more states the more steps have features like its own (density), and the more its features differ
from all others' (variety). Source: EDA-DM (TDAC), restated from its description; see `qdiff.recipes.recipe.Selector`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

import torch
from torch import Tensor, nn

from qdiff.nn.family import Adapter

SAME = 1e-12  # values are equal if they differ by no more than this share of the largest: rounding, not a difference


@torch.no_grad()
def middle_map(network: nn.Module, adapter: Adapter, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
    """The features [N, C, H', W'] that enter the network's middle attention, for inputs x [N, C, H, W] at timesteps
    t [N] with conditioning [N, ...]. Nothing behind them is run."""
    name = adapter.middle_attention(network)
    state = adapter.start(network, x, t, context)
    for segment in takewhile(lambda segment: segment.name != name, adapter.chain(network)):
        state = segment.write(state, segment.module(*segment.read(state)))
    return state.h


def dissimilarities(maps: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """How much the features of every two steps differ.

    maps: of each sample the features [S, C, H, W] at S steps. Returns two symmetric float64 matrices [S, S]: the mean
    of (F_i - F_j)^2 over samples, channels and positions, and the sum of 1 - cos(F_i, F_j) over samples and positions,
    the cosine being that of the two channel vectors (0 where one of them vanishes). Holds one sample's features at a
    time. Raises ValueError for features that are not finite.
    """
    squares: Tensor | float = 0.0
    angles: Tensor | float = 0.0
    elements = 0
    for features in maps:
        features = features.double()
        squares = squares + _squared_distances(features)
        length = features.norm(dim=1, keepdim=True)
        # For unit vectors 1 - cos is half the squared distance; one that vanishes lacks 1/2 to any other.
        units = torch.where(length > 0, features / length, 0.0)
        lacking = (length == 0).flatten(1).sum(1) / 2
        angles = angles + _squared_distances(units) / 2 + lacking[:, None] + lacking
        elements += features[0].numel()
    distances = squares / elements
    if not (distances.isfinite().all() and angles.isfinite().all()):
        raise ValueError("density_variety: expected finite features, found infinite or undefined values")
    return distances, angles


def _squared_distances(rows: Tensor) -> Tensor:
    """rows: [S, ...]. Returns [S, S], |row_i - row_j|^2, by their Gram matrix."""
    # Distances do not depend on the origin. Taken from the first row, equal rows are at 0 exactly, and little cancels.
    rows = (rows - rows[:1]).flatten(1)
    gram = rows @ rows.T
    squares = gram.diagonal()
    found = (squares[:, None] + squares - gram - gram.T).clamp(min=0)  # symmetric to the last bit
    return found.fill_diagonal_(0)


def density(distances: Tensor, radius: float | None = None) -> Tensor:
    """D [S]: how many other steps lie within `radius` of each. distances: [S, S], `dissimilarities`' first.

    radius None: the median over all pairs of steps. The published radii are for one network and number of samples
    each, as distances grow with the square of the features.
    """
    first, second = torch.triu_indices(*distances.shape, offset=1, device=distances.device)
    pairs = distances[first, second]
    if radius is None:
        radius = pairs.median().item() if len(pairs) else 0.0
    near = (distances <= radius).double()
    return near.sum(1) - near.diagonal()


def variety(angles: Tensor) -> Tensor:
    """V [S]: how much each step's features differ from all others' in direction. angles: `dissimilarities`' second."""
    return angles.sum(1) - angles.diagonal()


def normalised(values: Tensor) -> Tensor:
    """values: [S]. Returns them moved and stretched to [0, 1]; zeros where all are equal."""
    low, high = values.min(), values.max()
    if high - low <= SAME * values.abs().max():
        return torch.zeros_like(values)
    return (values - low) / (high - low)


def step_weights(distances: Tensor, angles: Tensor, radius: float | None = None, factor: float = 1.0) -> Tensor:
    """w [S] >= 0, float64 on the CPU: normalised density plus `factor` times normalised variety; ones where all vanish.

    distances, angles: [S, S], see `dissimilarities`.
    """
    found = normalised(density(distances, radius)) + factor * normalised(variety(angles))
    return (found if found.any() else torch.ones_like(found)).cpu()


def counts(weights: Tensor, n: int) -> Tensor:
    """[S] long, >= 0, n in sum: in proportion to weights [S] >= 0, by largest remainders, the earliest on ties."""
    shares = n * weights / weights.sum()
    whole = shares.floor()
    remainders = (shares - whole).round(decimals=9)  # shares of different size with equal fractions are a tie
    found = whole.long()
    found[remainders.argsort(descending=True, stable=True)[: n - int(found.sum())]] += 1
    return found


def released_counts(weights: Tensor, n: int) -> Tensor:
    """[S] long: the same as the released EDA-DM rounds them (E7), each for itself and then corrected."""
    return corrected((n * weights / weights.sum()).round().long(), n)


def corrected(rounded: Tensor, n: int) -> Tensor:
    """rounded: [S] long, >= 0. Returns counts of sum n: of the largest ones each gets one more, or from the last step
    backwards each positive one gives one.

    One pass, as released. Raises ValueError where that is not enough.
    """
    found, excess = rounded.clone(), int(rounded.sum()) - n
    if excess > 0:
        positive = found.nonzero().flatten().flip(0)
        found[positive[:excess]] -= 1
    else:
        found[found.argsort(descending=True, stable=True)[: -excess or 0]] += 1
    if (total := int(found.sum())) != n:
        raise ValueError(f"backward_counts: expected {n} states after one pass of corrections, found {total}")
    return found


def assigned_steps(numbers: Tensor, generator: torch.Generator) -> Tensor:
    """[N] long: the step of each of N trajectories, every step as often as numbers [S] say, in random order."""
    steps = torch.arange(len(numbers)).repeat_interleave(numbers)
    return steps[torch.randperm(len(steps), generator=generator)]

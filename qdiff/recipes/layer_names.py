"""Layers by name: shell wildcards, and roles that every model family resolves to its own names."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

from qdiff.recipes.plain_data import one_of

# What a layer is in its network, whatever the family calls it; adapters say which layers have the role.
ROLES = {
    "input": "the first convolution",
    "output": "the last convolution",
    "time": "each residual block's projection of the time embedding",
    "attention": "projections of features to queries, keys and values",
    "feed_forward": "feed-forward layers of transformer blocks",
    "first_defined": "the first layer in the order of definition (E1)",
    "before_last_defined": "the last but one layer in the order of definition (E1)",
}
PREFIX = "role:"
Roles = Mapping[str, tuple[str, ...]]


def check_pattern(pattern: str) -> None:
    """Raise ValueError naming the known roles where the pattern names an unknown one."""
    if pattern.startswith(PREFIX):
        one_of("role", pattern.removeprefix(PREFIX), ROLES)


def matches(pattern: str, name: str, roles: Roles | None = None) -> bool:
    """Whether a pattern speaks of the layer called `name`. roles: the network's, needed for patterns of roles."""
    if pattern.startswith(PREFIX):
        return name in (roles or {}).get(pattern.removeprefix(PREFIX), ())
    return fnmatch.fnmatchcase(name, pattern)


def matching(patterns: Iterable[str], names: Iterable[str], roles: Roles) -> list[str]:
    """The names that any of the patterns speaks of, in their order."""
    patterns = list(patterns)
    return [name for name in names if any(matches(pattern, name, roles) for pattern in patterns)]

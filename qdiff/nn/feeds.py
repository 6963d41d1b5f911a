"""Which norm's output is read by which layers, and by nothing else: where a norm may write codes at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormFeed:
    """A group or layer norm and everything that reads it, by dotted names.

    `silu`: a SiLU follows the norm, inside it or as the module `activation`. Between it and `layers` there is nothing
    that computes while the network is in eval mode, but reshaping.
    """

    norm: str
    layers: tuple[str, ...]
    silu: bool = False
    activation: str | None = None

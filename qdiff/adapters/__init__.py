"""Model families that can be quantized, by name."""

from qdiff.adapters.base import Adapter
from qdiff.adapters.ddim import DDIMAdapter
from qdiff.adapters.ldm import LatentAdapter

ADAPTERS: dict[str, Adapter] = {"ddim": DDIMAdapter(), "ldm": LatentAdapter()}


def adapter_for(family: str) -> Adapter:
    """The adapter of a model family. Raises ValueError naming the known ones."""
    if family not in ADAPTERS:
        raise ValueError(f"model family: expected one of {', '.join(ADAPTERS)}, found {family!r}")
    return ADAPTERS[family]


__all__ = ["ADAPTERS", "Adapter", "adapter_for"]

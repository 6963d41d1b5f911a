"""Model families that can be quantized, by name."""

from qdiff.families.base import Adapter
from qdiff.families.ddim.adapter import DDIMAdapter
from qdiff.families.ldm.adapter import LatentAdapter

ADAPTERS: dict[str, Adapter] = {"ddim": DDIMAdapter(), "ldm": LatentAdapter()}


def adapter_for(family: str) -> Adapter:
    """The adapter of a model family. Raises ValueError naming the known ones."""
    if family not in ADAPTERS:
        raise ValueError(f"model family: expected one of {', '.join(ADAPTERS)}, found {family!r}")
    return ADAPTERS[family]


__all__ = ["ADAPTERS", "Adapter", "adapter_for"]

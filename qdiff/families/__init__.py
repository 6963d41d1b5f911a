"""Model families that can be quantized, by name."""

from torch import nn

from qdiff.families.ddim.adapter import DDIMAdapter
from qdiff.families.ldm.adapter import LatentAdapter
from qdiff.nn.family import Adapter

ADAPTERS: dict[str, Adapter] = {"ddim": DDIMAdapter(), "ldm": LatentAdapter()}


def adapter_for(family: str) -> Adapter:
    """The adapter of a model family. Raises ValueError naming the known ones."""
    if family not in ADAPTERS:
        raise ValueError(f"model family: expected one of {', '.join(ADAPTERS)}, found {family!r}")
    return ADAPTERS[family]


def adapter_of(network: nn.Module) -> Adapter:
    """The adapter of the family that a network, float or quantized, is of. Raises ValueError for another network."""
    for adapter in ADAPTERS.values():
        if isinstance(network, adapter.network_class):
            return adapter
    expected = ", ".join(adapter.network_class.__name__ for adapter in ADAPTERS.values())
    raise ValueError(f"network: expected one of {expected}, found {type(network).__name__}")


__all__ = ["ADAPTERS", "Adapter", "adapter_for", "adapter_of"]

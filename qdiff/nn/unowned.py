"""References from one module to another that it does not contain."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Unowned(Generic[T]):
    """Holds a module for one that uses it without containing it.

    A module that is assigned to an attribute becomes a submodule: its parameters appear in the state under that name,
    and `to`, `train` and `apply` reach it there. A layer's step table belongs to the network, and so do other modules
    that several hold; inside this wrapper PyTorch does not see them. Copies of a whole network keep the reference
    right, since `copy.deepcopy` copies what is inside once.
    """

    def __init__(self, module: T) -> None:
        self.module = module

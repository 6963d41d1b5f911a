"""A U-Net as a chain of segments over one state: the order of execution as data."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class State:
    """What flows through a U-Net between two modules. Families with more than this extend it."""

    h: Tensor  # features [N, C, H, W]; the input image until conv_in has run
    temb: Tensor  # time embedding [N, E]; sinusoidal features until the dense layers have run
    skips: tuple[Tensor, ...] = ()  # down-path features still to be joined, oldest first


@dataclass(frozen=True)
class Segment:
    """One module of the chain: state -> arguments -> module -> state."""

    name: str  # dotted module name, "down.1.attn.0"
    module: nn.Module
    read: Callable[[State], tuple[Tensor, ...]]  # the module's arguments
    write: Callable[[State, Tensor], State]  # the state after it

    def __call__(self, state: State) -> State:
        return self.write(state, self.module(*self.read(state)))


def read_features(state: State) -> tuple[Tensor, ...]:
    return (state.h,)


def read_features_and_temb(state: State) -> tuple[Tensor, ...]:
    return state.h, state.temb


def read_joined_and_temb(state: State) -> tuple[Tensor, ...]:
    """The newest skip joins the features: concat([features, skip]) on the channel axis."""
    return torch.cat([state.h, state.skips[-1]], dim=1), state.temb


def write_features(state: State, h: Tensor) -> State:
    return replace(state, h=h)


def write_features_and_keep(state: State, h: Tensor) -> State:
    """The features are also kept as a skip for the up path."""
    return replace(state, h=h, skips=(*state.skips, h))


def write_features_and_drop(state: State, h: Tensor) -> State:
    """The newest skip has been used."""
    return replace(state, h=h, skips=state.skips[:-1])


def write_temb(state: State, temb: Tensor) -> State:
    return replace(state, temb=temb)

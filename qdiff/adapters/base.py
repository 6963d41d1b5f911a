"""What the toolkit needs to know about a model family; one file per family implements it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


class Segment(Protocol):
    """One module of a network's chain: state -> the module's arguments -> the module -> the state after it."""

    name: str
    module: nn.Module
    read: Callable[[Any], tuple[Tensor, ...]]
    write: Callable[[Any, Tensor], Any]


class Adapter(Protocol):
    """The one place that knows both a model family and quantization. Stateless: everything is asked of a network."""

    family: str

    def build(self, config: dict[str, Any]) -> nn.Module:
        """A float network with random weights, in eval mode, from what `config_of` gave."""

    def config_of(self, network: nn.Module) -> dict[str, Any]:
        """Plain data from which `build` makes the same network."""

    def num_timesteps(self, network: nn.Module) -> int:
        """T of the diffusion process the network was trained on."""

    def conditioning(self, network: nn.Module, context: Tensor | None) -> dict[str, Tensor]:
        """The keyword argument under which the network takes the conditioning of its inputs, if it has any: called as
        network(x, t, **conditioning)."""

    def start(self, network: nn.Module, x: Tensor, t: Tensor, context: Tensor | None = None) -> Any:
        """The chain's first state for inputs x [N, C, H, W] at timesteps t [N] with conditioning [N, ...]."""

    def chain(self, network: nn.Module) -> list[Segment]:
        """The network's modules in the order in which it runs them."""

    def split_boundaries(self, network: nn.Module) -> dict[str, int]:
        """Layers fed by concat(features, skip) that may be split: dotted name -> number of feature channels."""

    def attention_products(self, network: nn.Module) -> dict[str, nn.Module]:
        """Float attention products by dotted name."""

    def middle_attention(self, network: nn.Module) -> str:
        """The segment before which the state's features are the deepest map (EDA-DM's density and variety)."""

    def time_layers(self, network: nn.Module) -> list[str]:
        """Layers that see only the timestep: each residual block's projection (QuEST's time-embedding layers)."""

    def published_name(self, quantizer: str) -> str:
        """The name that Q-Diffusion's checkpoints give an activation quantizer of ours."""

    def published_softmax_kind(self, network: nn.Module, act_kind: str) -> str:
        """The grid kind of softmax outputs in Q-Diffusion's checkpoints, for activations of kind `act_kind`."""

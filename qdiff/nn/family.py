"""What the toolkit needs to know about a model family; one file per family implements it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from qdiff.nn.feeds import NormFeed
from qdiff.recipes.layer_names import Roles


class Segment(Protocol):
    """One module of a network's chain: state -> the module's arguments -> the module -> the state after it."""

    name: str
    module: nn.Module
    read: Callable[[Any], tuple[Tensor, ...]]
    write: Callable[[Any, Tensor], Any]


class Adapter(Protocol):
    """The one place that knows both a model family and quantization. Stateless: everything is asked of a network."""

    family: str
    network_class: type[nn.Module]

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

    def roles(self, network: nn.Module) -> Roles:
        """The layers of each role in `qdiff.recipes.layer_names.ROLES`, by dotted name; also of a network with
        quantizers."""

    def norm_feeds(self, network: nn.Module) -> list[NormFeed]:
        """The norms whose output is read by layers alone, with these; also of a network with other layer classes."""

    def published_name(self, quantizer: str) -> str:
        """The name that Q-Diffusion's checkpoints give an activation quantizer of ours."""

    def published_softmax_kind(self, network: nn.Module, act_kind: str) -> str:
        """The grid kind of softmax outputs in Q-Diffusion's checkpoints, for activations of kind `act_kind`."""


def roles_of(network: nn.Module, **layers: Iterable[str]) -> Roles:
    """The given roles, and those that follow from the order of definition."""
    # Quantized layers keep their weights: what has one of two or more axes, and is no embedding, is a layer.
    defined = [
        name
        for name, module in network.named_modules()
        if not isinstance(module, nn.Embedding) and getattr(module, "weight", None) is not None
        if module.weight.dim() > 1
    ]
    return {
        **{role: tuple(names) for role, names in layers.items()},
        "first_defined": (defined[0],),
        "before_last_defined": (defined[-2],),
    }

"""Networks that decide what runs when their first inputs show their sizes, and what is said of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.nn.unowned import Unowned


class Deferred(nn.Module):
    """A network that becomes what runs when its first inputs show their sizes.

    It has one float32 parameter without elements, since samplers ask a network's parameters for device and type.
    """

    def __init__(self, step_table: nn.Module) -> None:
        super().__init__()
        self.placeholder = nn.Parameter(torch.empty(0, device=step_table.lookup.device), requires_grad=False)
        self.step_table = step_table

    @property
    def running(self) -> nn.Module | None:
        """What runs, once the first call has been made."""
        return None

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of the parameters and buffers, or the model, that run; None before the first call."""
        return None if self.running is None else weight_bytes(self.running)


class ChosenAtFirstCall(Deferred):
    """A network of which the first batch decides what runs."""

    def __init__(self, step_table: nn.Module) -> None:
        super().__init__(step_table)
        self._chosen: Unowned[nn.Module] | None = None

    @property
    def running(self) -> nn.Module | None:
        return None if self._chosen is None else self._chosen.module

    def choose(self, arguments: tuple[Tensor, ...]) -> nn.Module:
        """What is to run for arguments like these."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """x: [N, C, H, W]; t: [N]; context: what the network is conditioned on. Returns the predicted noise."""
        arguments = (x, t) if context is None else (x, t, context)
        if self._chosen is None:
            self._chosen = Unowned(self.choose(arguments))
        return self._chosen.module(*arguments)


def shown(times: dict[str, float], samples: int, known: bool) -> str:
    """Times in words."""
    found = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
    return f"{found} for {samples} samples{', measured before' if known else ''}"


def weight_bytes(network: nn.Module) -> int | None:
    """Bytes of a network's parameters and buffers, as it runs; None where that shows at its first call."""
    own = getattr(network, "weight_bytes", None)
    if own is not None or isinstance(network, Deferred):
        return own
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

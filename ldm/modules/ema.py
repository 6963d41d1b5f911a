"""Exponential moving average of a network's parameters, under the buffer names of published latent-diffusion files."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """θ' ← d θ' + (1 - d) θ over the trainable parameters of `model`, in buffers.

    A parameter `a.b.weight` is kept as buffer `abweight`: its name with every dot removed, as in published files.
    With `use_num_updates`, update number n (from 1 on) uses d = min(decay, (1 + n) / (10 + n)), so that the average
    soon forgets the initial weights; `num_updates` is -1 without it.

    Raises ValueError for a decay outside [0, 1] and where two parameters would share a name.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_updates: bool = True):
        super().__init__()
        if not 0 <= decay <= 1:
            raise ValueError(f"EMA decay: expected a number from 0 to 1, found {decay}")
        self.use_num_updates = use_num_updates
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_updates else -1, dtype=torch.int32))
        self.names: dict[str, str] = {}  # parameter -> buffer
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            buffer = name.replace(".", "")
            if hasattr(self, buffer):
                raise ValueError(f"parameter {name}: its name without dots, {buffer}, is taken")
            self.names[name] = buffer
            self.register_buffer(buffer, parameter.detach().clone())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Move the average towards the parameters of `model` by one update."""
        decay = self.decay
        if self.use_num_updates:
            self.num_updates += 1
            decay = torch.minimum(decay, (1 + self.num_updates) / (10 + self.num_updates))
        for shadow, parameter in self._pairs(model):
            shadow.lerp_(parameter.detach().to(shadow.dtype), (1 - decay).to(shadow.dtype))

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Begin anew from the parameters of `model`."""
        for shadow, parameter in self._pairs(model):
            shadow.copy_(parameter)
        self.num_updates.fill_(0 if self.use_num_updates else -1)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the parameters of `model` by their average."""
        for shadow, parameter in self._pairs(model):
            parameter.copy_(shadow)

    @contextmanager
    def scope(self, model: nn.Module) -> Iterator[None]:
        """`model` has the averaged parameters within the block and those it had before after it, also on an error."""
        kept = [parameter.detach().clone() for _, parameter in self._pairs(model)]
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for (_, parameter), value in zip(self._pairs(model), kept, strict=True):
                    parameter.copy_(value)

    def _pairs(self, model: nn.Module) -> list[tuple[Tensor, nn.Parameter]]:
        """(average, parameter) of every averaged parameter. Raises ValueError where `model` lacks one."""
        parameters = dict(model.named_parameters())
        if missing := [name for name in self.names if name not in parameters]:
            raise ValueError(f"the averaged network had a parameter {missing[0]}, this one has none")
        return [(self.get_buffer(buffer), parameters[name]) for name, buffer in self.names.items()]

"""The network of a benchmark: of any family, with its weights or random ones, and noise as its states."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from qdiff.calibration.selectors import CalibrationSet
from qdiff.cli.models.network_only import ModelOptions, named_model
from qdiff.families import Adapter


@dataclass(frozen=True)
class Subject:
    """A float network on its device, and what its inputs look like. context: of one state, () for none."""

    network: nn.Module
    adapter: Adapter
    shape: tuple[int, ...]
    context: tuple[int, ...]
    family: str

    def states(self, steps: int, per_step: int, seed: int) -> CalibrationSet:
        """Noise at `steps` timesteps."""
        generator, count = torch.Generator().manual_seed(seed), steps * per_step
        step = torch.arange(steps).repeat_interleave(per_step)
        t = (step + 1) * self.adapter.num_timesteps(self.network) // steps - 1
        x = torch.randn((count, *self.shape), generator=generator)
        context = torch.randn((count, *self.context), generator=generator) if self.context else None
        return CalibrationSet(x, t, step, context)


def load_subject(args: argparse.Namespace, device: torch.device) -> Subject:
    """The model that the flags name. Raises ValueError naming the flags where they name none."""
    model = named_model(ModelOptions.of(args))
    if model is None:
        raise ValueError("-r, --config: name a checkpoint, or a configuration")
    network = model.load().to(device).requires_grad_(False).eval()
    return Subject(network, model.adapter, model.shape, model.context, model.family)

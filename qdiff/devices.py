"""Where a run computes: the device that is asked for, its name, and how exact a GPU's products are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or a GPU if there is one, else the CPU. Raises ValueError for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # the meta device fails here
    except (RuntimeError, AssertionError) as error:  # NotImplementedError among them
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name}: expected cpu, cuda, cuda:1, ...; not available here: {reason}") from error
    return device


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Within the block GPUs may compute float32 products with 10-bit mantissas."""
    former = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = former


def describe_device(network: nn.Module) -> str:
    """The device a network is on, for people: a GPU's name, or the CPU and its threads."""
    device = next(network.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"

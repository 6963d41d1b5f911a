"""Where a run computes: the device that is asked for, its name, and how exact a GPU's products are."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from qdiff.utils.errors import FieldError


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or a GPU if there is one, else the CPU. Raises ValueError for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()  # the meta device fails here
    except (RuntimeError, AssertionError) as error:  # NotImplementedError among them
        reason = str(error).splitlines()[0].split(". ")[0]
        expected = "expected cpu, cuda, cuda:1, ...; not available here"
        raise FieldError("device", f" {name}: {expected}: {reason}") from error
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
    """The device a network is on; see `device_name`."""
    return device_name(next(network.parameters()).device)


def device_name(device: torch.device) -> str:
    """What decides the speed of a device: a GPU's name, or the processor's and PyTorch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_name()}, {torch.get_num_threads()} threads"


def _processor_name() -> str:
    about = Path("/proc/cpuinfo")  # where platform knows the architecture only
    found = re.search(r"^model name\s*:\s*(.+)$", about.read_text(), re.MULTILINE) if about.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()

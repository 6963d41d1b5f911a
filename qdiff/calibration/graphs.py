"""One iteration captured as a CUDA graph: the host then launches a whole iteration at once. The one place below the
scripts that names a kind of device, since graphs exist for one kind only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

WARM_UP = 3  # iterations before a capture, in which libraries choose their kernels and allocate their workspaces


def repeated(
    step: Callable[[], None], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> Callable[[], None]:
    """A function that does what `step` does, from the fourth call on as a captured graph where the device has them.

    `step` must read and write the same tensors at every call and take no decision that depends on their values.
    generators: those on the device that it draws from. Every call is one step, also those that warm up.
    """
    if device.type != "cuda":
        return step
    graph, calls = torch.cuda.CUDAGraph(), 0
    for generator in generators:
        graph.register_generator_state(generator)
    stream = torch.cuda.Stream(device)

    def call() -> None:
        nonlocal calls
        calls += 1
        if calls <= WARM_UP:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream(device).wait_stream(stream)
            return
        if calls == WARM_UP + 1:
            with torch.cuda.graph(graph):  # records the step without running it
                step()
        graph.replay()

    return call

"""Small modules in the place of networks, exported in either dialect, checked and run."""

import copy

import onnx
import pytest
import torch
from torch import nn

from qdiff.deploy.onnx.export import make_model
from qdiff.deploy.onnx.session import OnnxNetwork
from qdiff.nn.layers import to_double


class PlainAdapter:
    """For modules that are called as module(x, t[, context])."""

    family = "plain"

    def conditioning(self, network, context):
        return {} if context is None else {"context": context}


class Network(nn.Module):
    """A function of (network, x, t) over some layers."""

    def __init__(self, compute, **layers):
        super().__init__()
        self.compute = compute
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x, t, context=None):
        return self.compute(self, x, t) if context is None else self.compute(self, x, t, context)


@pytest.fixture(params=["runtime", "portable"])
def dialect(request):
    return request.param


@pytest.fixture(scope="session")
def plain_adapter():
    return PlainAdapter()


@pytest.fixture(scope="session")
def make():
    """(compute, **layers) -> a module to be exported."""
    return lambda compute, **layers: Network(compute, **layers).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def exported():
    """(network, adapter, x, t, context, dialect, ...) -> the same network in ONNX Runtime; its graph is checked."""

    def export(network, adapter, x, context=None, dialect="runtime", parameter_set=None):
        sizes = None if context is None else tuple(context.shape[1:])
        model = make_model(network, adapter, tuple(x.shape[1:]), sizes, dialect, parameter_set)
        onnx.checker.check_model(model, full_check=dialect != "runtime")
        domains = {node.domain for node in model.graph.node}
        assert domains <= ({""} if dialect != "runtime" else {"", "com.microsoft"})
        return OnnxNetwork(model.SerializeToString(), threads=1)

    return export


@pytest.fixture(scope="session")
def in_double():
    """(network, x, t[, context]) -> the output of the float64 network."""

    @torch.no_grad()
    def run(network, x, t, context=None):
        double = to_double(copy.deepcopy(network))
        if context is None:
            return double(x.double(), t)
        return double(x.double(), t, context.double() if context.is_floating_point() else context)

    return run

"""Where the cases run, and grids and codes made at random for them."""

import os

import pytest
import torch

from qdiff.nn.grid import Grid
from qdiff.recipes.recipe import QuantSpec


@pytest.fixture(scope="session")
def device():
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(scope="session")
def random_grid():
    """(spec, sets, generator, ends) -> (scale, zero point) [sets] that suit standard normal data; zero points are 0
    where the kind has none, and at an end of the codes where `ends` is true."""

    def make(spec, sets, generator, ends=False):
        scale = (torch.rand(sets, generator=generator) + 0.5) * 6 / 2**spec.bits
        if spec.kind in ("signed", "unsigned"):
            return scale, torch.zeros(sets, dtype=torch.int32)
        choices = torch.tensor([spec.qmin, spec.qmax]) if ends else torch.arange(spec.qmin, spec.qmax + 1)
        return scale, choices[torch.randint(len(choices), (sets,), generator=generator)].to(torch.int32)

    return make


@pytest.fixture(scope="session")
def random_codes():
    """(spec, shape, generator) -> int64 codes, both ends of the grid among them."""

    def make(spec, shape, generator):
        codes = torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator)
        codes.view(-1)[:2] = torch.tensor([spec.qmin, spec.qmax])
        return codes

    return make


@pytest.fixture(scope="session")
def centred_codes():
    """(x, scale, zero, spec, sets) -> the definition's code - zero point, in x's dtype; sets [N] or [1]."""

    def make(x, scale, zero, spec: QuantSpec, sets):
        shape = (-1, *[1] * (x.dim() - 1))
        scale, zero = (values[sets].view(shape).to(x.dtype) for values in (scale, zero))
        return Grid(scale, zero, spec).centred(x)

    return make

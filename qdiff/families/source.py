"""What a family gives: a model that a path names, how it samples, and the float model once it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddim.noise import ImageNoise
from ddim.samplers import run
from qdiff.families.options import Entry, SamplingOptions
from qdiff.nn.family import Adapter

Predict = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W], t [N]) -> eps, guided where guidance is asked for


@dataclass(frozen=True)
class Sampling:
    """How a model samples, checked: a pipeline of its family, and the prompts or labels that images take in turn.

    nothing: the entry that guidance leads away from.
    """

    pipeline: Any  # of ddim.pipeline or ldm.pipeline
    entries: tuple[Entry, ...] = ()
    nothing: Entry = ""

    @property
    def steps(self) -> int:
        """Sampler steps."""
        return len(self.pipeline.timesteps())

    def path(self) -> Any:
        """How errors add up while sampling (`ddim.linear.LinearPath`); None for a sampler that is not linear."""
        try:
            return self.pipeline.path()
        except ValueError:
            return None


class FloatModel(Protocol):
    """A float model with its weights. origin: where they come from, file name and SHA-256."""

    network: nn.Module
    origin: dict[str, str]

    def to(self, device: torch.device | str) -> FloatModel:
        """The model itself, on a device."""

    def without_network(self) -> FloatModel:
        """The model itself, its network given up: what encodes conditioning and decodes images stays."""

    def start(
        self, sampling: Sampling, batch: Sequence[int], network: nn.Module, codes: Sequence[int] | None = None
    ) -> Any:
        """The sampler (`ddim.samplers.Sampler`) that makes x, or latents, of the images of these indices, on the device
        and in the type of the network's parameters. codes: the indices whose first noise the images begin with."""

    def predictor(self, sampling: Sampling, network: nn.Module, batch: Sequence[int], first: int = 0) -> Predict:
        """What answers the sampler: `network`, float or quantized, with the conditioning of these images.

        first: the index of the image that takes the first entry.
        """

    def columns(self, sampling: Sampling, batch: Sequence[int], first: int = 0) -> dict[str, Tensor]:
        """What the network is conditioned on for these images: cs and ucs [N, ...], as calibration data keep them."""

    def decode(self, x: Tensor) -> Tensor:
        """x, or latents -> images [N, C, H, W] in [0, 1]."""

    def warnings(self, sampling: Sampling) -> list[str]:
        """What the model does not do as it is asked, a line each."""


class Source(Protocol):
    """A model that was named: its configuration is read and checked, and nothing is loaded yet.

    kind: "pixel", "latent" or "text". config: plain data. where: what names the model. batch_size: the configuration's
    own, None where it has none. context: shape of what one image is conditioned on, () for none.
    """

    adapter: Adapter
    kind: str
    config: Any
    where: dict[str, str]
    batch_size: int | None
    context: tuple[int, ...]
    samplers: tuple[str, ...]

    def shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, H, W) of the network's input, for images of that size in pixels. Raises FieldError."""

    def sampling(self, options: SamplingOptions) -> Sampling:
        """How it samples. Raises FieldError naming the option that the model does not have."""

    def weights(self) -> Path:
        """The file of the float weights. Raises FileNotFoundError, or ValueError where none is named."""

    def build(self, seed: int = 0) -> nn.Module:
        """The float network with random weights, in eval mode."""

    def load_network(self) -> nn.Module:
        """The float network with its weights, on the CPU."""

    def load(self, device: torch.device | str = "cpu", network: bool = True) -> FloatModel:
        """The float model. network: whether its network is needed; without it, the rest alone is read."""


def starting_noise(
    pipeline: Any, batch: Sequence[int], network: nn.Module, codes: Sequence[int] | None
) -> tuple[Tensor, ImageNoise]:
    """(the noise that images begin with [N, C, H, W], what gives the noise of later steps)

    The start is the first draw for an image's index, or for its code; later ones are the following draws for its index.
    """
    like = next(network.parameters())
    where = (pipeline.shape, like.device, like.dtype)
    noise = ImageNoise(pipeline.seed, batch, *where)
    start = noise()
    return (start if codes is None else ImageNoise(pipeline.seed, codes, *where)()), noise


@torch.no_grad()
def sample(
    model: FloatModel,
    sampling: Sampling,
    network: nn.Module,
    batch: Sequence[int],
    observe: Callable[[Any], None] | None = None,
    first: int = 0,
    codes: Sequence[int] | None = None,
) -> Tensor:
    """x, or latents, of the images of these indices, [N, C, H, W], by a network, float or quantized.

    observe: sees each call (step, t, x) before the network does. first, codes: see `FloatModel`. Raises ValueError for
    predictions that are not finite.
    """
    start = model.start(sampling, batch, network, codes)
    return run(start, model.predictor(sampling, network, batch, first), observe)


def inputs(source: Source, shape: Sequence[int], batch_size: int, seed: int) -> tuple[Tensor, ...]:
    """x [N, *shape], t and, for networks that take one, a context: noise for one evaluation, at timesteps from 0 to
    T - 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        timesteps = source.adapter.num_timesteps(source.build())
    x = torch.randn((batch_size, *shape), generator=generator)
    t = torch.randint(0, timesteps, (batch_size,), generator=generator)
    if not source.context:
        return x, t
    return x, t, torch.randn((batch_size, *source.context), generator=generator)


def check_same_network(
    adapter: Adapter, build: Callable[[], nn.Module], path: Path, family: str, config: dict[str, Any]
) -> None:
    """Raise ValueError where a packed file, made for a network of `family` with `config`, is of another one than
    `build` makes."""
    if family != adapter.family:
        raise ValueError(f"{path}: made for a {family} model, the configuration is of a {adapter.family} one")
    with torch.device("meta"):
        expected = adapter.config_of(build())
    for key, value in expected.items():
        if config.get(key) != value and key != "dropout":
            raise ValueError(f"{path}: made for {key} {config.get(key)}, the configuration has {value}")

"""Float models: load one of any family, record how it samples, sample it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.api.sampling import FIRST_CALIBRATION_IMAGE, batches, record_batches, sample_batches
from qdiff.calibration.trajectories import (
    Trajectories,
    concatenate,
    load_trajectories,
    save_shard,
    shard_path,
    shard_provenance,
)
from qdiff.families.open import open_model
from qdiff.families.options import SamplingOptions
from qdiff.families.source import FloatModel, Sampling, Source, sample
from qdiff.utils.errors import FieldError
from qdiff.utils.files import sole_user

BATCH = 16  # samples at once where nothing is said


def load_model(
    path: str | Path,
    config: str | Path | None = None,
    *,
    weights: str | Path | None = None,
    overrides: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Model:
    """A float model of any family, with its weights, in eval mode.

    path: the configuration of a pixel model (`configs/cifar10-small.yml`), or a latent model's checkpoint, or the
    folder it lies in (`models/cifar10-ldm`). config: the latent model's configuration, by default the one beside the
    checkpoint. weights: a pixel model's weights, by default those that its configuration names. overrides: settings of
    a latent model's configuration in dot-list form.

    Raises FileNotFoundError, and ValueError naming the file and what is wrong with it.

    ```python
    model = qdiff.load_model("models/cifar10-ldm")
    images = model.sample(4, steps=20)
    ```
    """
    source = open_model(path, config, weights, overrides)
    return Model(source, source.load(device))


class Model:
    """A float model: its `network`, and how it is conditioned, sampled and decoded.

    kind: "pixel", "latent" (unconditional or class-conditional) or "text".
    """

    def __init__(self, source: Source, loaded: FloatModel) -> None:
        """source: what was named; loaded: the same with its weights. `load_model` makes both."""
        self.source, self.loaded = source, loaded
        self.kind, self.family = source.kind, source.adapter.family

    @property
    def network(self) -> nn.Module:
        """The float network, called as network(x, t), or network(x, t, context)."""
        return self.loaded.network

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> Model:
        """The same model, moved to a device."""
        self.loaded = self.loaded.to(device)
        return self

    def sampling(self, **options: Any) -> Sampling:
        """How the model samples. options: fields of `SamplingOptions`, among them steps, sampler, eta, scale, seed,
        prompts and labels. Raises ValueError naming an option that the model does not have."""
        return self.source.sampling(sampling_options(options))

    def record(
        self, samples: int, *, batch_size: int = BATCH, folder: str | Path | None = None, **options: Any
    ) -> Trajectories:
        """Calibration data: the states x_t of every sampling step, and their conditioning, of `samples` seeds.

        batch_size: seeds sampled at once. folder: where each batch is written when it is done; a call that was
        interrupted goes on there, and what is there is not done again. options: as for `sampling`. Returns
        `Trajectories`: `xs` S tensors [samples, C, H, W], `ts` S tensors [samples], `extra` the conditioning.

        Raises ValueError naming an option, or a file in the folder that was made with others.
        """
        sampling = self.sampling(**options)
        indices = list(batches(FIRST_CALIBRATION_IMAGE, samples, batch_size))
        if folder is None:
            return concatenate([part for _, part in record_batches(self.loaded, sampling, self.network, indices)])
        return self._record_into(Path(folder), sampling, indices, samples, batch_size)

    def _record_into(
        self, folder: Path, sampling: Sampling, indices: list[range], samples: int, batch_size: int
    ) -> Trajectories:
        about = {"n_samples": samples, "batch_size": batch_size, "asked_for": list(sampling.entries)}
        provenance = {"family": self.family, **self.loaded.origin, **sampling.pipeline.describe(), **about}
        folder.mkdir(parents=True, exist_ok=True)
        with sole_user(folder):
            todo = unfinished_shards(folder, provenance, indices)
            for batch, part in record_batches(self.loaded, sampling, self.network, list(todo)):
                save_shard(part, shard_path(folder, todo[batch]), provenance)
        return load_trajectories(folder)

    def sample(self, count: int, *, batch_size: int = BATCH, **options: Any) -> Tensor:
        """Images 0 ... count - 1, [count, C, H, W] in [0, 1], on the CPU. options: as for `sampling`.

        The same options give the same images, whatever the batch size. Raises ValueError naming an option, and for
        predictions that are not finite.
        """
        return torch.cat([images for _, images in self.images(self.network, count, batch_size, **options)])

    def images(
        self, network: nn.Module, count: int, batch_size: int = BATCH, **options: Any
    ) -> Iterator[tuple[range, Tensor]]:
        """(indices, images [N, C, H, W] in [0, 1]) of each batch, as `network`, float or quantized, samples them."""
        sampling = self.sampling(**options)

        def decoded(batch: range, watch: Any) -> Tensor:
            return self.loaded.decode(sample(self.loaded, sampling, network, batch, watch))

        with torch.no_grad():
            yield from sample_batches(decoded, sampling.steps, list(batches(0, count, batch_size)), "sampling")


def sampling_options(options: dict[str, Any]) -> SamplingOptions:
    """Keyword arguments as `SamplingOptions`; lists become tuples. Raises TypeError for an unknown name."""
    return SamplingOptions(**{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()})


def unfinished_shards(folder: Path, provenance: dict[str, Any], indices: list[range]) -> dict[range, int]:
    """The batches that have no shard in a folder yet, with their shard number.

    Raises ValueError naming a shard that was made with other settings, and the first that differs.
    """
    todo = {}
    for position, batch in enumerate(indices):
        path = shard_path(folder, position)
        if not path.exists():
            todo[batch] = position
            continue
        found = shard_provenance(path)
        for key, value in provenance.items():
            if found.get(key) != value:
                was = f"made with {key} {found.get(key)!r}, this run has {value!r}"
                raise FieldError(str(path), f": {was}; choose another {{}}", "folder")
    return todo

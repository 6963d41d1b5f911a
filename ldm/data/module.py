"""Batches for training, as a LightningDataModule made from a configuration."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.util import instantiate_from_config


class ShuffledStream(Sampler):
    """Batches without end of (epoch, index): the epochs' permutations one after another, cut into batches.

    Batch number b, counted from 0 over the whole training, depends on (seed, b) alone, so that a training goes on
    from any batch (`start`). Of `world` processes number `rank` gets its own part of each batch.
    """

    def __init__(self, size: int, batch_size: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1):
        self.size = size  # of the data set
        self.batch_size = batch_size  # of one process
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch, epoch, order = self.start, -1, None
        while True:
            keys = []
            first = (batch * self.world + self.rank) * self.batch_size
            for position in range(first, first + self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
                keys.append((epoch, int(order[position % self.size])))
            yield keys
            batch += 1


class DataModuleFromConfig(pl.LightningDataModule):
    """Training and validation batches of the data sets that `train` and `validation` describe ({target, params}).

    The training batches never end (Lightning sees one endless epoch); they go on where the trainer's step count is.
    A data set is indexed by (epoch, index) for training and by index for validation. batch_size: of one process.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any],
        validation: Mapping[str, Any] | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"expected batch_size >= 1, num_workers >= 0, found {batch_size} and {num_workers}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.train: Dataset = instantiate_from_config(train)
        self.validation: Dataset | None = None if validation is None else instantiate_from_config(validation)

    def train_dataloader(self) -> DataLoader:
        start, rank, world = 0, 0, 1
        if self.trainer is not None:
            start = self.trainer.global_step * self.trainer.accumulate_grad_batches
            rank, world = self.trainer.global_rank, self.trainer.world_size
        stream = ShuffledStream(len(self.train), self.batch_size, self.seed, start, rank, world)
        return self._loader(self.train, batch_sampler=stream)

    def val_dataloader(self) -> DataLoader | list:
        if self.validation is None:
            return []
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        part = range(rank, len(self.validation), world)
        return self._loader(self.validation, sampler=part, batch_size=self.batch_size)

    def _loader(self, data: Dataset, **options: Any) -> DataLoader:
        copied = self.trainer is not None and self.trainer.strategy.root_device.type != "cpu"
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return DataLoader(data, pin_memory=copied, **workers, **options)

"""Batches: every image once per epoch, the same from any starting point, divided among processes."""

from itertools import chain, islice
from pathlib import Path

import pytest

from ldm.data.module import DataModuleFromConfig, ShuffledStream

NPZ = Path(__file__).parents[2] / "fixtures" / "cifar10_test_200.npz"


def first(count, *args, **options):
    return list(islice(ShuffledStream(*args, **options), count))


def test_every_image_once_per_epoch_in_a_new_order():
    keys = list(chain(*first(10, 20, 6)))  # 60 images: three epochs, over the borders of batches
    assert [epoch for epoch, _ in keys] == [0] * 20 + [1] * 20 + [2] * 20
    orders = [[index for _, index in keys[start : start + 20]] for start in (0, 20, 40)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(20))


def test_starts_anywhere():
    batches = first(12, 10, 4, seed=3)
    assert first(5, 10, 4, seed=3, start=7) == batches[7:]
    assert first(12, 10, 4, seed=4) != batches


def test_processes_share_the_batches():
    alone = first(6, 10, 8)
    pairs = zip(first(6, 10, 4, rank=0, world=2), first(6, 10, 4, rank=1, world=2), strict=True)
    assert [one + two for one, two in pairs] == alone


def test_a_batch_larger_than_the_data_set():
    (batch,) = first(1, 3, 7)
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2]


def config(**params):
    return {"target": "ldm.data.cifar10.CIFAR10", "params": {"path": str(NPZ), **params}}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_the_data_module(workers):
    data = DataModuleFromConfig(4, config(), config(split="test", flip=False), num_workers=workers, seed=1)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 32, 32, 3) and batch["class_label"].shape == (4,)
    expected = [data.train[key] for key in first(1, 190, 4, seed=1)[0]]
    assert batch["caption"] == [item["caption"] for item in expected]
    validation = list(data.val_dataloader())
    assert [len(batch["image"]) for batch in validation] == [4, 4, 2]
    labels = chain(*(batch["class_label"].tolist() for batch in validation))
    assert list(labels) == data.validation.labels.tolist()


def test_no_validation_and_bad_sizes():
    assert DataModuleFromConfig(4, config()).val_dataloader() == []
    with pytest.raises(ValueError, match="batch_size >= 1"):
        DataModuleFromConfig(0, config())
    with pytest.raises(ValueError, match="unexpected keyword argument 'colour'"):
        DataModuleFromConfig(4, config(colour=1))

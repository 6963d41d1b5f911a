"""Factors of the learning rate: corner values, straight lines and cosines worked out by hand."""

import math

import pytest
import torch

from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2


def test_warm_up_then_cosine_then_flat():
    factor = LambdaWarmUpCosineScheduler(warm_up_steps=10, lr_min=0.1, lr_max=1.0, lr_start=0.2, max_decay_steps=110)
    expected = {0: 0.2, 5: 0.6, 10: 1.0, 60: 0.55, 110: 0.1, 10_000: 0.1}
    assert {n: factor(n) for n in expected} == pytest.approx(expected)
    assert factor.schedule(35) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))


def test_the_published_constant_schedule_with_warm_up():
    """As the Stable Diffusion configurations have it: one cycle that never ends."""
    factor = LambdaLinearScheduler([10_000], f_min=[1.0], f_max=[1.0], f_start=[1e-6], cycle_lengths=[10**13])
    assert factor(0) == 1e-6 and factor(5_000) == pytest.approx(0.5, abs=1e-6)
    assert factor(10_000) == factor(10**9) == 1.0


def test_linear_cycles_follow_one_another():
    factor = LambdaLinearScheduler(
        [2, 5], f_min=[0.5, 0.0], f_max=[1.0, 2.0], f_start=[0.0, 0.5], cycle_lengths=[10, 20]
    )
    first = {0: 0.0, 1: 0.5, 2: 0.9, 6: 0.7, 10: 0.5}  # 1 - 0.05 n after the warm-up, as published
    second = {11: 0.5 + 1.5 / 5, 15: 1.5, 25: 0.5, 30: 0.0, 31: 0.0, 500: 0.0}  # 2 - 0.1 n
    assert {n: factor(n) for n in first | second} == pytest.approx(first | second)


def test_cosine_cycles_meet_their_ends():
    factor = LambdaWarmUpCosineScheduler2(
        [0, 4], f_min=[0.2, 0.1], f_max=[1.0, 0.8], f_start=[0, 0], cycle_lengths=[8, 12]
    )
    expected = {0: 1.0, 4: 0.6, 8: 0.2, 10: 0.4, 12: 0.8, 16: 0.45, 20: 0.1, 99: 0.1}
    assert {n: factor(n) for n in expected} == pytest.approx(expected)


def test_as_a_torch_scheduler():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    factor = LambdaWarmUpCosineScheduler(4, 0.0, 1.0, 0.0, 8)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor.schedule)
    rates = []
    for _ in range(8):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5 * factor(n) for n in range(8)])


def test_logs_at_its_interval(caplog):
    factor = LambdaWarmUpCosineScheduler(2, 0, 1, 0, 4, verbosity_interval=3)
    with caplog.at_level("INFO"):
        for n in range(5):
            factor(n)
    assert [record.args[0] for record in caplog.records] == [0, 3]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"f_min": [1.0, 1.0]}, "f_min 2"),
        ({"cycle_lengths": [5], "warm_up_steps": [6]}, "at most the cycle's 5 steps, found 6"),
        (dict.fromkeys(("warm_up_steps", "f_min", "f_max", "f_start", "cycle_lengths"), []), "one entry per cycle"),
    ],
)
def test_impossible_cycles_are_refused(changed, words):
    arguments = {"warm_up_steps": [1], "f_min": [0], "f_max": [1], "f_start": [0], "cycle_lengths": [9]}
    with pytest.raises(ValueError, match=words):
        LambdaLinearScheduler(**{**arguments, **changed})

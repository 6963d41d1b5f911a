"""Losses and AdaRound's penalty, against numbers worked out by hand."""

import math

import pytest
import torch

from qdiff.calibration.objectives import lp_loss, penalty_table, rounding_penalty, temperature
from qdiff.nn.functional import soft_round, soft_round_inverse
from qdiff.recipes.stages import Loss, RoundingPenalty

# [2 samples, 3 channels, 1, 2 pixels] of errors, signs mixed.
ERROR = torch.tensor([[[[1.0, -2.0]], [[0.0, 3.0]], [[-1.0, 0.0]]], [[[2.0, 0.0]], [[0.0, 0.0]], [[0.0, -4.0]]]])


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # per (sample, pixel): sum over channels, then the mean of the four: 2, 13, 4, 16
        (Loss(2.0), (2 + 13 + 4 + 16) / 4),
        (Loss(2.0, reduction="mean"), (2 + 13 + 4 + 16) / 12),
        (Loss(1.0), (2 + 5 + 2 + 4) / 4),
        (Loss(2.4), (1 + 1 + 2**2.4 + 3**2.4 + 2**2.4 + 4**2.4) / 4),
    ],
    ids=["l2", "l2-mean", "l1", "l2.4"],
)
def test_lp_sums_over_axis_1_and_averages_the_rest(loss, expected):
    aim = torch.linspace(-1, 1, 12).view(ERROR.shape)
    assert lp_loss(aim + ERROR, aim, loss).item() == pytest.approx(expected, rel=1e-5)


def test_axis_1_of_features_are_the_features():
    assert lp_loss(torch.ones(4, 3), torch.zeros(4, 3), Loss(2.0)).item() == 3


def test_beta_falls_linearly_after_the_warm_up():
    """Off for the first 20 % of the iterations, then 20 -> 2 (methods §1.3)."""
    betas = [temperature(RoundingPenalty(), i, 100) for i in (0, 19, 20, 60, 99)]
    assert betas == [None, None, 20, pytest.approx(11), pytest.approx(2 + 18 / 80)]
    assert temperature(RoundingPenalty(warmup=0.0), 0, 10) == 20
    assert temperature(RoundingPenalty(warmup=1.0), 9, 10) is None


@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.25, 1.0])
def test_the_table_holds_beta_at_every_iteration_and_0_while_the_penalty_is_off(warmup):
    penalty = RoundingPenalty(0.01, warmup, 20.0, 2.0)
    expected = [temperature(penalty, i, 30) for i in range(30)]
    assert penalty_table(penalty, 30).tolist() == pytest.approx([beta or 0.0 for beta in expected], rel=1e-6)
    assert expected.count(None) == math.ceil(30 * warmup)
    assert penalty_table(None, 3).tolist() == [0, 0, 0]


def test_the_penalty_of_known_roundings():
    h = torch.tensor([0.0, 1.0, 0.5, 0.75, 0.1], dtype=torch.float64)
    alphas = [soft_round_inverse(h[:3]), soft_round_inverse(h[3:])]
    for beta in (20.0, 11.0, 2.0):
        expected = 0.5 * sum(1 - abs(2 * x - 1) ** beta for x in h.tolist())
        found = rounding_penalty(alphas, RoundingPenalty(0.5), torch.tensor([beta]))
        assert found.item() == pytest.approx(expected, rel=1e-9)


def test_the_penalty_pushes_roundings_to_their_nearer_end():
    alpha = soft_round_inverse(torch.tensor([0.3, 0.7])).requires_grad_()
    rounding_penalty([alpha], RoundingPenalty(), torch.tensor([3.8])).backward()
    stepped = soft_round((alpha - 0.1 * alpha.grad.sign()).detach())
    assert stepped[0] < 0.3 and stepped[1] > 0.7


def test_without_variables_there_is_nothing():
    assert rounding_penalty([], RoundingPenalty(), torch.tensor([3.8])) == 0

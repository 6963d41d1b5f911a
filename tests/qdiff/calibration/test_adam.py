"""Our Adam, whose rates are tables, against PyTorch's with a schedule."""

import copy
import math

import pytest
import torch
from torch import nn

from qdiff.calibration.adam import Adam, AdamGroup
from qdiff.calibration.optimization import rate_table
from qdiff.recipes.stages import Learn

STEPS = 150
FACTORS = {"constant": lambda i: 1.0, "cosine": lambda i: 0.5 * (1 + math.cos(math.pi * i / STEPS))}
LEARN = [Learn(0.05, "cosine"), Learn(0.002), Learn(1.0, "cosine")]


def problem(dtype=torch.float64):
    """Parameters of three groups, and a loss of them that no step reaches the minimum of."""
    generator = torch.Generator().manual_seed(0)
    shapes = [[(3, 4), (5,)], [(1,), (2, 1, 3)], [(4, 4)]]
    groups = [[nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in group] for group in shapes]
    aims = torch.randn(STEPS, generator=generator, dtype=dtype)

    def loss(step, skip=()):
        every = [p for group in groups for p in group if all(p is not q for q in skip)]
        return sum((p - aims[step]).abs().pow(1.5).sum() * 10 ** (i - 2) for i, p in enumerate(every))

    return groups, loss


def learn_with_ours(groups, loss, steps=STEPS, **options):
    adam = Adam([(group, rate_table(learn, STEPS)) for group, learn in zip(groups, LEARN, strict=True)])
    number = torch.zeros(1, dtype=torch.long)
    for step in range(steps):
        adam.zero_grad()
        loss(step, **options).backward()
        adam.step(number)
        number += 1
    return adam


def learn_with_torchs(groups, loss, steps=STEPS, **options):
    parts = [{"params": group, "lr": learn.rate} for group, learn in zip(groups, LEARN, strict=True)]
    optimizer = torch.optim.Adam(parts)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [FACTORS[learn.schedule] for learn in LEARN])
    for step in range(steps):
        optimizer.zero_grad()
        loss(step, **options).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"),
    [
        (torch.float64, 1, 1e-13),
        (torch.float64, STEPS, 1e-12),
        # Rounding of float32 grows where a cosine's first steps are as wide as the parameters.
        (torch.float32, 20, 1e-4),
    ],
)
def test_it_steps_as_pytorchs_adam_with_a_schedule(dtype, steps, tolerance):
    (mine, my_loss), (theirs, their_loss) = problem(dtype), problem(dtype)
    before = copy.deepcopy(mine)
    learn_with_ours(mine, my_loss, steps)
    learn_with_torchs(theirs, their_loss, steps)
    for group, other, former in zip(mine, theirs, before, strict=True):
        for p, q, start in zip(group, other, former, strict=True):
            torch.testing.assert_close(p.data, q.data, rtol=tolerance, atol=tolerance)
            assert (p - start).abs().min() > 1e-3


def test_parameters_without_gradient_stay():
    (mine, my_loss), (theirs, their_loss) = problem(), problem()
    start = mine[1][0].detach().clone()
    adam = learn_with_ours(mine, my_loss, skip=[mine[1][0]])
    learn_with_torchs(theirs, their_loss, skip=[theirs[1][0]])
    assert torch.equal(mine[1][0], start) and mine[1][0].grad is None
    for group, other in zip(mine, theirs, strict=True):
        for p, q in zip(group, other, strict=True):
            torch.testing.assert_close(p.data, q.data, rtol=1e-12, atol=1e-12)
    given = [p.grad for group in mine for p in group if p.grad is not None]
    assert len(given) == 4 and all(a is b for a, b in zip(adam.gradients(), given, strict=True))


def test_gradients_are_forgotten():
    groups, loss = problem()
    adam = learn_with_ours(groups, loss, steps=1)
    assert len(adam.gradients()) == 5
    adam.zero_grad()
    assert adam.gradients() == [] and all(p.grad is None for group in groups for p in group)


def test_the_step_is_chosen_by_its_number():
    """The last of a cosine is much shorter than the first, for the same gradient."""
    moved = []
    for number in (0, STEPS - 1):
        p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        p.grad = torch.tensor([3.0, -0.1], dtype=torch.float64)
        Adam([([p], rate_table(LEARN[0], STEPS))]).step(torch.tensor([number]))
        moved.append(p.data)
    torch.testing.assert_close(moved[0], torch.tensor([-0.05, 0.05], dtype=torch.float64), rtol=1e-6, atol=0)
    assert 0 < moved[1].abs().max() < 1e-3


def test_float32_steps_are_torchs_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    mine = torch.randn(40, 7, generator=generator).requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    rates = torch.linspace(1e-1, 1e-4, 30, dtype=torch.float64)
    adam, reference = Adam([([mine], rates)]), torch.optim.Adam([theirs], lr=0.0)
    for step, rate in enumerate(rates.tolist()):
        mine.grad = torch.randn(40, 7, generator=generator)
        theirs.grad = mine.grad.clone()
        reference.param_groups[0]["lr"] = rate
        adam.step(torch.tensor([step]))
        reference.step()
    assert torch.equal(mine, theirs)


def rows_problem():
    """Scales of three groups, and a loss that only some groups are part of."""
    p = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64))
    return p, lambda rows, step: sum(((p[row] - 0.1 * step) ** 3).sum() for row in rows)


def test_rows_that_are_absent_stay_and_count_their_own_steps():
    """Each row moves exactly as a parameter of its own would, by torch's Adam at the rates of its steps."""
    p, loss = rows_problem()
    rates = torch.linspace(0.1, 0.01, 9, dtype=torch.float64)
    present = [[0], [0, 1], [1], [0, 1], [0], [1], [0], [0, 1], [1]]
    adam = Adam([AdamGroup([p], rates, by_row=True)])
    for step, rows in enumerate(present):
        adam.zero_grad()
        loss(rows, step).backward()
        adam.step(torch.tensor([step]))
    alone, _ = rows_problem()
    for row in range(3):
        q = nn.Parameter(alone[row].detach().clone())
        optimizer = torch.optim.Adam([q])
        for step, rows in enumerate(present):
            if row in rows:
                optimizer.param_groups[0]["lr"] = rates[step].item()
                optimizer.zero_grad()
                ((q - 0.1 * step) ** 3).sum().backward()
                optimizer.step()
        torch.testing.assert_close(p[row], q, rtol=1e-12, atol=0)
    assert torch.equal(p[2].detach(), alone[2].detach())


@pytest.mark.parametrize("by_row", [False, True])
def test_relative_rates_are_shares_of_where_learning_began(by_row):
    """The first step of Adam is the rate itself, whatever the gradient."""
    p = nn.Parameter(torch.tensor([1e-3, -2.0, 50.0], dtype=torch.float64))
    before = p.detach().clone()
    adam = Adam([AdamGroup([p], torch.tensor([0.01, 0.01]), relative=True, by_row=by_row)])
    (p * torch.tensor([1e3, -5.0, 1e2])).sum().backward()
    adam.step(torch.tensor([0]))
    expected = before - 0.01 * before.abs() * torch.tensor([1.0, -1.0, 1.0])
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


def test_state_is_all_that_later_steps_depend_on():
    """Put back half-way, learning goes on to the same numbers, bit for bit."""

    def run(interrupted):
        p, loss = rows_problem()
        q = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64))

        def made():
            groups = [AdamGroup([p], torch.full((8,), 0.1), True, True), AdamGroup([q], torch.full((8,), 0.05))]
            return Adam(groups)

        adam = made()
        for step in range(8):
            if interrupted and step == 5:
                kept = [tensor.clone() for tensor in adam.state()]
                with torch.no_grad():
                    p.mul_(3)
                    q.zero_()
                adam = made()
                for tensor, value in zip(adam.state(), kept, strict=True):
                    tensor.copy_(value)
            adam.zero_grad()
            (loss([step % 2], step) + (q**2).sum()).backward()
            adam.step(torch.tensor([step]))
        return p.detach(), q.detach()

    for mine, theirs in zip(run(True), run(False), strict=True):
        assert torch.equal(mine, theirs)

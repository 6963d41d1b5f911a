"""What one of several processes has to do, and that together they do all of it."""

import pytest
import torch

from qdiff.calibration.batch_noise import BatchNoise
from qdiff.utils.team import Team


class Member(Team):
    """One of several that never speak."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def members(size):
    return [Member(rank, size) for rank in range(size)]


def test_one_process_alone_does_everything():
    with Team() as team:
        batch, tensor = torch.arange(4), torch.ones(2)
        assert team.is_main and team.local_rows(batch) is batch and team.local_items("abc") == ["a", "b", "c"]
        assert team.gather(team.local_items("abc"), 3) == ["a", "b", "c"]
        team.sum([tensor])
        team.wait()
        assert torch.equal(tensor, torch.ones(2)) and team.broadcast(tensor) is tensor


@pytest.mark.parametrize(("count", "size"), [(6, 2), (7, 3), (2, 3)])
def test_every_piece_of_work_has_one_owner(count, size):
    team = members(size)
    shares = [member.local_rows(torch.arange(count)).tolist() for member in team]
    assert sorted(sum(shares, [])) == list(range(count)) == sorted(sum((m.local_items(range(count)) for m in team), []))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [member.is_main for member in team] == [True] + [False] * (size - 1)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_team_draws_the_numbers_of_one_process(rows):
    """rows: of each sample, as attention heads have them."""
    size, batch = 3, 7
    whole = BatchNoise(torch.Generator().manual_seed(0)).uniform(torch.empty(batch * rows, 2, 5))
    for member in members(size):
        mine = member.local_rows(torch.arange(batch))
        noise = BatchNoise(torch.Generator().manual_seed(0), member, batch)
        found = noise.uniform(torch.empty(len(mine) * rows, 2, 5))
        assert torch.equal(found, whole.view(batch, rows, 2, 5)[mine].flatten(0, 1))

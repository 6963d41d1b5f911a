"""Activation ranges from several batches, for one set per tensor, channel and step group."""

import pytest
import torch

from qdiff.calibration import observers
from qdiff.calibration.observers import RangeObserver, value_rows
from qdiff.nn.quantizers import ActQuantizer
from qdiff.nn.ranges import grid_from_range, make_finder
from qdiff.nn.step_table import StepTable
from qdiff.recipes.recipe import QuantSpec, StepGroups
from qdiff.recipes.stages import RangeSpec

AFFINE8 = QuantSpec(8)
BATCHES = [torch.tensor([[-1.0, 2.0]]), torch.tensor([[-4.0, 1.0]]), torch.tensor([[-2.0, 8.0]])]


@pytest.fixture
def quantizer():
    return ActQuantizer(AFFINE8, StepTable(10, StepGroups()))


def observe(quantizer, batches, spec, generator=None, raw_min=False):
    observer = RangeObserver(spec, generator or torch.Generator().manual_seed(0), raw_min)
    for x in batches:
        observer(quantizer, x)
    observer.finish([("layer.act_quantizer", quantizer)])
    return observer


def grid(low, high, spec=AFFINE8, raw_min=False):
    return grid_from_range(torch.tensor([low]), torch.tensor([high]), spec, raw_min)


def assert_grid(quantizer, low, high, raw_min=False):
    expected = grid(low, high, quantizer.spec, raw_min)
    torch.testing.assert_close(quantizer.scale.data.flatten(), expected.scale)
    torch.testing.assert_close(quantizer.zero_point.flatten(), expected.zero_point)
    assert quantizer.enabled


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        (RangeSpec(aggregate="first"), -1.0, 2.0),
        (RangeSpec(aggregate="all"), -4.0, 8.0),
        (RangeSpec(aggregate="ema", momentum=0.75), -0.75 * (0.75 + 1) - 0.5, 0.75 * (0.75 * 2 + 0.25) + 2),
        (RangeSpec(aggregate="ema", momentum=0.0), -2.0, 8.0),
    ],
    ids=["first", "all", "ema", "last"],
)
def test_ranges_of_batches_become_one(quantizer, spec, low, high):
    """The moving average starts at the first batch: r <- m r + (1 - m) r_batch."""
    observe(quantizer, BATCHES, spec)
    assert_grid(quantizer, low, high)


def test_the_raw_minimum_reaches_the_grid(quantizer):
    observe(quantizer, [torch.tensor([5.0, 6.0])], RangeSpec(), raw_min=True)
    assert_grid(quantizer, 5.0, 6.0, raw_min=True)
    assert quantizer(torch.tensor([5.5])).item() == pytest.approx(1.0)  # collapsed (B1)


def test_a_moving_average_keeps_channels_apart():
    """The published code gives every channel the last one's range (Q4)."""
    quantizer = ActQuantizer(QuantSpec(8, "signed", "in_channel"), StepTable(10, StepGroups()), 3)
    size = torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1)
    batches = [size * k * torch.linspace(-1, 1, 8).view(1, 1, 2, 4) for k in (1.0, 3.0)]
    observe(quantizer, batches, RangeSpec(aggregate="ema", momentum=0.5))
    torch.testing.assert_close(quantizer.scale.data, 2 * torch.tensor([[0.5, 1.0, 2.0]]) / 127)


@pytest.mark.parametrize(
    ("shape", "view", "axis"),
    [((4, 3), (1, 3), -1), ((4, 5, 3), (1, 1, 3), -1), ((4, 3, 5), (1, 3, 1), 1), ((4, 3, 2, 2), (1, 3, 1, 1), 1)],
    ids=["features", "tokens", "sequences", "images"],
)
def test_rows_are_channels_for_a_grid_per_channel(shape, view, axis):
    channel = torch.arange(3.0).view(view).expand(shape)
    per_channel = ActQuantizer(QuantSpec(8, axis="in_channel"), StepTable(10, StepGroups()), 3, axis)
    assert [row.unique().tolist() for row in value_rows(per_channel, channel)] == [[0], [1], [2]]
    assert value_rows(ActQuantizer(AFFINE8, StepTable(10, StepGroups())), channel).shape == (1, channel.numel())


@pytest.mark.parametrize("prefix", ["float", "quantized"])
def test_only_with_a_quantized_prefix_does_a_quantizer_quantize_before_the_end(quantizer, prefix):
    observer = RangeObserver(RangeSpec(prefix=prefix), torch.Generator())
    observer(quantizer, BATCHES[0])
    assert quantizer.enabled == (prefix == "quantized")
    if prefix == "quantized":
        assert_grid(quantizer, -1.0, 2.0)
        observer(quantizer, BATCHES[1])
        assert_grid(quantizer, -4.0, 2.0)


def test_sets_per_step_see_their_own_samples_only():
    table = StepTable(1000, StepGroups(2), torch.tensor([900, 100]))
    quantizer = ActQuantizer(AFFINE8, table)
    observer = RangeObserver(RangeSpec(), torch.Generator())
    with table.at(torch.tensor([900, 100, 900])):
        observer(quantizer, torch.tensor([[-1.0, 1.0], [-10.0, 10.0], [-2.0, 0.5]]))
    observer.finish([("layer", quantizer)])
    expected = [grid(-2.0, 1.0).scale.item(), grid(-10.0, 10.0).scale.item()]
    assert quantizer.scale.tolist() == pytest.approx(expected)


def test_heads_folded_into_the_batch_axis_count_for_their_sample():
    table = StepTable(1000, StepGroups(2), torch.tensor([900, 100]))
    quantizer = ActQuantizer(AFFINE8, table)
    observer = RangeObserver(RangeSpec(), torch.Generator())
    with table.at(torch.tensor([900, 100])):  # two heads each
        observer(quantizer, torch.tensor([[-1.0, 1.0], [-2.0, 1.0], [-10.0, 1.0], [-20.0, 1.0]]))
    observer.finish([("layer", quantizer)])
    expected = [grid(-2.0, 1.0).scale.item(), grid(-20.0, 1.0).scale.item()]
    assert quantizer.scale.tolist() == pytest.approx(expected)


def test_a_set_that_saw_nothing_is_an_error_that_names_it():
    table = StepTable(1000, StepGroups(3), torch.tensor([900, 500, 100]))
    quantizer = ActQuantizer(AFFINE8, table)
    observer = RangeObserver(RangeSpec(), torch.Generator())
    with table.at(torch.tensor([900, 100])):
        observer(quantizer, torch.ones(2, 3))
    with pytest.raises(ValueError, match="conv_in.act_quantizer saw no calibration state in step group 1"):
        observer.finish([("conv_in.act_quantizer", quantizer)])
    with pytest.raises(ValueError, match="conv_out saw no calibration state$"):
        RangeObserver(RangeSpec(), torch.Generator()).finish(
            [("conv_out", ActQuantizer(AFFINE8, StepTable(10, StepGroups())))]
        )


@pytest.mark.parametrize("finder", ["shrink", "theta"])
def test_a_search_over_several_batches_is_one_over_all_their_values(finder):
    spec, generator = QuantSpec(3, "signed"), torch.Generator().manual_seed(5)
    batches = [torch.randn(1, 400, generator=generator) * size for size in (1.0, 2.0, 0.5)]
    quantizer = ActQuantizer(spec, StepTable(10, StepGroups()))
    observe(quantizer, batches, RangeSpec(finder))
    low, high = make_finder(RangeSpec(finder))(torch.cat(batches, 1), spec)
    # What is searched is a sample drawn with repeats, so the search may end a few candidates away.
    assert quantizer.scale.item() == pytest.approx(grid_from_range(low, high, spec).scale.item(), rel=0.15)
    assert quantizer.scale.item() < 0.95 * max(x.abs().max().item() for x in batches) / 3


def test_a_search_never_loses_the_true_ends():
    """To this norm cutting off the outlier costs most; a sample of half the values often misses it."""
    x = torch.cat([torch.linspace(-1, 1, 2**15), torch.tensor([40.0])]).view(1, -1)
    quantizer = ActQuantizer(QuantSpec(8, "signed"), StepTable(10, StepGroups()))
    for seed in range(8):
        observe(quantizer, [x], RangeSpec("percentile", p=4.0), torch.Generator().manual_seed(seed))
        assert quantizer.scale.item() == pytest.approx(40 / 127, rel=1e-4)


def test_the_sample_of_a_search_comes_from_the_stages_generator(monkeypatch):
    monkeypatch.setattr(observers, "SAMPLE", 20)  # so few that another sample gives another range
    quantizer = ActQuantizer(QuantSpec(2, "signed"), StepTable(10, StepGroups()))
    x = torch.randn(1, 2**12, generator=torch.Generator().manual_seed(1))
    scales = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(scales))
        observe(quantizer, [x], RangeSpec("theta"), torch.Generator().manual_seed(seed))
        scales.append(quantizer.scale.item())
    assert scales[0] == scales[1] != scales[2]


def test_a_search_may_look_at_a_sample_and_the_ends(generator):
    """EDA-DM's moving average: of many values some are drawn, but the largest is always among the candidates' ends."""
    x = torch.randn(4, 5000, generator=generator)
    x[2, 7] = 9.0
    whole, part = (ActQuantizer(AFFINE8, StepTable(10, StepGroups())) for _ in range(2))
    looked_at = []

    class Spy(RangeObserver):
        def _thinned(self, values):
            looked_at.append(super()._thinned(values))
            return looked_at[-1]

    spec = RangeSpec("theta", aggregate="ema", momentum=0.9, p=2.4)
    observe(whole, [x], spec)
    observer = Spy(RangeSpec("theta", aggregate="ema", momentum=0.9, p=2.4, sample=2000), generator)
    observer(part, x)
    observer.finish([("layer", part)])
    assert looked_at[0].shape == (1, 2002) and looked_at[0].max() == 9 and looked_at[0].min() == x.min()
    assert part.scale.item() == pytest.approx(whole.scale.item(), rel=0.1)


def test_groups_that_no_timestep_reaches_need_no_state():
    """A sampler that visits its last timestep twice may leave a group without one."""
    steps = StepTable(10, StepGroups(4), torch.tensor([9, 5, 1, 1]))
    assert steps.count == 4 and steps.reachable() == [0, 1, 2]
    quantizer = ActQuantizer(AFFINE8, steps)
    with steps.at(torch.tensor([9, 5, 1])):
        observe(quantizer, [torch.tensor([[1.0], [2.0], [4.0]])], RangeSpec())
    assert quantizer.scale[:3].tolist() == pytest.approx([1 / 255, 2 / 255, 4 / 255])

"""Range finders against plain loops, the grids they end in, and the published faults that are kept as options."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import qdiff.nn.ranges
from qdiff.nn.ranges import FINDERS, MinMax, Percentile, ShrinkSearch, ThetaSearch, grid_from_range, make_finder
from qdiff.recipes.recipe import KINDS, QuantSpec
from qdiff.recipes.stages import RangeSpec

AFFINE8, MID8 = QuantSpec(8, "affine"), QuantSpec(8, "unsigned_mid")


def rows(*ends):
    """Values [len(ends), 500] spread over (low, high) each, in float64 so that no two candidates tie by rounding."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(len(ends), 500, dtype=torch.float64, generator=generator)
    values = (values - values.amin(1, True)) / (values.amax(1, True) - values.amin(1, True))
    low, high = torch.tensor(ends, dtype=torch.float64).T
    return low[:, None] + values * (high - low)[:, None]


MIXED = rows((-1, 2), (-3, 1), (0.5, 4), (-2, -1), (0, 1), (-1, 0))


def snapped(values, finder, spec):
    """Every row on its grid."""
    return grid_from_range(*finder(values, spec), spec).view(-1, 1).snap(values)


# Grids


@pytest.mark.parametrize("bits", [4, 8])
def test_unsigned_mid_has_its_zero_in_the_middle(bits):
    grid = grid_from_range(torch.tensor([-1.0]), torch.tensor([0.5]), QuantSpec(bits, "unsigned_mid"))
    assert grid.zero_point.item() == {8: 128, 4: 8}[bits]
    assert grid.scale.item() == pytest.approx(2 / (2**bits - 1))


def test_unsigned_mid_represents_slightly_less_above_than_below():
    """Methods §2.1: at 8 bits and theta = 1 the ends are -1.0039 and 0.9961."""
    grid = grid_from_range(torch.tensor([-1.0]), torch.tensor([1.0]), MID8)
    ends = grid.values(torch.tensor([0.0, 255.0]))
    assert ends.tolist() == pytest.approx([-1.0039, 0.9961], abs=1e-4)


@pytest.mark.parametrize(
    ("low", "high", "zero", "ends"),
    [(0.0, 2.0, 0, [0, 2]), (0.5, 2.0, 0, [0, 2]), (-2.0, 0.0, 255, [-2, 0]), (-2.0, -1.0, 255, [-2, 0])],
    ids=["from-zero", "positive", "to-zero", "negative"],
)
def test_unsigned_mid_is_one_sided_for_one_sided_data(low, high, zero, ends):
    grid = grid_from_range(torch.tensor([low]), torch.tensor([high]), MID8)
    assert grid.zero_point.item() == zero
    assert grid.values(torch.tensor([0.0, 255.0])).tolist() == pytest.approx(ends, abs=1e-6)


def test_unsigned_mid_chooses_its_side_for_the_whole_tensor():
    grid = grid_from_range(torch.tensor([0.0, -1.0]), torch.tensor([2.0, 1.0]), MID8)
    assert grid.zero_point.tolist() == [128, 128]


@given(st.floats(-100, 100), st.floats(0, 100), st.sampled_from(KINDS), st.integers(2, 8))
def test_the_ends_of_the_range_are_within_half_a_step_of_the_grid(low, width, kind, bits):
    spec = QuantSpec(bits, kind)
    ends = torch.tensor([low, low + width], dtype=torch.float64)
    if kind == "unsigned":
        ends = ends.abs().sort().values
    grid = grid_from_range(ends[:1], ends[1:], spec)
    scale, zero = grid.scale, grid.zero_point
    assert scale.isfinite().all() and (scale > 0).all() and torch.equal(zero, zero.round())
    assert ((grid.snap(ends) - ends).abs() <= 0.5 * scale * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    "finder", [MinMax(), ShrinkSearch(), ThetaSearch(), Percentile()], ids=lambda f: type(f).__name__
)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_get_a_finite_grid_that_keeps_them(finder, kind):
    spec = QuantSpec(4, kind)
    values = torch.cat([torch.zeros(1, 40), torch.linspace(-1, 1, 40)[None]])
    low, high = finder(values, spec)
    grid = grid_from_range(low, high, spec)
    assert grid.scale.isfinite().all() and (grid.scale > 0).all()
    assert torch.equal(grid.view(-1, 1).snap(values)[0], values[0])


# Published faults (methods §1.7)


def test_b1_strictly_positive_data_collapse_under_the_raw_minimum_and_not_without():
    x = rows((5, 6))
    width = float(x.max() - x.min())
    low, high = MinMax()(x, AFFINE8)
    collapsed = grid_from_range(low, high, AFFINE8, raw_min=True).snap(x)
    assert collapsed.max().item() <= width + 1e-9  # every value of 5 ... 6 comes out as the width of the range
    kept = grid_from_range(low, high, AFFINE8).snap(x)
    assert (kept - x).abs().max() <= 0.5 * high.item() / 255 * (1 + 1e-9)


def test_b1_changes_nothing_for_data_on_both_sides_of_zero():
    low, high = MinMax()(rows((-1, 2), (-3, 0.5)), AFFINE8)
    grid, raw = (grid_from_range(low, high, AFFINE8, raw_min=raw_min) for raw_min in (False, True))
    assert torch.equal(grid.scale, raw.scale) and torch.equal(grid.zero_point, raw.zero_point)


def test_b1_spares_strictly_negative_data():
    """Their zero point is not held within the codes: z = round(-min / scale), scale = (max - min) / 255."""
    x = rows((-6, -5))
    grid = grid_from_range(*MinMax()(x, AFFINE8), AFFINE8, raw_min=True)
    assert grid.zero_point.item() == round(6 * 255)
    assert (grid.snap(x) - x).abs().max() <= 0.5 / 255 * (1 + 1e-9)


@pytest.mark.parametrize("finder", [ShrinkSearch(), ThetaSearch(), Percentile()], ids=lambda f: type(f).__name__)
def test_b2_signed_grids_work_with_searches(finder):
    """The published search gives 0.54 here; uniform noise of one step gives (2 * 4.3 / 255)^2 / 12 = 9.5e-5."""
    x = torch.randn(1, 2**16, generator=torch.Generator().manual_seed(0))
    error = (snapped(x, finder, QuantSpec(8, "signed")) - x).square().mean().item()
    assert 5e-5 < error < 1.2e-4


# Searches against plain loops


def plain_grid(low, high, spec, sided):
    """One row's (scale, zero point), by the formulas of methods §1.1 and §2.1; sided: -1, 0 or 1."""
    levels = 2**spec.bits - 1
    theta = max(abs(low), abs(high))
    if spec.kind == "affine":
        scale = (max(high, 0) - min(low, 0)) / levels
        return scale, round(-min(low, 0) / scale)
    if spec.kind == "signed":
        return theta / (2 ** (spec.bits - 1) - 1), 0
    if spec.kind == "unsigned":
        return high / levels, 0
    return (2 * theta / levels, 2 ** (spec.bits - 1)) if sided == 0 else (theta / levels, 0 if sided > 0 else levels)


def plain_search(values, candidates, spec, p):
    """values [R, K]; candidates: row -> list of (low, high). Returns [(scale, zero)] with the least error."""
    sided = 1 if (values >= 0).all() else -1 if (values <= 0).all() else 0
    best = []
    for row in values:
        scored = []
        for low, high in candidates(row):
            scale, zero = plain_grid(low, high, spec, sided)
            if scale <= 0:
                continue
            codes = [min(max(round(v / scale) + zero, spec.qmin), spec.qmax) for v in row.tolist()]
            errors = [abs((c - zero) * scale - v) ** p for c, v in zip(codes, row.tolist(), strict=True)]
            scored.append((sum(errors) / len(errors), scale, zero))
        best.append(min(scored)[1:])
    return best


def shrunk(count):
    return lambda row: [((1 - 0.01 * i) * row.min().item(), (1 - 0.01 * i) * row.max().item()) for i in range(count)]


def thetas(values, count):
    low, high = -1.0 if (values < 0).any() else 0.0, 1.0 if (values > 0).any() else 0.0

    def candidates(row):
        ends = [row.abs().max().item() * i / count for i in range(1, count + 1)]
        return [(low * theta, high * theta) for theta in ends]

    return candidates


def tails(shares):
    def candidates(row):
        ordered, last = row.sort().values.tolist(), len(row) - 1
        return [(ordered[round((1 - s) * last)], ordered[round(s * last)]) for s in shares]

    return candidates


SIGNED3, AFFINE3, MID3, UNSIGNED3 = (QuantSpec(3, k) for k in ("signed", "affine", "unsigned_mid", "unsigned"))
POSITIVE = rows((0, 1), (0.5, 4))


@pytest.mark.parametrize(
    ("finder", "values", "candidates", "spec"),
    [
        (ShrinkSearch(80, 2.4), MIXED[:, :40], shrunk(80), AFFINE3),
        (ShrinkSearch(80, 2.4), MIXED[:, :40], shrunk(80), SIGNED3),
        (ShrinkSearch(30, 1.0), MIXED[:, :40], shrunk(30), MID3),
        (ShrinkSearch(80, 2.4), POSITIVE[:, :40], shrunk(80), UNSIGNED3),
        (ThetaSearch(100, 2.4), MIXED[:, :40], thetas(MIXED, 100), MID3),
        (ThetaSearch(100, 2.4), POSITIVE[:, :40], thetas(POSITIVE, 100), MID3),
        (ThetaSearch(100, 2.4), -POSITIVE[:, :40], thetas(-POSITIVE, 100), MID3),
        (ThetaSearch(20, 2.0), MIXED[:, :40], thetas(MIXED, 20), SIGNED3),
        (Percentile((0.9, 0.95, 1.0), 2.0), MIXED, tails((0.9, 0.95, 1.0)), AFFINE3),
        (Percentile((0.9, 0.95, 1.0), 2.0), MIXED, tails((0.9, 0.95, 1.0)), MID3),
    ],
    ids=["shrink-affine", "shrink-signed", "shrink-mid", "shrink-unsigned", "theta-mid", "theta-positive"]
    + ["theta-negative", "theta-signed", "percentile-affine", "percentile-mid"],
)
def test_search_is_the_plain_loop_over_rows_and_candidates(finder, values, candidates, spec):
    grid = grid_from_range(*finder(values, spec), spec)
    expected = torch.tensor(plain_search(values, candidates, spec, finder.p), dtype=torch.float64)
    torch.testing.assert_close(torch.stack([grid.scale, grid.zero_point], 1), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk", [1, 700, 4000], ids=lambda c: f"chunk{c}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("finder", [ShrinkSearch(), ThetaSearch(), Percentile()], ids=lambda f: type(f).__name__)
def test_the_size_of_chunks_does_not_change_a_search(monkeypatch, finder, kind, chunk):
    spec = QuantSpec(3, kind)
    whole = finder(MIXED, spec)
    monkeypatch.setattr(qdiff.nn.ranges, "CHUNK", chunk)
    for mine, expected in zip(finder(MIXED, spec), whole, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("bits", [2, 4, 8], ids=lambda b: f"b{b}")
@pytest.mark.parametrize(
    ("finder", "kind"),
    [(ShrinkSearch(), kind) for kind in KINDS]
    + [(Percentile(), kind) for kind in KINDS]
    + [(ThetaSearch(), kind) for kind in ("signed", "unsigned_mid")],  # the others' min-max is not symmetric
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_a_search_is_at_least_as_good_as_minimum_and_maximum_under_its_norm(finder, kind, bits):
    spec = QuantSpec(bits, kind)

    def errors(by):
        return (snapped(MIXED, by, spec) - MIXED).abs().pow(finder.p).mean(1)

    assert (errors(finder) <= errors(MinMax()) * (1 + 1e-12)).all()


def test_a_search_finds_less_than_the_whole_range_for_few_bits():
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    assert ShrinkSearch()(x, SIGNED3)[1] < 0.8 * MinMax()(x, SIGNED3)[1]


# Descriptions of finders


@pytest.mark.parametrize("name", FINDERS)
def test_every_finder_can_be_made_from_its_description(name):
    finder = make_finder(RangeSpec(name))
    assert isinstance(finder, FINDERS[name])
    assert finder == FINDERS[name]()  # what is left out is the finder's own


def test_candidates_and_norm_reach_the_finder():
    assert make_finder(RangeSpec("shrink", 30, 2.0)) == ShrinkSearch(30, 2.0)
    assert make_finder(RangeSpec("theta", 50, 2.0)) == ThetaSearch(50, 2.0)
    assert make_finder(RangeSpec("percentile", p=3.0)) == Percentile(p=3.0)


def test_a_shrink_search_refuses_candidates_that_would_shrink_below_nothing():
    with pytest.raises(ValueError, match="1 to 100 candidates, found 101"):
        make_finder(RangeSpec("shrink", 101))


def test_codes_of_a_searched_grid_fill_it():
    x = rows((-1, 1))
    grid = grid_from_range(*ShrinkSearch()(x, SIGNED3), SIGNED3)
    assert grid.codes(x).unique().numel() >= 7

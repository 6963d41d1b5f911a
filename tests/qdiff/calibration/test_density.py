"""How many states each step gives: arithmetic worked by hand, and features of real networks."""

from contextlib import ExitStack

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from qdiff.calibration import density
from qdiff.utils.seeds import generator_of

# Four steps, one sample, two channels, one position: lengths 5, 5, 10, 5.
VECTORS = torch.tensor([[3.0, 4.0], [4.0, 3.0], [6.0, 8.0], [0.0, -5.0]])
MAPS = [VECTORS.view(4, 2, 1, 1)]
# Mean squared differences, |F_i - F_j|^2 / 2: (1 + 1) / 2 = 1 and so on.
DISTANCES = torch.tensor(
    [[0.0, 1.0, 12.5, 45.0], [1.0, 0.0, 14.5, 40.0], [12.5, 14.5, 0.0, 102.5], [45.0, 40.0, 102.5, 0.0]]
).double()
# 1 - cos: step 2 points where step 0 does; cos 01 = (12 + 12) / 25, cos 03 = -20 / 25, cos 13 = -15 / 25.
ANGLES = torch.tensor(
    [[0.0, 0.04, 0.0, 1.8], [0.04, 0.0, 0.04, 1.6], [0.0, 0.04, 0.0, 1.8], [1.8, 1.6, 1.8, 0.0]],
    dtype=torch.float64,
)
weights_of_steps = st.lists(st.floats(0, 10), min_size=1, max_size=40).filter(lambda w: sum(w) > 1e-3)


def random_maps(samples=3, steps=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, steps, 4, 3, 2, generator=generator, dtype=torch.float64) + 2


def test_distances_and_angles_worked_by_hand():
    distances, angles = density.dissimilarities(MAPS)
    torch.testing.assert_close(distances, DISTANCES, rtol=0, atol=1e-12)
    torch.testing.assert_close(angles, ANGLES, rtol=0, atol=1e-12)


def test_the_gram_form_is_the_direct_computation():
    maps = random_maps()  # [N, S, C, H, W]
    distances, angles = density.dissimilarities(maps)
    first, second = maps[:, :, None], maps[:, None]
    torch.testing.assert_close(distances, (first - second).square().mean((0, 3, 4, 5)))
    cosine = torch.nn.functional.cosine_similarity(first, second, dim=3)
    torch.testing.assert_close(angles, (1 - cosine).sum((0, 3, 4)))


def test_float32_features_are_compared_in_float64():
    """The steps differ in the last bits of numbers about 4096, whose squares float32 cannot tell apart."""
    maps = 4096 + VECTORS.view(1, 4, 2, 1, 1) / 1024
    distances, _ = density.dissimilarities(maps)
    torch.testing.assert_close(distances, DISTANCES / 1024**2, rtol=1e-12, atol=0)


def test_steps_that_hardly_differ_keep_their_distances():
    """A millionth of the features' size: a Gram matrix of the features themselves would lose 12 digits."""
    maps = 1000 * random_maps(steps=1) + 1e-3 * random_maps()
    distances, angles = density.dissimilarities(maps)
    direct = (maps[:, :, None] - maps[:, None]).square().mean((0, 3, 4, 5))
    torch.testing.assert_close(distances, direct, rtol=1e-10, atol=0)
    assert torch.equal(distances, distances.T) and torch.equal(angles, angles.T)


def test_a_vanishing_vector_has_cosine_0_with_all():
    maps = VECTORS.double().clone()
    maps[1:3] = 0
    _, angles = density.dissimilarities(maps.view(1, 4, 2, 1, 1))
    assert angles[0].tolist() == [0, 1, 1, pytest.approx(1.8)] and angles[1, 2] == 1


def test_density_counts_neighbours_within_the_radius():
    assert density.density(DISTANCES, 13.0).tolist() == [2, 1, 1, 0]  # pairs 01, 02
    assert density.density(DISTANCES, 12.5).tolist() == [2, 1, 1, 0]  # the radius itself is within
    assert density.density(DISTANCES, 0.5).tolist() == [0, 0, 0, 0]
    assert density.density(DISTANCES, 1000.0).tolist() == [3, 3, 3, 3]


def test_without_a_radius_half_of_the_pairs_are_near_whatever_the_scale():
    """Distances 1, 12.5, 14.5 of the six pairs are near: 01, 02, 12."""
    for distances in (DISTANCES, 1e-6 * DISTANCES, 1e6 * DISTANCES, DISTANCES.square()):
        assert density.density(distances).tolist() == [2, 2, 2, 0]


def test_variety_sums_the_angles_to_all_others():
    torch.testing.assert_close(density.variety(ANGLES), torch.tensor([1.84, 1.68, 1.84, 5.2]).double())


def test_weights_and_counts_worked_by_hand():
    """D = (2, 1, 1, 0) becomes (1, 1/2, 1/2, 0). V = (1.84, 1.68, 1.84, 5.2), minus 1.68 and over 3.52, becomes
    (1/22, 0, 1/22, 1). With factor 2.2, w = (1.1, 0.5, 0.6, 2.2), in sum 4.4."""
    weights = density.step_weights(DISTANCES, ANGLES, 13.0, 2.2)
    torch.testing.assert_close(weights, torch.tensor([1.1, 0.5, 0.6, 2.2]).double())
    # 10 w / 4.4 = (2.5, 1.14, 1.36, 5): 9 whole ones, and one for the first step's half.
    assert density.counts(weights, 10).tolist() == [3, 1, 1, 5]
    # 20 w / 4.4 = (5, 2.27, 2.73, 10): nothing to correct.
    assert density.counts(weights, 20).tolist() == density.released_counts(weights, 20).tolist() == [5, 2, 3, 10]


def test_equal_values_normalise_to_0():
    assert density.normalised(torch.tensor([3.0, 3.0])).tolist() == [0, 0]
    assert density.normalised(torch.tensor([0.1 + 0.2, 0.3], dtype=torch.float64)).tolist() == [
        0,
        0,
    ]  # equal but for rounding
    assert density.normalised(torch.tensor([5.0, 1.0, 2.0])).tolist() == [1, 0, 0.25]


@pytest.mark.parametrize("steps", [1, 2, 6], ids="{}-steps".format)
def test_equal_features_give_every_step_the_same(steps):
    maps = random_maps(steps=1).float().expand(-1, steps, -1, -1, -1) / 3
    weights = density.step_weights(*density.dissimilarities(maps))
    assert weights.tolist() == [1] * steps
    assert density.counts(weights, 3 * steps).tolist() == [3] * steps


def test_two_different_steps_are_worth_the_same():
    """All of D and V is symmetric in them: a weight of 0 for one would be rounding."""
    weights = density.step_weights(*density.dissimilarities(random_maps(steps=2)))
    assert weights.tolist() == [1, 1]


def test_features_that_are_not_finite_are_refused():
    maps = random_maps()
    maps[1, 2, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="density_variety: expected finite features"):
        density.dissimilarities(maps)


@given(weights_of_steps, st.integers(1, 3000))
def test_counts_are_proportional_and_sum_exactly(weights, n):
    weights = torch.tensor(weights, dtype=torch.float64)
    found, shares = density.counts(weights, n), n * weights / weights.sum()
    assert found.sum() == n and found.min() >= 0
    assert ((found - shares).abs() < 1 + 1e-9).all()


@given(weights_of_steps, st.integers(1, 3000))
def test_released_counts_sum_too(weights, n):
    """Rounding to the nearest is over by at most one for every second step that has any, so one pass is enough."""
    weights = torch.tensor(weights, dtype=torch.float64)
    found, shares = density.released_counts(weights, n), n * weights / weights.sum()
    assert found.sum() == n and found.min() >= 0
    assert ((found - shares).abs() <= 1.5 + 1e-9).all()


def test_ties_go_to_the_earlier_step():
    assert density.counts(torch.tensor([1.0, 1.0, 1.0]), 5).tolist() == [2, 2, 1]
    # Shares 1.6, 2.6 and 0.8: one of the two left over goes to the third, the other to the first of the equal ones.
    assert density.counts(torch.tensor([16.0, 26.0, 8.0]).double(), 5).tolist() == [2, 2, 1]
    # Shares 1.4, 0.4 and 1.2, where 1.4 - 1 is computed as less than 0.4.
    assert density.counts(torch.tensor([7.0, 2.0, 6.0]).double(), 3).tolist() == [2, 0, 1]
    assert density.counts(torch.ones(100).double(), 130).tolist() == [2] * 30 + [1] * 70
    assert density.corrected(torch.ones(100).long(), 130).tolist() == [2] * 30 + [1] * 70


@pytest.mark.parametrize(
    ("weights", "n", "released", "fixed"),
    [
        # shares 2.6, 1.6, 0.8: rounded 3, 2, 1, one too many, which the last step gives
        ([26, 16, 8], 5, [3, 2, 0], [3, 1, 1]),
        # shares 1.6, 0.6, 0.6, 0.2, 0: rounded 2, 1, 1, 0, 0, one too many, and the last ones have none
        ([8, 3, 3, 1, 0], 3, [2, 1, 0, 0, 0], [2, 1, 0, 0, 0]),
        # shares 1.4, 2.4, 1.2: rounded 1, 2, 1, one too few, which the largest gets
        ([14, 24, 12], 5, [1, 3, 1], [2, 2, 1]),
        # shares 0.4, five times: rounded 0, two too few
        ([1, 1, 1, 1, 1], 2, [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]),
    ],
    ids=["over", "over-with-zeros", "short", "short-by-two"],
)
def test_released_corrections_worked_by_hand(weights, n, released, fixed):
    weights = torch.tensor(weights, dtype=torch.float64)
    assert density.released_counts(weights, n).tolist() == released
    assert density.counts(weights, n).tolist() == fixed


def test_corrections_are_one_pass():
    assert density.corrected(torch.tensor([2, 0, 3, 1]), 4).tolist() == [2, 0, 2, 0]
    assert density.corrected(torch.tensor([2, 0, 3, 1]), 6).tolist() == [2, 0, 3, 1]
    with pytest.raises(ValueError, match="backward_counts: expected 2 states after one pass .* found 3"):
        density.corrected(torch.tensor([2, 0, 3, 1]), 2)
    with pytest.raises(ValueError, match="backward_counts: expected 9 states after one pass .* found 7"):
        density.corrected(torch.tensor([2, 3]), 9)


def test_corrections_leave_what_they_are_given():
    rounded = torch.tensor([2, 0, 3, 1])
    density.corrected(rounded, 4)
    assert rounded.tolist() == [2, 0, 3, 1]


def test_steps_are_dealt_out_as_often_as_counted_and_in_random_order():
    numbers = torch.tensor([30, 0, 50, 20])
    steps = density.assigned_steps(numbers, generator_of(0, 1))
    assert steps.bincount(minlength=4).tolist() == numbers.tolist()
    assert not torch.equal(steps, steps.sort().values)
    assert torch.equal(steps, density.assigned_steps(numbers, generator_of(0, 1)))
    assert not torch.equal(steps, density.assigned_steps(numbers, generator_of(1, 1)))


def seen_by(network, module, *inputs):
    """What `module` is called with in a whole forward of the network."""
    seen = []
    with ExitStack() as stack, torch.no_grad():
        stack.callback(module.register_forward_pre_hook(lambda _, args: seen.append(args[0])).remove)
        network(*inputs)
    (found,) = seen
    return found


def test_the_map_is_what_enters_a_pixel_models_middle_attention(wide_network, adapter, states):
    found = density.middle_map(wide_network, adapter, states.x, states.t)
    assert torch.equal(found, seen_by(wide_network, wide_network.mid.attn_1, states.x, states.t))
    later = density.middle_map(wide_network, adapter, states.x, states.t - 50)
    assert not torch.allclose(found, later)


@pytest.mark.parametrize("form", ["plain", "transformer", "deep", "labels"])
def test_the_map_is_what_enters_a_latent_models_middle_attention(form, make_latent, latent_adapter, latent_states):
    network, data = make_latent(form), latent_states(form)
    middle = network.middle_block[1]
    # The chain runs the parts of a spatial transformer, of which the norm is the first.
    entry = middle.norm if hasattr(middle, "transformer_blocks") else middle
    found = density.middle_map(network, latent_adapter, data.x, data.t, data.context)
    seen = seen_by(network, entry, data.x, data.t, data.context)
    assert found.dim() == 4 and torch.equal(found.flatten(), seen.flatten())  # a plain attention gets tokens


def test_nothing_behind_the_map_is_run(network, adapter, states):
    ran = []
    for name, module in network.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    density.middle_map(network, adapter, states.x[:2], states.t[:2])
    assert "mid.block_1" in ran and not [name for name in ran if name.startswith(("mid.attn", "mid.block_2", "up"))]

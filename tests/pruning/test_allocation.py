import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning.allocation import equal_marginal_error, linear_over_depth, uniform

sizes_of_blocks = st.lists(st.integers(1, 10**9), min_size=1, max_size=40)


def total(sparsities, sizes):
    return sum(s * n for s, n in zip(sparsities, sizes, strict=True)) / sum(sizes)


@given(st.floats(0.01, 0.99), sizes_of_blocks, st.floats(-1, 1))
def test_linear_keeps_the_total_and_stays_inside_the_range(sparsity, sizes, spread):
    result = linear_over_depth(sparsity, sizes, spread)
    # Forty float64 additions.
    assert total(result, sizes) == pytest.approx(sparsity, rel=1e-12)
    assert all(0 < value < 1 for value in result)
    steps = [b - a for a, b in itertools.pairwise(result)]
    assert all(step * spread <= 0 for step in steps)


def test_linear_over_equal_blocks_is_the_mean_plus_and_less_the_spread():
    assert linear_over_depth(0.75, [5] * 5, 0.1) == pytest.approx([0.85, 0.8, 0.75, 0.7, 0.65])
    assert linear_over_depth(0.75, [5] * 5, -0.1) == pytest.approx([0.65, 0.7, 0.75, 0.8, 0.85])


def test_linear_cuts_the_spread_near_the_ends():
    assert linear_over_depth(0.9, [1, 1], 0.3) == pytest.approx([0.95, 0.85])


def test_uniform_is_the_sparsity_itself():
    assert uniform(0.6, [1, 2, 3]) == [0.6, 0.6, 0.6]


@given(st.data())
def test_error_keeps_the_total_within_the_levels(data):
    levels = sorted(data.draw(st.sets(st.integers(1, 99), min_size=2, max_size=6)))
    levels = [level / 100 for level in levels]
    sizes = data.draw(sizes_of_blocks)
    sparsity = data.draw(st.floats(levels[0], levels[-1]))
    curve = st.lists(st.floats(0, 1e6), min_size=len(levels), max_size=len(levels))
    errors = [data.draw(curve) for _ in sizes]
    result = equal_marginal_error(sparsity, sizes, [levels] * len(sizes), errors)
    assert total(result, sizes) == pytest.approx(sparsity, rel=1e-9)
    assert all(levels[0] <= value <= levels[-1] + 1e-12 for value in result)


def interpolated(sparsity, levels, curve):
    for (a, fa), (b, fb) in itertools.pairwise(zip(levels, curve, strict=True)):
        if a <= sparsity <= b:
            return fa + (fb - fa) * (sparsity - a) / (b - a)
    raise AssertionError(sparsity)


@given(st.lists(st.lists(st.floats(0.01, 10), min_size=4, max_size=4), min_size=2, max_size=3))
def test_error_finds_the_least_sum_of_convex_curves(increments):
    levels = [0.3, 0.45, 0.6, 0.75, 0.9]
    errors = [[0.0, *itertools.accumulate(sorted(parts))] for parts in increments]
    errors = [list(itertools.accumulate(curve)) for curve in errors]
    sizes = [7] * len(errors)
    found = equal_marginal_error(0.6, sizes, [levels] * len(sizes), errors)
    cost = sum(interpolated(s, levels, curve) for s, curve in zip(found, errors, strict=True))
    # With equal blocks some optimum of this piecewise linear problem lies on levels; try all of them.
    wanted = 0.6 * len(errors)
    choices = itertools.product(range(len(levels)), repeat=len(errors))
    best = min(
        sum(errors[block][level] for block, level in enumerate(choice))
        for choice in choices
        if abs(sum(levels[level] for level in choice) - wanted) < 1e-9
    )
    assert cost == pytest.approx(best, rel=1e-9)


def test_error_with_levels_of_their_own_for_each_block():
    # A small block reaches further: the same numbers of weights are other shares of it.
    result = equal_marginal_error(0.5, [1, 4], [[0.1, 0.5, 0.9], [0.4, 0.5, 0.6]], [[0, 1, 3], [0, 2, 6]])
    assert result == pytest.approx([0.9, 0.4])


def test_error_of_equal_curves_is_uniform_where_they_are_strictly_convex():
    levels = [0.5, 0.6, 0.7, 0.8]
    assert equal_marginal_error(0.6, [3, 3], [levels] * 2, [[1, 2, 4, 8]] * 2) == pytest.approx([0.6, 0.6])


@given(sizes_of_blocks)
def test_error_spares_the_block_that_suffers_more(sizes):
    assume(len(sizes) >= 2)
    # The last block's curve per weight is twice as steep.
    errors = [[0.0, size * 1.0, size * 3.0] for size in sizes]
    errors[-1] = [2 * value for value in errors[-1]]
    result = equal_marginal_error(0.5, sizes, [[0.25, 0.5, 0.75]] * len(sizes), errors)
    assert result[-1] <= min(result[:-1]) + 1e-9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform(1.0, [1]), r"sparsity 1 is outside \(0, 1\)"),
        (lambda: linear_over_depth(0.5, [], 0.1), "block sizes are"),
        (lambda: linear_over_depth(0.5, [3, 0], 0.1), r"block sizes are \[3, 0\]"),
        (lambda: equal_marginal_error(0.5, [1], [[0.5]], [[1.0]]), "at least two ascending"),
        (lambda: equal_marginal_error(0.9, [1], [[0.5, 0.6]], [[1.0, 2.0]]), "sparsity 0.9 is outside what"),
        (lambda: equal_marginal_error(0.3, [1], [[0.5, 0.6]], [[1.0, 2.0]]), "sparsity 0.3 is outside what"),
        (lambda: equal_marginal_error(0.5, [1, 1], [[0.4, 0.6]] * 2, [[1.0, 2.0]]), "1 of errors for 2 blocks"),
        (lambda: equal_marginal_error(0.5, [1], [[0.4, 0.6]], [[1.0]]), "2 levels and 1 errors"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning.level_grid import LEVELS_ASIDE, LevelGrid


def total(values, sizes):
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


@given(st.floats(0.02, 0.98), st.lists(st.integers(10**3, 10**9), min_size=2, max_size=20), st.integers(0, 10**6))
def test_every_candidate_of_the_space_has_the_total(sparsity, sizes, seed):
    grid = LevelGrid.around(sparsity, sizes)
    generator = random.Random(seed)
    levels = [generator.randrange(len(levels)) for levels in grid.sparsities]
    candidate = grid.space.fit(levels, generator)
    # With blocks of very different sizes there may be no way; the uniform one is always there.
    for each in [grid.uniform] + [candidate] * (candidate is not None):
        assert grid.space.admits(each)
        assert total(grid.values(each), sizes) == pytest.approx(sparsity, rel=1e-9)
        assert all(0 < value < 1 for value in grid.values(each))
    assert grid.values(grid.uniform) == pytest.approx([sparsity] * len(sizes))


def test_levels_of_equal_blocks():
    grid = LevelGrid.around(0.75, [100] * 3)
    expected = [0.875, 0.85, 0.825, 0.8, 0.775, 0.75, 0.725, 0.7, 0.675, 0.65, 0.625]
    assert all(levels == pytest.approx(expected) for levels in grid.sparsities)
    # Half the distance to 1 at most.
    assert max(LevelGrid.around(0.9, [100] * 3).sparsities[0]) == pytest.approx(0.95)


def test_a_level_is_the_same_number_of_weights_in_every_block():
    grid = LevelGrid.around(0.5, [100, 200, 300])
    weights = [
        {round((a - b) * size, 9) for a, b in itertools.pairwise(levels)}
        for levels, size in zip(grid.sparsities, grid.sizes, strict=True)
    ]
    assert weights == [{0.025 * 200}] * 3


def test_a_small_block_has_fewer_levels_and_all_below_one():
    grid = LevelGrid.around(0.9, [10, 1000, 1000])
    assert 1 < len(grid.sparsities[0]) < 2 * LEVELS_ASIDE + 1 == len(grid.sparsities[1])
    assert grid.values(grid.uniform) == pytest.approx([0.9] * 3)


def test_the_nearest_candidate_of_an_allocation():
    grid = LevelGrid.around(0.75, [100] * 3)
    assert grid.values(grid.nearest([0.8, 0.75, 0.7], 0)) == pytest.approx([0.8, 0.75, 0.7])
    near = grid.nearest([0.812, 0.764, 0.674], 0)
    assert grid.space.admits(near)
    assert grid.values(near) == pytest.approx([0.812, 0.764, 0.674], abs=0.04)


def test_one_block_leaves_nothing_to_allocate():
    with pytest.raises(UsageError, match="1 decoder block has targets, so there is nothing to allocate"):
        LevelGrid.around(0.5, [100])

import itertools

import pytest

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning.unit_budget import (
    GroupLevels,
    cheapest_in_error,
    drop_dominated,
    space_of,
    uniform_candidate,
)


def group(*errors, cost=10.0):
    """Widths 8, 16, …; errors from the smallest width to none at the last."""
    widths = tuple(8 * (level + 1) for level in range(len(errors)))
    return GroupLevels(widths, errors, tuple(width * cost for width in widths))


GROUPS = [group(9.0, 4.0, 1.0, 0.0), group(3.0, 2.0, 1.0, 0.0, cost=20.0), group(40.0, 20.0, 10.0, 0.0)]


def test_widths_that_cost_as_much_as_a_larger_one_are_left_out():
    timed = GroupLevels((8, 16, 24, 32), (3.0, 2.0, 1.0, 0.0), (5.0, 7.5, 7.0, 8.0))
    assert drop_dominated(timed) == GroupLevels((8, 24, 32), (3.0, 1.0, 0.0), (5.0, 7.0, 8.0))
    level = GroupLevels((8, 16), (1.0, 0.0), (5.0, 5.0))
    assert drop_dominated(level) == GroupLevels((16,), (0.0,), (5.0,))


@pytest.mark.parametrize("budget", [500.0, 700.0, 900.0, 1280.0])
def test_starts_fit_the_budget(budget):
    space = space_of(GROUPS, budget + 1000.0, 1000.0, 2280.0, "parameters")
    for candidate in (uniform_candidate(space, GROUPS, 0), cheapest_in_error(space, GROUPS, 0)):
        assert space.admits(candidate)
        # Nothing more fits.
        raises = [
            costs[level + 1] - costs[level] for costs, level in zip(space.costs, candidate, strict=True) if level < 3
        ]
        assert all(space.cost(candidate) + rise > budget for rise in raises)


def test_where_a_unit_of_cost_adds_least_to_the_error_units_go_first():
    """Curves that bend upward: the greedy choice is the best of all candidates."""
    budget = 1280.0 - 80.0 * 3
    space = space_of(GROUPS, budget, 0.0, 1280.0, "parameters")

    def error(candidate):
        return sum(each.errors[level] for each, level in zip(GROUPS, candidate, strict=True))

    best = min((c for c in itertools.product(range(4), repeat=3) if space.admits(c)), key=error)
    assert error(cheapest_in_error(space, GROUPS, 0)) == error(best)


def test_a_budget_out_of_reach_says_what_is_possible():
    with pytest.raises(
        UsageError, match=r"budget of 4x of latency is out of reach: with the smallest widths it is 1\.73x;"
    ):
        space_of(GROUPS, 570.0, 1000.0, 2280.0, "latency")

"""Widths of unit groups under a budget: what they cost, and candidates to start a search from. Pure functions."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning.evolution import Candidate, SearchSpace

__all__ = ["GroupLevels", "cheapest_in_error", "drop_dominated", "space_of", "uniform_candidate"]


@dataclass(frozen=True)
class GroupLevels:
    """Widths that one group of units may have.

    :param widths: channels or heads that stay, ascending; the last one is all of them
    :param errors: error of the output at each of them, 0 at the last
    :param costs: cost of each
    """

    widths: tuple[int, ...]
    errors: tuple[float, ...]
    costs: tuple[float, ...]


def drop_dominated(levels: GroupLevels) -> GroupLevels:
    """Leave out widths that cost as much as a larger one or more, as timed widths may; then costs ascend strictly.

    :param levels: a group's levels
    """
    kept = [len(levels.widths) - 1]
    for index in reversed(range(len(levels.widths) - 1)):
        if levels.costs[index] < levels.costs[kept[-1]]:
            kept.append(index)
    kept.reverse()
    return GroupLevels(
        tuple(levels.widths[index] for index in kept),
        tuple(levels.errors[index] for index in kept),
        tuple(levels.costs[index] for index in kept),
    )


def space_of(groups: Sequence[GroupLevels], budget: float, fixed: float, whole: float, what: str) -> SearchSpace:
    """The candidates that fit a budget.

    :param groups: levels of every group
    :param budget: most that the whole may cost
    :param fixed: cost of all that isn't in a group
    :param whole: cost of the dense model
    :param what: what is counted, for the message
    :return: the space, with costs of the groups alone
    :raises UsageError: if even the smallest widths cost more
    """
    least = fixed + sum(group.costs[0] for group in groups)
    if least > budget:
        raise UsageError(
            f"a budget of {whole / budget:.3g}x of {what} is out of reach: with the smallest widths it is "
            f"{whole / least:.3g}x; lower `budget`, raise `levels`, or remove `blocks` as well"
        )
    return SearchSpace(tuple(group.costs for group in groups), budget - fixed)


def uniform_candidate(space: SearchSpace, groups: Sequence[GroupLevels], seed: int) -> Candidate:
    """The largest common share of what the groups have that fits, and what is then left of the budget spent at random.

    :param space: the candidates
    :param groups: levels of every group
    :param seed: seed of the choice
    :return: an admitted candidate
    """
    shares = sorted({width / group.widths[-1] for group in groups for width in group.widths}, reverse=True)
    for share in shares:
        levels = tuple(
            max((level for level, width in enumerate(group.widths) if width <= share * group.widths[-1]), default=0)
            for group in groups
        )
        if space.cost(levels) <= space.budget:
            return space.fit(levels, random.Random(seed)) or levels
    return tuple(0 for _ in groups)


def cheapest_in_error(space: SearchSpace, groups: Sequence[GroupLevels], seed: int) -> Candidate:
    """From all units down, each time where a unit of cost saved adds least to the sum of the errors.

    :param space: the candidates
    :param groups: levels of every group
    :param seed: seed of the choice how what is left of the budget is spent
    :return: an admitted candidate
    """
    levels = [len(group.widths) - 1 for group in groups]
    while space.cost(levels) > space.budget:
        able = [index for index, level in enumerate(levels) if level]

        def price(index: int) -> float:
            group, level = groups[index], levels[index]
            saved = group.costs[level] - group.costs[level - 1]
            return (group.errors[level - 1] - group.errors[level]) / saved

        levels[min(able, key=price)] -= 1
    return space.fit(levels, random.Random(seed)) or tuple(levels)

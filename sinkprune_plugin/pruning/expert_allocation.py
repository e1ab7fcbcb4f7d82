"""How many experts each layer loses, where all together lose a given number. Torch only."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning.allocation import linear_over_depth
from sinkprune_plugin.pruning.evolution import Candidate, SearchSpace
from sinkprune_plugin.pruning.experts import ExpertLayer

__all__ = ["ExpertGrid", "removed_by_error", "removed_over_depth"]

# Largest distance of two levels of a search, as a share of a layer's experts; that of the search for sparsities.
LARGEST_STEP = 0.025


def removed_by_error(
    importances: Sequence[torch.Tensor], layers: Sequence[ExpertLayer], total: int, *, relative: bool
) -> list[int]:
    """Spread a number of removed experts over the layers: those go that cost the least anywhere.

    :param importances: (E,) of each layer
    :param layers: their routers
    :param total: experts that go in all layers together
    :param relative: compare an expert's share of the importance of its layer, where layers have scales of their own;
        otherwise the importance itself
    :return: how many go from each layer; the sum is ``total``, or less by less than the largest number of groups
    :raises UsageError: if the routers need more experts than would stay
    """
    steps: list[tuple[float, int, int]] = []
    for index, (importance, layer) in enumerate(zip(importances, layers, strict=True)):
        scale = float(importance.sum()) if relative else 1.0
        ordered = importance.view(layer.groups, -1).sort(dim=1).values / (scale or 1.0)
        # One of each group at a time; the mean, so that a step of several experts competes with one of a single one.
        costs = ordered.mean(dim=0)[: (layer.experts - layer.fewest) // layer.groups]
        steps += [(cost, index, layer.groups) for cost in costs.tolist()]
    result = [0] * len(layers)
    left = total
    # Costs ascend within a layer, and sorting is stable.
    for _, index, step in sorted(steps, key=lambda each: each[0]):
        if step <= left:
            result[index] += step
            left -= step
    if left >= max(layer.groups for layer in layers):
        most = total - left
        raise UsageError(
            f"{total} experts of all layers together can't go: the routers need their top-k, so at most {most} can; "
            "remove fewer"
        )
    return result


def removed_over_depth(layers: Sequence[ExpertLayer], total: int, spread: float) -> list[int]:
    """Spread a number of removed experts so that their share falls or rises linearly over the layers.

    The shares are those of :func:`linear_over_depth`, rounded to numbers that the routers can do with, those with the
    largest remainders up, until the total is met.

    :param layers: the routers, first to last
    :param total: experts that go in all layers together, as many as can be removed at most
    :param spread: share of the first layer minus the mean; positive: early layers lose more
    :return: how many go from each layer; the sum is ``total``
    """
    sizes = [layer.experts for layer in layers]
    shares = linear_over_depth(total / sum(sizes), sizes, spread)
    wanted = [share * size for share, size in zip(shares, sizes, strict=True)]
    most = [layer.experts - layer.fewest for layer in layers]
    result = [
        min(int(number) // layer.groups * layer.groups, limit)
        for number, layer, limit in zip(wanted, layers, most, strict=True)
    ]
    while (left := total - sum(result)) > 0:
        # What falls short the most comes first, in units of the layer's steps; of equals the first.
        short = {
            index: (wanted[index] - result[index]) / layer.groups
            for index, layer in enumerate(layers)
            if layer.groups <= left and result[index] + layer.groups <= most[index]
        }
        chosen = max(short, key=lambda index: short[index])
        result[chosen] += layers[chosen].groups
    return result


@dataclass(frozen=True)
class ExpertGrid:
    """Levels of every layer, as numbers of experts that stay; level 0 keeps the fewest.

    All layers have the same distance between two levels, so that one level up in one layer and one down in another
    keep the total.

    :param kept: for each layer its levels, ascending
    :param total: experts that stay in all layers together
    """

    kept: tuple[tuple[int, ...], ...]
    total: int

    @classmethod
    def around(cls, layers: Sequence[ExpertLayer], removed: Sequence[int]) -> Self:
        """All numbers of experts that the routers can do with, a fixed step apart.

        :param layers: the routers
        :param removed: how many go from each where they are spread evenly
        :return: the grid, with a level for these numbers in each layer
        :raises UsageError: if there is nothing to choose
        """
        groups = max(layer.groups for layer in layers)
        mean = sum(layer.experts for layer in layers) / len(layers)
        step = groups * max(1, int(LARGEST_STEP * mean / groups))
        kept = []
        for layer, gone in zip(layers, removed, strict=True):
            stay = layer.experts - gone
            lowest = stay - (stay - layer.fewest) // step * step
            kept.append(tuple(range(lowest, layer.experts + 1, step)))
        choices = sum(len(levels) > 1 for levels in kept)
        if choices < 2:
            raise UsageError(
                f"{choices} decoder block has experts to choose among, so there is nothing to allocate; use "
                "`allocation: uniform`"
            )
        return cls(tuple(kept), sum(layer.experts for layer in layers) - sum(removed))

    @property
    def space(self) -> SearchSpace:
        """The candidates whose total is exact."""
        return SearchSpace(
            tuple(tuple(float(count) for count in levels) for levels in self.kept), float(self.total), slack=0
        )

    def counts(self, candidate: Candidate) -> list[int]:
        """Experts that stay in each layer.

        :param candidate: one level for each layer
        """
        return [levels[level] for levels, level in zip(self.kept, candidate, strict=True)]

    def nearest(self, kept: Sequence[int], seed: int) -> Candidate | None:
        """A candidate close to given numbers.

        :param kept: experts that stay in each layer
        :param seed: seed of the choice which layers make up for rounding
        :return: the candidate; None if rounding led nowhere
        """
        closest = tuple(
            min(range(len(levels)), key=lambda level: abs(levels[level] - count))
            for levels, count in zip(self.kept, kept, strict=True)
        )
        return self.space.fit(closest, random.Random(seed))

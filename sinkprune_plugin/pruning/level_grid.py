"""The sparsities that a search over decoder blocks may choose from: levels a fixed number of weights apart.

One level more in one block and one level less in another keeps the total exactly, whatever their sizes.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning.evolution import Candidate, SearchSpace

__all__ = ["LevelGrid"]

# Levels on either side of the total, and the largest distance between two in blocks of one size. Near 0 and 1 the
# distance shrinks, so that the outermost levels are halfway to the end.
LEVELS_ASIDE = 5
LARGEST_STEP = 0.025


@dataclass(frozen=True)
class LevelGrid:
    """Levels of every block; level 0 is the sparsest, as the one that keeps fewest weights.

    :param total: sparsity of the whole
    :param sizes: weights to prune in each block
    :param sparsities: for each block its levels, descending
    :param lowest: for each block how many units of weights its level 0 keeps, counted from ``LEVELS_ASIDE`` below the
        total
    """

    total: float
    sizes: tuple[int, ...]
    sparsities: tuple[tuple[float, ...], ...]
    lowest: tuple[int, ...]

    @classmethod
    def around(cls, total: float, sizes: Sequence[int]) -> Self:
        """Levels around one sparsity.

        :param total: sparsity of the whole, in (0, 1)
        :param sizes: weights to prune in each block
        :return: the grid; a block that is much smaller than the mean has fewer levels, as all are in (0, 1)
        :raises UsageError: if there is nothing to choose
        """
        if len(sizes) < 2:
            raise UsageError(
                f"{len(sizes)} decoder block has targets, so there is nothing to allocate; use `allocation: uniform`"
            )
        step = min(LARGEST_STEP, min(total, 1 - total) / (2 * LEVELS_ASIDE))
        mean = sum(sizes) / len(sizes)
        sparsities, lowest = [], []
        for size in sizes:
            values = {units: total - units * step * mean / size for units in range(-LEVELS_ASIDE, LEVELS_ASIDE + 1)}
            allowed = {units: value for units, value in values.items() if 0 < value < 1}
            sparsities.append(tuple(allowed.values()))
            lowest.append(min(allowed) + LEVELS_ASIDE)
        return cls(total, tuple(sizes), tuple(sparsities), tuple(lowest))

    @property
    def space(self) -> SearchSpace:
        """The candidates whose total is exact."""
        costs = tuple(
            tuple(float(first + level) for level in range(len(levels)))
            for first, levels in zip(self.lowest, self.sparsities, strict=True)
        )
        return SearchSpace(costs, LEVELS_ASIDE * len(self.sizes), slack=0)

    @property
    def uniform(self) -> Candidate:
        """The candidate with one sparsity everywhere."""
        return tuple(LEVELS_ASIDE - first for first in self.lowest)

    def values(self, candidate: Candidate) -> list[float]:
        """Sparsity of each block.

        :param candidate: one level for each block
        """
        return [levels[level] for levels, level in zip(self.sparsities, candidate, strict=True)]

    def nearest(self, values: Sequence[float], seed: int) -> Candidate | None:
        """A candidate close to an allocation that isn't on the grid.

        :param values: one sparsity for each block
        :param seed: seed of the choice which blocks make up for rounding
        :return: the candidate; None if rounding led nowhere
        """
        closest = tuple(
            min(range(len(levels)), key=lambda level: abs(levels[level] - value))
            for levels, value in zip(self.sparsities, values, strict=True)
        )
        return self.space.fit(closest, random.Random(seed))

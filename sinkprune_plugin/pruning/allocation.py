"""How sparse each decoder block gets, so that the whole has the requested sparsity. Pure functions, no tensors.

Every function returns one sparsity per block with Σ sizes · sparsities = sparsity · Σ sizes, where ``sizes`` are the
numbers of weights to prune in each block.
"""

from collections.abc import Sequence
from itertools import pairwise

from sinkprune_plugin.errors import UsageError

__all__ = ["equal_marginal_error", "linear_over_depth", "uniform"]

# Of sums in float64, relative to the number of weights.
_ROUNDING = 1e-12


def uniform(sparsity: float, sizes: Sequence[int]) -> list[float]:
    """The same sparsity everywhere.

    :param sparsity: share of zeros of the whole, in (0, 1)
    :param sizes: weights to prune in each block
    :return: one sparsity for each block
    :raises UsageError: if a number is out of range
    """
    _check(sparsity, sizes)
    return [sparsity] * len(sizes)


def linear_over_depth(sparsity: float, sizes: Sequence[int], spread: float) -> list[float]:
    """Sparsity that falls (``spread`` > 0: ``early_sparser``) or rises (``late_sparser``) linearly over the blocks.

    With blocks of one size the first gets sparsity + spread and the last sparsity − spread. Near 0 and 1 the spread is
    limited to half the distance, so that every block keeps some weights and loses some.

    :param sparsity: share of zeros of the whole, in (0, 1)
    :param sizes: weights to prune in each block
    :param spread: sparsity of the first block minus the mean, for blocks of one size
    :return: one sparsity for each block, each in (0, 1)
    :raises UsageError: if a number is out of range
    """
    _check(sparsity, sizes)
    if len(sizes) == 1:
        return [sparsity]
    limit = min(sparsity, 1.0 - sparsity) / 2
    spread = max(-limit, min(spread, limit))
    slopes = [1.0 - 2.0 * index / (len(sizes) - 1) for index in range(len(sizes))]
    # Taking off the weighted mean keeps the total exact; |slope − mean| < 2 keeps every value inside (0, 1).
    mean = sum(size * slope for size, slope in zip(sizes, slopes, strict=True)) / sum(sizes)
    return [sparsity + spread * (slope - mean) for slope in slopes]


def equal_marginal_error(
    sparsity: float, sizes: Sequence[int], levels: Sequence[Sequence[float]], errors: Sequence[Sequence[float]]
) -> list[float]:
    """Sparsities with the least sum of errors: one more pruned weight costs the same in every block.

    Between the levels the error of a block is interpolated linearly along the lower convex hull of its curve. The sum
    is then minimised exactly by pruning the cheapest stretch of all blocks first.

    :param sparsity: share of zeros of the whole
    :param sizes: weights to prune in each block
    :param levels: for each block ascending sparsities in (0, 1) at which its errors were measured
    :param errors: for each block its error at each level, comparable between blocks
    :return: one sparsity for each block, each between its first and its last level
    :raises UsageError: if a number is out of range or the shapes don't fit
    """
    _check(sparsity, sizes)
    if not len(sizes) == len(levels) == len(errors):
        raise UsageError(f"{len(levels)} lists of levels and {len(errors)} of errors for {len(sizes)} blocks")
    for own, curve in zip(levels, errors, strict=True):
        if len(own) < 2 or any(a >= b for a, b in pairwise(own)) or not 0.0 < own[0] <= own[-1] < 1.0:
            raise UsageError(f"levels are {list(own)}; give at least two ascending sparsities between 0 and 1")
        if len(curve) != len(own):
            raise UsageError(f"a block has {len(own)} levels and {len(curve)} errors; give one error for each level")
    left = sparsity * sum(sizes) - sum(size * own[0] for size, own in zip(sizes, levels, strict=True))
    most = sum(size * own[-1] for size, own in zip(sizes, levels, strict=True))
    if left < -_ROUNDING * sum(sizes) or sparsity * sum(sizes) > most + _ROUNDING * sum(sizes):
        raise UsageError(f"sparsity {sparsity:g} is outside what the levels make possible; add levels")
    stretches = []
    for block, (own, curve) in enumerate(zip(levels, errors, strict=True)):
        for (low, low_error), (high, high_error) in pairwise(_lower_hull(own, curve)):
            slope = (high_error - low_error) / ((high - low) * sizes[block])
            # Along a hull slopes ascend, so sorting keeps the stretches of one block in order; `low` settles ties.
            stretches.append((slope, low, block, high))
    result = [own[0] for own in levels]
    for _, low, block, high in sorted(stretches):
        if left <= 0:
            break
        step = min((high - low) * sizes[block], left)
        result[block] = high if step == (high - low) * sizes[block] else low + step / sizes[block]
        left -= step
    return result


def _lower_hull(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    hull: list[tuple[float, float]] = []
    for x, y in zip(xs, ys, strict=True):
        while len(hull) >= 2 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def _check(sparsity: float, sizes: Sequence[int]) -> None:
    if not 0.0 < sparsity < 1.0:
        raise UsageError(f"sparsity {sparsity:g} is outside (0, 1); give the share of zeros, for instance 0.5")
    if not sizes or min(sizes) <= 0:
        raise UsageError(f"block sizes are {list(sizes)}; every decoder block needs at least one weight to prune")

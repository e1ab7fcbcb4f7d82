"""One sparsity for each decoder block, from the recipe's ``allocation``."""

from collections.abc import Sequence

from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.pruning.allocation import linear_over_depth

__all__ = ["allocate"]


def allocate(
    sparsity: float, allocation: str, spread: float, targets: Sequence[PruningTarget], num_blocks: int
) -> list[float]:
    """Spread one sparsity over the blocks; the share of zeros in all targets stays.

    :param sparsity: share of zeros in (0, 1)
    :param allocation: ``early_sparser`` or ``late_sparser``
    :param spread: sparsity of the first block minus the mean
    :param targets: weights to prune
    :param num_blocks: decoder blocks
    :return: one value for each block; those without targets have the mean
    """
    sizes = [0] * num_blocks
    for target in targets:
        if target.block is not None:
            sizes[target.block] += target.module.in_features * target.module.out_features
    chosen = [index for index, size in enumerate(sizes) if size]
    spread = spread if allocation == "early_sparser" else -spread
    values = linear_over_depth(sparsity, [sizes[index] for index in chosen], spread)
    by_block = dict(zip(chosen, values, strict=True))
    return [by_block.get(index, sparsity) for index in range(num_blocks)]

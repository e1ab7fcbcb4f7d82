"""One sparsity for each decoder block, from the recipe's ``sparsity`` and ``allocation``."""

from collections.abc import Sequence

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.pruning.allocation import linear_over_depth

__all__ = ["in_text", "resolve_blocks", "targets_by_block"]

# How far the total of a list may be from `sparsity`. A recipe has decimal numbers; in a model of 8 billion weights this
# is 8000 of them.
EXACT = 1e-6


def targets_by_block(targets: Sequence[PruningTarget]) -> dict[int, list[PruningTarget]]:
    """Targets of each decoder block that has any, by its index, ascending.

    :param targets: all targets
    """
    found: dict[int, list[PruningTarget]] = {}
    for target in targets:
        if target.block is not None:
            found.setdefault(target.block, []).append(target)
    return dict(sorted(found.items()))


def in_text(values: Sequence[float]) -> str:
    """Sparsities for a message.

    :param values: one for each block
    """
    return ", ".join(f"{value:.3f}" for value in values)


def resolve_blocks(
    sparsity: float | list[float],
    allocation: str | list[float],
    spread: float,
    targets: Sequence[PruningTarget],
    num_blocks: int,
) -> list[float] | None:
    """Sparsities of the blocks as far as they follow from the recipe.

    :param sparsity: share of zeros in (0, 1), of the whole or of each block
    :param allocation: the recipe's ``allocation``; ``uniform`` if ``sparsity`` is a list
    :param spread: sparsity of the first block minus the mean, for ``early_sparser`` and ``late_sparser``
    :param targets: weights to prune
    :param num_blocks: decoder blocks
    :return: one value for each block; those without targets have the mean. None if there is one sparsity for all, or
        the allocation takes a measurement
    :raises UsageError: if a list hasn't one value for each block or not the total that ``sparsity`` asks for, or a
        target is outside the blocks, where only one sparsity for all has a value
    """
    if isinstance(sparsity, float) and allocation == "uniform":
        return None
    outside = [target.name for target in targets if target.block is None]
    if outside:
        raise UsageError(
            f"{outside[0]} is outside the decoder blocks, where a list of block sparsities gives no value; use one "
            "sparsity or drop the target"
        )
    if isinstance(sparsity, list):
        return _one_for_each("sparsity", sparsity, num_blocks)
    sizes = {
        index: sum(target.module.in_features * target.module.out_features for target in group)
        for index, group in targets_by_block(targets).items()
    }
    if isinstance(allocation, list):
        values = _one_for_each("allocation", allocation, num_blocks)
        total = sum(size * values[index] for index, size in sizes.items()) / sum(sizes.values())
        if abs(total - sparsity) > EXACT:
            raise UsageError(
                f"allocation has a total sparsity of {total:.7g} over the targets, not the {sparsity:.7g} of "
                "`sparsity`; correct either of them, or leave `sparsity` out"
            )
        return values
    if allocation in ("early_sparser", "late_sparser"):
        signed = spread if allocation == "early_sparser" else -spread
        by_block = dict(zip(sizes, linear_over_depth(sparsity, list(sizes.values()), signed), strict=True))
        return [by_block.get(index, sparsity) for index in range(num_blocks)]
    return None


def _one_for_each(field: str, values: list[float], num_blocks: int) -> list[float]:
    if len(values) != num_blocks:
        raise UsageError(
            f"{field} has {len(values)} values, but the model has {num_blocks} decoder blocks; give one value, or one "
            "value for each block"
        )
    return values

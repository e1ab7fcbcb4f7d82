"""Which decoder blocks a model does without: those whose absence changes its predictions least."""

import contextlib
from collections.abc import Collection

import torch
import tqdm

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.prediction_distance import Install, PredictionDistance
from sinkprune_plugin.modifiers.replaced_forward import forward_replaced
from sinkprune_plugin.pruning.units import Amount, check_amount

__all__ = ["blocks_that_stay", "least_influential", "skipped"]


def blocks_that_stay(amount: Amount, total: int) -> int:
    """How many decoder blocks stay.

    :param amount: a number of blocks to remove, or a share of them, of which the nearest number is taken
    :param total: blocks of the model
    :return: the number that stays
    :raises UsageError: if none would stay, or a share is less than half a block
    """
    check_amount("blocks", amount)
    number = amount if isinstance(amount, int) else round(total * amount)
    if number >= total or (amount and not number):
        nearest = total - 1 if number >= total else 1
        raise UsageError(
            f"blocks {amount:g} would remove {number} of {total} decoder blocks; at least one must go and one stay, "
            f"the nearest number is `blocks: {nearest}`"
        )
    return total - number


def skipped(block: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let a decoder block pass its input on.

    :param block: a block of a native class: it returns its hidden states alone
    """
    return forward_replaced([(block, lambda hidden_states, *_args, **_kwargs: hidden_states)])


def least_influential(
    distance: PredictionDistance, blocks: torch.nn.ModuleList, number: int, budget: int, *, title: str
) -> list[int]:
    """Choose blocks one after the other, each time the one without which the predictions are closest to the dense ones.

    One at a time: two blocks that each can be missed may do the same work.

    :param distance: measures the divergence from the dense model's predictions along the trajectory
    :param blocks: the decoder blocks
    :param number: blocks to choose
    :param budget: forward tokens to spend on all measurements together, at least one pass each
    :param title: name of the progress bar
    :return: indices, in the order of the choice
    """
    measurements = sum(len(blocks) - chosen for chosen in range(number))
    tokens = min(distance.tokens, max(1, budget // max(1, measurements)))
    chosen: list[int] = []
    with tqdm.tqdm(desc=title, total=measurements, unit="block", disable=distributed.rank() != 0) as bar:
        for _ in range(number):
            values = {}
            for index in range(len(blocks)):
                if index not in chosen:
                    values[index] = distance.measure(_without({*chosen, index}, blocks), tokens)
                    bar.update()
            chosen.append(min(values, key=values.__getitem__))
    return chosen


def _without(gone: Collection[int], blocks: torch.nn.ModuleList) -> Install:
    return lambda block: skipped(blocks[block]) if block in gone else contextlib.nullcontext()

"""Which weights of a decoder block are trained at once: experts in groups whose optimizer states fit a limit."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from sinkprune_plugin.modifiers.block_fit import state_bytes

__all__ = ["TrainedWeight", "fit_groups"]


@dataclass(frozen=True)
class TrainedWeight:
    """A tensor that is trained.

    :param name: in the block
    :param numel: its elements
    :param dtype: the model's
    :param expert: what tells the routed expert that it belongs to from others; None for a tensor that all tokens meet
    """

    name: str
    numel: int
    dtype: torch.dtype
    expert: Hashable | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the weight, its gradient and its moments."""
        return state_bytes([self.numel], self.dtype)


def fit_groups(weights: Sequence[TrainedWeight], limit: float) -> list[list[TrainedWeight]]:
    """Divide the weights of a block, whole experts together; what isn't an expert's is in the first group.

    :param weights: all that are trained
    :param limit: bytes of the states of a group's experts; a single expert may take more
    :return: the groups, in the order of the experts; none if there are no weights
    """
    groups = [[weight for weight in weights if weight.expert is None]]
    by_expert: dict[Hashable, list[TrainedWeight]] = {}
    for weight in weights:
        if weight.expert is not None:
            by_expert.setdefault(weight.expert, []).append(weight)
    filled = 0
    for own in by_expert.values():
        size = sum(weight.state_bytes for weight in own)
        if filled and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1] += own
        filled += size
    return [group for group in groups if group]

"""Candidates of the search for block sparsities: a level for each block, put together from the database."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device

from sinkprune_plugin.modifiers.level_database import LevelDatabase
from sinkprune_plugin.modifiers.replaced_forward import forward_replaced, linear_with
from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.pruning.evolution import Candidate

__all__ = ["SparsityCandidates"]


class SparsityCandidates:
    """See :class:`RecoverableBlocks`.

    :param targets: for each block that has targets, by its index in the model, its targets
    :param database: their weights at all levels
    """

    def __init__(self, targets: Mapping[int, Sequence[PruningTarget]], database: LevelDatabase) -> None:
        self._targets = targets
        self._groups = {block: group for group, block in enumerate(targets)}
        self._database = database

    def installed(self, block: int, candidate: Candidate) -> contextlib.AbstractContextManager[Any]:
        """See :class:`RecoverableBlocks`."""
        weights = self.weights(block, candidate)
        return forward_replaced([(module, linear_with(weight, module)) for module, weight in weights.items()])

    def weights(self, block: int, candidate: Candidate) -> dict[torch.nn.Linear, torch.Tensor]:
        """See :class:`RecoverableBlocks`."""
        if block not in self._groups:
            return {}
        level = candidate[self._groups[block]]
        return {
            target.module: self._database.read(target.name, level, get_execution_device(target.module))
            for target in self._targets[block]
        }

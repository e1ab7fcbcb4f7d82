"""Candidates of the search for widths: a width for each group of units, its weight solved beforehand."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from compressed_tensors.offload import get_execution_device

from sinkprune_plugin.modifiers.block_influence import skipped
from sinkprune_plugin.modifiers.replaced_forward import forward_replaced
from sinkprune_plugin.modifiers.unit_targets import UnitTarget
from sinkprune_plugin.pruning.evolution import Candidate
from sinkprune_plugin.pruning.unit_removal import SolvedLevels

__all__ = ["WidthCandidates"]


class WidthCandidates:
    """See :class:`RecoverableBlocks`.

    :param blocks: the dense model's decoder blocks
    :param gone: those that are left out
    :param units: the groups of units
    :param choices: for each of them the widths of its levels, as the search numbers them
    :param widths: by the Linear that reads the units, the widths that were solved
    :param solved: the same way, columns and weights of these
    """

    def __init__(
        self,
        blocks: torch.nn.ModuleList,
        gone: Collection[int],
        units: Sequence[UnitTarget],
        choices: Sequence[Sequence[int]],
        widths: Mapping[str, Sequence[int]],
        solved: Mapping[str, SolvedLevels],
    ) -> None:
        self._blocks = blocks
        self._gone = gone
        self._units = units
        self._choices = choices
        self._widths = widths
        self._solved = solved

    def installed(self, block: int, candidate: Candidate) -> contextlib.AbstractContextManager[Any]:
        """See :class:`RecoverableBlocks`."""
        if block in self._gone:
            return skipped(self._blocks[block])
        return forward_replaced(
            [(module, _reading(module, columns, weight)) for module, columns, weight in self._smaller(block, candidate)]
        )

    def weights(self, block: int, candidate: Candidate) -> dict[torch.nn.Linear, torch.Tensor] | None:
        """See :class:`RecoverableBlocks`."""
        if block in self._gone:
            return None
        found = {}
        for module, columns, weight in self._smaller(block, candidate):
            whole = weight.new_zeros(len(weight), module.in_features)
            found[module] = whole.index_copy_(1, columns, weight)
        return found

    def _smaller(self, block: int, candidate: Candidate) -> list[tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]]:
        """Linears of the block that lose units, the columns that stay and their weight, where it computes."""
        found = []
        for unit, choices, level in zip(self._units, self._choices, candidate, strict=True):
            width = choices[level]
            if unit.block != block or width == unit.group.total:
                continue
            module, levels = unit.target.module, self._solved[unit.name]
            device = get_execution_device(module)
            index = self._widths[unit.name].index(width)
            found.append((module, levels.columns[index].to(device), levels.weights[index].to(device)))
        return found


def _reading(module: torch.nn.Linear, columns: torch.Tensor, weight: torch.Tensor) -> Any:
    """The forward of a Linear that reads the units which stay."""
    return lambda input: F.linear(input.index_select(-1, columns), weight, module.bias)

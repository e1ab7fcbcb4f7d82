"""Which experts of each decoder block stay, by the scores of all and the fields of a recipe."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.expert_lists import expert_counts
from sinkprune_plugin.models.sizes_in_config import sizes_in_config
from sinkprune_plugin.pruning.expert_allocation import removed_by_error, removed_over_depth
from sinkprune_plugin.pruning.experts import ExpertLayer, ExpertScore, experts_that_stay

__all__ = ["ExpertChoice"]


class ExpertChoice:
    """How many experts go from which decoder block; refused on creation where the routers can't do with what stays.

    :param config: configuration of a native model
    :param experts: a share or a number of experts to remove from each block, or a list with one for each block, 0 in
        blocks without experts
    :param allocation: the recipe's; other than ``uniform``, the shares or numbers say the total of all blocks, which
        ``early_sparser`` and ``late_sparser`` spread at once and ``error`` by the scores
    :param spread: share of experts that the first block loses minus the mean, for these two
    :raises UsageError: if the model has no experts, or the numbers don't fit it
    """

    def __init__(
        self,
        config: Any,
        experts: int | float | Sequence[int | float],
        allocation: str = "uniform",
        spread: float = 0.1,
    ) -> None:
        # What a router chooses among first; families without groups don't have these options.
        groups, chosen_groups = (getattr(config, key, None) or 1 for key in ("n_group", "topk_group"))
        self.layers = {
            index: ExpertLayer(count, config.num_experts_per_tok, groups, chosen_groups)
            for index, count in expert_counts(config).items()
        }
        blocks = self.blocks = len(sizes_in_config(config))
        amounts = [experts] * blocks if isinstance(experts, int | float) else list(experts)
        if len(amounts) != blocks:
            raise UsageError(
                f"experts has {len(amounts)} values, but the model has {blocks} decoder blocks; give one value, or one "
                "value for each block"
            )
        for index, amount in enumerate(amounts):
            if index not in self.layers and amount and not isinstance(experts, int | float):
                raise UsageError(
                    f"experts has {amount:g} for decoder block {index}, which has no experts; give 0 there"
                )
        self.removed = {
            index: layer.removed(amounts[index], f"decoder block {index}") for index, layer in self.layers.items()
        }
        if not any(self.removed.values()):
            raise UsageError(
                f"experts {experts if isinstance(experts, int | float) else 'in the list'} rounds to none of the "
                f"{max(layer.experts for layer in self.layers.values())} experts of a block; give a larger share or a "
                "number"
            )
        self._allocation = allocation
        if allocation in ("early_sparser", "late_sparser"):
            self.removed = self.over_depth(spread if allocation == "early_sparser" else -spread)

    def over_depth(self, spread: float) -> dict[int, int]:
        """As many experts in all, their share falling or rising linearly over the blocks.

        :param spread: share that the first block loses minus the mean
        :return: number of the block → how many go
        """
        layers = list(self.layers.values())
        return dict(zip(self.layers, removed_over_depth(layers, sum(self.removed.values()), spread), strict=True))

    def by_error(self, importances: Mapping[int, torch.Tensor], score: ExpertScore) -> dict[int, int]:
        """As many experts in all, those that cost the least anywhere.

        :param importances: see :meth:`kept`
        :param score: what they are
        :return: number of the block → how many go
        """
        # A ratio of sums over one expert's weights has no scale; sums do, and another one in each block.
        spread = removed_by_error(
            [importances[index] for index in self.layers],
            list(self.layers.values()),
            sum(self.removed.values()),
            relative=score != "aimer",
        )
        return dict(zip(self.layers, spread, strict=True))

    def kept(
        self, importances: Mapping[int, torch.Tensor], score: ExpertScore, removed: Mapping[int, int] | None = None
    ) -> dict[int, list[int]]:
        """Choose.

        :param importances: number of the block → (E,) float64, the higher the more important
        :param score: what they are
        :param removed: number of the block → how many go; None: as the allocation says
        :return: number of the block → numbers of the experts that stay, ascending
        :raises UsageError: if an importance isn't finite
        """
        for index, importance in importances.items():
            if not bool(importance.isfinite().all()):
                raise UsageError(
                    f"the {score} score of expert {int((~importance.isfinite()).nonzero()[0])} of decoder block "
                    f"{index} isn't finite; check the checkpoint, or load it with dtype float32"
                )
        if removed is None:
            removed = self.by_error(importances, score) if self._allocation == "error" else self.removed
        return {
            index: experts_that_stay(importances[index], removed[index], layer.groups)
            for index, layer in self.layers.items()
        }

"""Which experts of each decoder block stay, by the scores of all and the fields of a recipe."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.expert_lists import expert_counts
from sinkprune_plugin.models.sizes_in_config import sizes_in_config
from sinkprune_plugin.pruning.experts import ExpertLayer, ExpertScore, experts_that_stay, removed_by_error

__all__ = ["ExpertChoice"]


class ExpertChoice:
    """How many experts go from which decoder block; refused on creation where the routers can't do with what stays.

    :param config: configuration of a native model
    :param experts: a share or a number of experts to remove from each block, or a list with one for each block, 0 in
        blocks without experts
    :param by_error: the shares or numbers say the total; :func:`removed_by_error` spreads it
    :raises UsageError: if the model has no experts, or the numbers don't fit it
    """

    def __init__(self, config: Any, experts: int | float | Sequence[int | float], *, by_error: bool) -> None:
        # What a router chooses among first; families without groups don't have these options.
        groups, chosen_groups = (getattr(config, key, None) or 1 for key in ("n_group", "topk_group"))
        self.layers = {
            index: ExpertLayer(count, config.num_experts_per_tok, groups, chosen_groups)
            for index, count in expert_counts(config).items()
        }
        blocks = len(sizes_in_config(config))
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
        self._by_error = by_error

    def kept(self, importances: Mapping[int, torch.Tensor], score: ExpertScore) -> dict[int, list[int]]:
        """Choose.

        :param importances: number of the block → (E,) float64, the higher the more important
        :param score: what they are
        :return: number of the block → numbers of the experts that stay, ascending
        :raises UsageError: if an importance isn't finite
        """
        for index, importance in importances.items():
            if not bool(importance.isfinite().all()):
                raise UsageError(
                    f"the {score} score of expert {int((~importance.isfinite()).nonzero()[0])} of decoder block "
                    f"{index} isn't finite; check the checkpoint, or load it with dtype float32"
                )
        removed = self.removed
        if self._by_error:
            # A ratio of sums over one expert's weights has no scale; sums do, and another one in each block.
            spread = removed_by_error(
                [importances[index] for index in self.layers],
                list(self.layers.values()),
                sum(self.removed.values()),
                relative=score != "aimer",
            )
            removed = dict(zip(self.layers, spread, strict=True))
        return {
            index: experts_that_stay(importances[index], removed[index], layer.groups)
            for index, layer in self.layers.items()
        }

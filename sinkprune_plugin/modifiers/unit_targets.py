"""Which units of a model can be removed, block by block, and the Linear that reads each kind."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.utils import match_named_modules

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.block_sizes import (
    block_sizes,
    experts_in_block,
    require_own_weights,
    unit_linears,
    units_of,
)
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.modifiers.routed_experts import refuse_routed_experts
from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.pruning.units import UnitGroup, UnitKind

__all__ = ["FIELDS", "UnitTarget", "resolve_units"]

FIELDS: dict[UnitKind, str] = {"channels": "mlp_channels", "heads": "attention_heads"}

# Kernels of matrix products are fast where the sizes are multiples of 64. In a small model that is too coarse, and its
# products are short whatever their size.
_WIDE_MLP = 4096
_GRANULARITY = {True: 64, False: 8}


@dataclass(frozen=True)
class UnitTarget:
    """Units of one kind in one block.

    :param kind: which
    :param target: the Linear that reads them
    :param group: how many there are and what may stay
    """

    kind: UnitKind
    target: PruningTarget
    group: UnitGroup

    @property
    def block(self) -> int:
        """Index of the block."""
        assert self.target.block is not None
        return self.target.block

    @property
    def name(self) -> str:
        """Full name of the Linear."""
        return self.target.name


def resolve_units(
    model: torch.nn.Module, ignore: list[str], granularity: Mapping[UnitKind, int]
) -> tuple[list[UnitTarget], torch.nn.ModuleList]:
    """Find all units of a model that ``ignore`` doesn't exclude.

    :param model: native model
    :param ignore: module class names, names or ``re:`` patterns; a kind of units is left alone in a block where one of
        the Linears that share them matches
    :param granularity: widths that stay are multiples of it; a kind that isn't named has a default
    :return: heads and channels of each block, in the order of the forward pass, and the decoder blocks
    :raises UsageError: if the model's family has no units, Linears share their weights, or the blocks hold routed
        experts
    """
    units = units_of(model)
    name, blocks = find_decoder_blocks(model)
    ignored = {id(child) for _, module in match_named_modules(model, ignore) for child in module.modules()}
    # Routed experts of a native model stay as they are.
    lists = [experts_in_block(block, model.config) for block in blocks]
    refuse_routed_experts(name, blocks, ignored, {id(experts) for experts in lists if experts is not None})
    require_own_weights(model)
    found = []
    for index, sizes in enumerate(block_sizes(model)):
        per_group = sizes.attention_heads // sizes.key_value_heads
        counts: dict[UnitKind, tuple[int, int]] = {
            "heads": (sizes.attention_heads, per_group),
            "channels": (sizes.common_channels, 1),
        }
        coupled = unit_linears(blocks[index], units)
        for kind, (total, together) in counts.items():
            if kind not in coupled:
                continue
            linears = [blocks[index].get_submodule(part) for part in coupled[kind]]
            if any(id(linear) in ignored for linear in linears):
                continue
            reader = linears[-1]
            assert isinstance(reader, torch.nn.Linear)
            default = 1 if kind == "heads" else _GRANULARITY[total >= _WIDE_MLP]
            group = UnitGroup(
                FIELDS[kind],
                "MLP channels" if kind == "channels" else "attention heads",
                total,
                together,
                reader.in_features // total,
                granularity.get(kind, default),
            )
            found.append(UnitTarget(kind, PruningTarget(f"{name}.{index}.{coupled[kind][-1]}", reader, index), group))
    if not found:
        raise UsageError(f"ignore {ignore} leaves no units of {type(model).__name__} to remove; shorten it")
    return found, blocks

"""Which units of a model can be removed, block by block, and the Linear that reads each kind."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.utils import match_named_modules

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.block_sizes import BlockSizes, block_sizes, require_own_weights, units_of
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.models.unit_linears import experts_in_block, experts_of_family, unit_linears
from sinkprune_plugin.modifiers.routed_experts import refuse_routed_experts
from sinkprune_plugin.modifiers.routing import ExpertPlace, expert_places
from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.pruning.units import UnitGroup, UnitKind

__all__ = ["FIELDS", "UnitTarget", "resolve_units"]

FIELDS: dict[UnitKind, str] = {
    "channels": "mlp_channels",
    "heads": "attention_heads",
    "expert_channels": "expert_channels",
}
_NOUNS: dict[UnitKind, str] = {
    "channels": "MLP channels",
    "heads": "attention heads",
    "expert_channels": "channels of each expert",
}

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
    lists = [experts_in_block(block, model.config) for block in blocks]
    refuse_routed_experts(name, blocks, ignored, {id(experts) for experts in lists if experts is not None})
    require_own_weights(model)
    places = expert_places(name, blocks)
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
            target = PruningTarget(f"{name}.{index}.{coupled[kind][-1]}", reader, index)
            found.append(UnitTarget(kind, target, _group(kind, total, together, reader, granularity)))
        found += _of_experts(model, f"{name}.{index}", index, places, sizes, ignored, granularity)
    if not found:
        raise UsageError(f"ignore {ignore} leaves no units of {type(model).__name__} to remove; shorten it")
    return found, blocks


def _group(
    kind: UnitKind, total: int, together: int, reader: torch.nn.Linear, granularity: Mapping[UnitKind, int]
) -> UnitGroup:
    default = 1 if kind == "heads" else _GRANULARITY[total >= _WIDE_MLP]
    each = reader.in_features // total
    return UnitGroup(FIELDS[kind], _NOUNS[kind], total, together, each, granularity.get(kind, default))


def _of_experts(
    model: torch.nn.Module,
    block_name: str,
    block: int,
    places: Mapping[int, ExpertPlace],
    sizes: BlockSizes,
    ignored: Collection[int],
    granularity: Mapping[UnitKind, int],
) -> list[UnitTarget]:
    """Channels of the routed experts of one block; none where ``ignore`` excludes one of their Linears."""
    experts = experts_in_block(model.get_submodule(block_name), model.config)
    if experts is None or any(id(child) in ignored for child in experts.modules()):
        return []
    names, found = experts_of_family(model.config), []
    for number, expert in enumerate(experts):
        reader = expert.get_submodule(names.down)
        assert isinstance(reader, torch.nn.Linear)
        name = f"{block_name}.{names.experts}.{number}.{names.down}"
        target = PruningTarget(name, reader, block, places[id(reader)])
        group = _group("expert_channels", sizes.mlp_channels, 1, reader, granularity)
        found.append(UnitTarget("expert_channels", target, group))
    return found

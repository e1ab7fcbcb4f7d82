"""What the units of a decoder block cost: parameters, FLOPs of a token, or time on this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from compressed_tensors.offload import disable_onloading

from sinkprune_plugin.models.block_sizes import BlockSizes, block_sizes, units_of
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.models.unit_linears import unit_linears
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.block_latency import time_blocks
from sinkprune_plugin.modifiers.unit_targets import UnitTarget

__all__ = ["Currency", "UnitCosts", "count_costs", "time_costs"]

Currency = Literal["latency", "parameters", "flops"]


@dataclass(frozen=True)
class UnitCosts:
    """Costs add up: what isn't in a group of units, and of each group what its width costs.

    :param whole: cost of the dense model
    :param fixed: of that, what isn't in any of the groups
    :param widths: by the Linear that reads the units, cost of each width
    """

    whole: float
    fixed: float
    widths: Mapping[str, Mapping[int, float]]


def count_costs(
    model: torch.nn.Module,
    units: Sequence[UnitTarget],
    widths: Mapping[str, Sequence[int]],
    gone: Sequence[int],
    *,
    tokens: int | None,
) -> UnitCosts:
    """Count parameters or FLOPs.

    :param model: native model
    :param units: the groups that may lose units
    :param widths: widths of each, by the Linear that reads it, the last one all
    :param gone: decoder blocks that go
    :param tokens: None counts parameters; else the FLOPs of one token among so many: two for each weight of a Linear,
        and 4 · ``tokens`` · head width for each head's attention
    """
    names, (_, blocks) = units_of(model), find_decoder_blocks(model)
    costs: dict[str, dict[int, float]] = {}
    with disable_onloading():
        for unit in units:
            block = blocks[unit.block]
            writers = [block.get_submodule(name) for name in unit_linears(block, names)[unit.kind][:-1]]
            # The bias of what reads the units stays.
            counted = unit.target.module.weight.numel() * (1 if tokens is None else 2)
            counted += sum(_count(each, tokens) for each in writers)
            if tokens is not None and unit.kind == "heads":
                counted += 4 * tokens * unit.target.module.in_features
            costs[unit.name] = {width: counted * width / unit.group.total for width in widths[unit.name]}
        sizes = block_sizes(model)
        head_dim = _head_dim(model)
        attention = [0 if tokens is None else 4 * tokens * each.attention_heads * head_dim for each in sizes]
        whole = _count(model, tokens) + sum(attention)
        removed = sum(_count(blocks[index], tokens) + attention[index] for index in gone)
    inside = sum(costs[unit.name][unit.group.total] for unit in units)
    return UnitCosts(whole, whole - removed - inside, costs)


def time_costs(
    model: torch.nn.Module,
    blocks: torch.nn.ModuleList,
    units: Sequence[UnitTarget],
    widths: Mapping[str, Sequence[int]],
    gone: Sequence[int],
    *,
    batch_size: int,
    tokens: int,
) -> UnitCosts:
    """Time forward passes; see :func:`time_blocks`. Every process gets the table of the first.

    Channels and heads are timed apart from each other, the other kind whole: a block's time is the sum of both.

    :param model: native model
    :param blocks: its decoder blocks
    :param units: the groups that may lose units
    :param widths: widths of each, by the Linear that reads it, the last one all
    :param gone: decoder blocks that go
    :param batch_size: sequences in a pass
    :param tokens: tokens of a sequence
    """
    dense = block_sizes(model)
    shapes: dict[str, dict[int, BlockSizes]] = {}
    for unit in units:
        whole = dense[unit.block]
        together = whole.attention_heads // whole.key_value_heads
        shapes[unit.name] = {
            width: replace(whole, mlp_channels=width)
            if unit.kind == "channels"
            else replace(whole, attention_heads=width, key_value_heads=width // together)
            for width in widths[unit.name]
        }
    wanted = dict.fromkeys([*dense, *(shape for group in shapes.values() for shape in group.values())])
    with distributed.failing_together():
        table = time_blocks(model, blocks, wanted, batch_size, tokens) if distributed.rank() == 0 else None
    table = distributed.gather_objects(table)[0]
    assert table is not None
    # The difference to the whole block, so that a block's fixed part and its groups add up.
    costs = {
        unit.name: {width: table.blocks[shape] - table.blocks[dense[unit.block]] for width, shape in group.items()}
        for unit, group in zip(units, shapes.values(), strict=True)
    }
    stays = sum(table.blocks[each] for index, each in enumerate(dense) if index not in gone)
    return UnitCosts(table.rest + sum(table.blocks[each] for each in dense), table.rest + stays, costs)


def _head_dim(model: Any) -> int:
    return model.config.head_dim


def _count(module: torch.nn.Module, tokens: int | None) -> int:
    if tokens is None:
        return sum(parameter.numel() for parameter in module.parameters())
    return sum(2 * each.weight.numel() for each in module.modules() if isinstance(each, torch.nn.Linear))

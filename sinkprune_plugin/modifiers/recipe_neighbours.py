"""Units leave a model that other modifiers of the recipe have prepared for, or have changed already."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.offload import align_module_device
from compressed_tensors.quantization import QuantizationMetadata
from compressed_tensors.quantization.utils import is_module_quantized
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization.calibration import (
    initialize_observer,
    observe,
    update_qparams,
)
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.block_sizes import keep_units, remove_blocks
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.modifiers.base import SinkAwareModifierBase
from sinkprune_plugin.modifiers.unit_targets import UnitTarget
from sinkprune_plugin.pruning.units import UnitKind

__all__ = ["check_later_modifiers", "remove_units"]


def check_later_modifiers(
    later: Sequence[Modifier], units: Sequence[UnitTarget], widths: Mapping[str, int], blocks_left: int
) -> None:
    """Check that what stays is something that the modifiers which follow in the recipe can work on.

    :param later: these modifiers
    :param units: units of which some go
    :param widths: channels or heads that stay, by the Linear that reads them; their step where that isn't known yet
    :param blocks_left: decoder blocks that stay
    :raises UsageError: naming the modifier, what it needs and the remedy
    """
    for modifier in later:
        name = type(modifier).__name__
        sparsity = getattr(modifier, "sparsity", None)
        if isinstance(sparsity, list) and len(sparsity) != blocks_left:
            raise UsageError(
                f"sparsity of {name} has {len(sparsity)} values, but {blocks_left} decoder blocks stay; give one value "
                "for each of them"
            )
        for needed, what in _column_groups(modifier):
            for unit in units:
                columns = widths[unit.name] * unit.group.columns_each
                if columns % needed:
                    raise UsageError(
                        f"{what} of {name} needs columns in groups of {needed}, and {unit.name} may be left with "
                        f"{columns}; set `granularity: {{{unit.kind}: {_multiple(needed, unit)}}}`"
                    )


def _column_groups(modifier: Modifier) -> Iterable[tuple[int, str]]:
    structure = getattr(modifier, "_structure", None)
    if isinstance(modifier, SinkAwareModifierBase) and structure is not None and not structure.unstructured:
        yield structure.m, f"mask_structure {structure}"
    if isinstance(modifier, QuantizationMixin):
        for scheme in modifier.resolved_config.config_groups.values():
            size = getattr(scheme.weights, "group_size", None)
            if size is not None and size > 1:
                yield size, "the group size"


def _multiple(columns: int, unit: UnitTarget) -> int:
    each = unit.group.columns_each
    return next(number for number in range(1, columns + 1) if number * each % columns == 0)


def remove_units(
    model: torch.nn.Module,
    units: Sequence[UnitTarget],
    kept: Mapping[str, torch.Tensor],
    gone: Iterable[int],
    *,
    earlier: Sequence[Modifier],
    later: Sequence[Modifier],
) -> None:
    """Make the model smaller.

    Quantization that was prepared but not calibrated is taken off and prepared for the smaller Linears. Where weights
    were quantized already, those that adapted to the removal get new scales.

    :param model: native model in which the units that go have no influence any more
    :param units: units of which some go
    :param kept: (units,) int64 that stay, by the Linear that reads them
    :param gone: decoder blocks that go
    :param earlier: modifiers that precede in the recipe
    :param later: modifiers that follow in it
    """
    gone = set(gone)
    quantizers = [modifier for modifier in later if isinstance(modifier, QuantizationMixin)]
    if quantizers:
        for linear in block_linears(model).values():
            QuantizationMetadata.clear_all_qparams(linear)
    removed = [unit for unit in units if unit.name in kept and unit.block not in gone]
    members: dict[tuple[int, UnitKind], list[torch.Tensor]] = {}
    for unit in removed:
        members.setdefault((unit.block, unit.kind), []).append(unit.group.members(kept[unit.name]))
    for (block, kind), stay in members.items():
        # All experts of a block at once, in their order.
        if kind == "expert_channels":
            keep_units(model, block, expert_channels=stay)
        elif kind == "heads":
            keep_units(model, block, heads=stay[0])
        else:
            keep_units(model, block, channels=stay[0])
    for unit in removed:
        if not quantizers and is_module_quantized(unit.target.module):
            _calibrate_weight(unit.target.module)
    if gone:
        remove_blocks(model, gone)
    for quantizer in quantizers:
        quantizer.initialize_quantization(model)
    for modifier in earlier:
        if isinstance(modifier, SinkAwareModifierBase):
            modifier._kept_zeros.follow(model)


def _calibrate_weight(module: Any) -> None:
    initialize_observer(module, "weight")
    with align_module_device(module):
        observe(module, "weight")
    update_qparams(module, "weight")
    if hasattr(module, "weight_observer"):
        module.weight_observer.detach(module)
        del module.weight_observer

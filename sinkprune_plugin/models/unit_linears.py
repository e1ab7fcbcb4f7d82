"""Which Linears of one decoder block share its units, and its routed experts, by the names of the catalogue."""

from typing import Any

from torch import nn

from sinkprune_plugin.models.catalogue import Experts, Units, native_model

__all__ = ["experts_in_block", "experts_of_family", "unit_linears"]


def unit_linears(block: nn.Module, units: Units) -> dict[str, tuple[str, ...]]:
    """Linears of one block that share its units, by names within it.

    :param block: a decoder block
    :param units: what can be removed from blocks of the family
    :return: ``heads`` and, unless all of the block's experts are routed, ``channels`` → those that write the units, and
        last the one that reads them; none is there twice
    """
    found = {"heads": (*dict.fromkeys((units.head_rows, *units.key_value_rows)), units.head_columns)}
    for rows, columns in ((units.channel_rows, units.channel_columns), (units.shared_rows, units.shared_columns)):
        if columns is not None and _has(block, columns):
            found["channels"] = (*rows, columns)
    return found


def _has(block: nn.Module, name: str) -> bool:
    try:
        return isinstance(block.get_submodule(name), nn.Linear)
    except AttributeError:
        return False


def experts_of_family(config: Any) -> Experts:
    """Where the experts of a mixture are.

    :param config: configuration of a native model with experts
    """
    native = native_model(config)
    assert native is not None
    assert native.experts is not None
    return native.experts


def experts_in_block(block: nn.Module, config: Any) -> nn.ModuleList | None:
    """The routed experts of one block.

    :param block: a decoder block of a native model
    :param config: the model's configuration
    :return: the list of them; None where there is none
    """
    native = native_model(config)
    if native is None or native.experts is None:
        return None
    try:
        experts = block.get_submodule(native.experts.experts)
    except AttributeError:
        return None
    return experts if isinstance(experts, nn.ModuleList) else None

"""Numbers of a configuration: transformers accepts any, and a network built from wrong ones fails late or never."""

import math
from typing import Any

from sinkprune_plugin.errors import UsageError, short

__all__ = ["check_numbers"]


def check_numbers(config: Any, *, sizes: tuple[str, ...], optional: tuple[str, ...], positive: tuple[str, ...]) -> None:
    """Check options that the network is built from.

    :param config: a configuration
    :param sizes: options that are whole numbers of at least 1
    :param optional: the same, or None
    :param positive: options that are finite numbers above 0
    :raises UsageError: naming the option
    """
    for option in (*sizes, *optional):
        value = getattr(config, option)
        if value is None and option in optional:
            continue
        if type(value) is not int or value < 1:
            raise _wrong(config, option, value, "a whole number of at least 1")
    for option in positive:
        value = getattr(config, option)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise _wrong(config, option, value, "a number above 0")


def _wrong(config: Any, option: str, value: Any, wanted: str) -> UsageError:
    return UsageError(
        f"{option}={short(repr(value))} in this {config.model_type} configuration must be {wanted}; correct config.json"
    )

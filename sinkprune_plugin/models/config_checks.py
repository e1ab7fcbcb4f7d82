"""Options of a configuration: transformers accepts any, and a network built from wrong ones fails late or never."""

import math
from collections.abc import Mapping
from typing import Any

from sinkprune_plugin.errors import UsageError, short

__all__ = [
    "check_even_heads",
    "check_head_groups",
    "check_numbers",
    "check_unscaled_rotary",
    "check_values",
    "take_rotary_keys",
]


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


def check_values(config: Any, supported: Mapping[str, tuple[Any, ...]], family: str) -> None:
    """Check options of which the native class computes some values only.

    :param config: a configuration; an option that it lacks has the first value
    :param supported: option → those values
    :param family: what the message calls the family
    :raises UsageError: naming the option
    """
    for option, values in supported.items():
        value = getattr(config, option, values[0])
        if value not in values:
            raise UsageError(
                f"{option}={short(repr(value))} in this {family} configuration is not supported, only "
                f"{' or '.join(repr(each) for each in values)}; use a checkpoint without it"
            )


def check_head_groups(config: Any) -> None:
    """Check that as many query heads share each key and value head.

    :param config: with ``num_attention_heads`` and ``key_value_heads``
    :raises UsageError: if they don't
    """
    if config.num_attention_heads % config.key_value_heads:
        raise UsageError(
            f"num_attention_heads={config.num_attention_heads} is no multiple of "
            f"num_key_value_heads={config.key_value_heads}; change one of them"
        )


def check_even_heads(config: Any) -> None:
    """Check that rotary embedding finds pairs in a head.

    :param config: with ``head_dim``
    :raises UsageError: if its width is odd
    """
    if config.head_dim % 2:
        raise UsageError(f"head_dim={config.head_dim} is odd, and rotary embedding needs pairs; make it even")


def take_rotary_keys(config: Any, kwargs: dict[str, Any]) -> None:
    """Read ``rope_theta`` and ``rope_scaling`` as transformers 5 writes them in files that it converted.

    :param config: a configuration that has both as fields; they are set
    :param kwargs: keys that aren't fields; ``rope_parameters`` is taken out
    """
    parameters = kwargs.pop("rope_parameters", None)
    if parameters is not None:
        config.rope_theta = parameters.get("rope_theta", config.rope_theta)
        config.rope_scaling = None if parameters.get("rope_type", "default") == "default" else parameters


def check_unscaled_rotary(config: Any, family: str) -> None:
    """Check that rotary frequencies aren't scaled.

    :param config: with ``rope_scaling``
    :param family: what the message calls the family
    :raises UsageError: if they are
    """
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise UsageError(
            f"rope_scaling={config.rope_scaling} in this {family} configuration is not supported; use a checkpoint "
            "without it"
        )


def _wrong(config: Any, option: str, value: Any, wanted: str) -> UsageError:
    return UsageError(
        f"{option}={short(repr(value))} in this {config.model_type} configuration must be {wanted}; correct config.json"
    )

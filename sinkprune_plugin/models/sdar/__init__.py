"""SDAR (arXiv 2510.06303)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkprune_plugin.models.sdar.configuration_sdar import SDARConfig
    from sinkprune_plugin.models.sdar.modeling_sdar import SDARDecoderLayer, SDARForCausalLM, SDARModel

_MODULES = {
    "SDARConfig": "configuration_sdar",
    "SDARDecoderLayer": "modeling_sdar",
    "SDARForCausalLM": "modeling_sdar",
    "SDARModel": "modeling_sdar",
}

__all__ = ["SDARConfig", "SDARDecoderLayer", "SDARForCausalLM", "SDARModel"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

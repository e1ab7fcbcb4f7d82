"""Dream (arXiv 2508.15487)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkprune_plugin.models.dream.configuration_dream import DreamConfig
    from sinkprune_plugin.models.dream.modeling_dream import DreamBaseModel, DreamDecoderLayer, DreamModel
    from sinkprune_plugin.models.dream.tokenization_dream import DreamTokenizer

_MODULES = {
    "DreamBaseModel": "modeling_dream",
    "DreamConfig": "configuration_dream",
    "DreamDecoderLayer": "modeling_dream",
    "DreamModel": "modeling_dream",
    "DreamTokenizer": "tokenization_dream",
}

__all__ = ["DreamBaseModel", "DreamConfig", "DreamDecoderLayer", "DreamModel", "DreamTokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

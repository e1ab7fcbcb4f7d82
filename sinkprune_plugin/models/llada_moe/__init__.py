"""LLaDA-MoE (arXiv 2509.24389): LLaDA's training with a mixture of experts in each decoder layer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkprune_plugin.models.llada_moe.configuration_llada_moe import LLaDAMoEConfig
    from sinkprune_plugin.models.llada_moe.modeling_llada_moe import (
        LLaDAMoEDecoderLayer,
        LLaDAMoEModel,
        LLaDAMoEModelLM,
    )

_MODULES = {
    "LLaDAMoEConfig": "configuration_llada_moe",
    "LLaDAMoEDecoderLayer": "modeling_llada_moe",
    "LLaDAMoEModel": "modeling_llada_moe",
    "LLaDAMoEModelLM": "modeling_llada_moe",
}

__all__ = ["LLaDAMoEConfig", "LLaDAMoEDecoderLayer", "LLaDAMoEModel", "LLaDAMoEModelLM"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

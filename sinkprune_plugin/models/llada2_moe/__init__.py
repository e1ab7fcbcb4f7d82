"""LLaDA2 (arXiv 2512.15745): a mixture-of-experts language model adapted to denoise block by block."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkprune_plugin.models.llada2_moe.configuration_llada2_moe import LLaDA2MoeConfig
    from sinkprune_plugin.models.llada2_moe.modeling_llada2_moe import (
        LLaDA2MoeDecoderLayer,
        LLaDA2MoeModel,
        LLaDA2MoeModelLM,
    )

_MODULES = {
    "LLaDA2MoeConfig": "configuration_llada2_moe",
    "LLaDA2MoeDecoderLayer": "modeling_llada2_moe",
    "LLaDA2MoeModel": "modeling_llada2_moe",
    "LLaDA2MoeModelLM": "modeling_llada2_moe",
}

__all__ = ["LLaDA2MoeConfig", "LLaDA2MoeDecoderLayer", "LLaDA2MoeModel", "LLaDA2MoeModelLM"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

"""LLaDA and LLaDA-1.5 (arXiv 2502.09992), and MMaDA's text half, which is the same network."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkprune_plugin.models.llada.configuration_llada import LLaDAConfig, MMaDAConfig
    from sinkprune_plugin.models.llada.modeling_llada import LLaDALlamaBlock, LLaDAModel, LLaDAModelLM, MMaDAModelLM

_MODULES = {
    "LLaDAConfig": "configuration_llada",
    "LLaDALlamaBlock": "modeling_llada",
    "LLaDAModel": "modeling_llada",
    "LLaDAModelLM": "modeling_llada",
    "MMaDAConfig": "configuration_llada",
    "MMaDAModelLM": "modeling_llada",
}

__all__ = ["LLaDAConfig", "LLaDALlamaBlock", "LLaDAModel", "LLaDAModelLM", "MMaDAConfig", "MMaDAModelLM"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

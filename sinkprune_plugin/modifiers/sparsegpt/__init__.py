"""Sink-aware SparseGPT: the modifier, and beside it the mathematics, which needs torch only.

The modifier is imported on first use, so that the mathematics stays importable without llm-compressor.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkprune_plugin.modifiers.sparsegpt.base import SinkAwareSparseGPTModifier

__all__ = ["SinkAwareSparseGPTModifier"]


def __getattr__(name: str) -> Any:
    if name == "SinkAwareSparseGPTModifier":
        from sinkprune_plugin.modifiers.sparsegpt.base import SinkAwareSparseGPTModifier

        return SinkAwareSparseGPTModifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

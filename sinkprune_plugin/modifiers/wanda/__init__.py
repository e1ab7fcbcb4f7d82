"""Sink-aware Wanda: the modifier, and beside it the mathematics, which needs torch only.

The modifier is imported on first use, so that the mathematics stays importable without llm-compressor.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkprune_plugin.modifiers.wanda.base import SinkAwareWandaModifier

__all__ = ["SinkAwareWandaModifier"]


def __getattr__(name: str) -> Any:
    if name == "SinkAwareWandaModifier":
        from sinkprune_plugin.modifiers.wanda.base import SinkAwareWandaModifier

        return SinkAwareWandaModifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Sink-aware pruning of diffusion language models for llm-compressor, transformers and vLLM."""

from sinkprune_plugin._version import __version__

__all__ = ["__version__"]

"""Sink-aware pruning of diffusion language models for llm-compressor, transformers and vLLM.

Importing the package arms the registration of its classes with the host libraries. torch does the same by itself
through an entry point, so that a recipe works with nothing of ours imported; set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to
turn that off.
"""

from sinkprune_plugin._version import __version__
from sinkprune_plugin.registration import arm

__all__ = ["__version__"]

arm()

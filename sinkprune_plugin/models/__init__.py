"""Native transformers classes for diffusion LMs whose checkpoints otherwise carry Python code.

Module names equal the tensors' names in the official checkpoints, so weights load as they are, and nothing from a
checkpoint is executed: transformers prefers classes registered from outside of it over a checkpoint's Python files.
Importing this package imports neither torch nor transformers.
"""

from sinkprune_plugin.models.auto_classes import (
    add_native_model,
    register_configs,
    register_imported,
    register_models,
    register_tokenizers,
)

__all__ = ["add_native_model", "register_configs", "register_imported", "register_models", "register_tokenizers"]

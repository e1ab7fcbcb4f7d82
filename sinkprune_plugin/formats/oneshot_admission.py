"""Lets llm-compressor's oneshot() take a model that was loaded from a sparse checkpoint.

``Oneshot.validate_model`` judges a model by the ``quantization_config`` on disk and refuses every ``quant_method`` but
``compressed-tensors``. A model loaded from a sparse checkpoint is dense and was never quantized, so there is nothing
to refuse. The module is handed in by the hook on its import: this package doesn't import llm-compressor.
"""

from functools import wraps
from types import ModuleType
from typing import Any

__all__ = ["admit_sparse_models"]


def admit_sparse_models(module: ModuleType) -> None:
    """Skip the check for models that came from a sparse checkpoint and aren't quantized. Idempotent.

    :param module: ``llmcompressor.entrypoints.oneshot``
    """
    validate = module.Oneshot.validate_model
    if hasattr(validate, "__wrapped__"):
        return

    @wraps(validate)
    def validate_model(self: Any, model: Any) -> Any:
        loaded_dense = hasattr(model, "sparse_checkpoint_format") and not getattr(model, "is_quantized", False)
        return None if loaded_dense else validate(self, model)

    module.Oneshot.validate_model = validate_model

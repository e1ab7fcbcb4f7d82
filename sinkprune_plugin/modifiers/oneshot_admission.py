"""Makes llm-compressor's oneshot() accept and save a model that was loaded from a sparse checkpoint.

``Oneshot.validate_model`` judges a model by the ``quantization_config`` on disk and refuses every ``quant_method`` but
``compressed-tensors``. A model loaded from a sparse checkpoint is dense and was never quantized, so there is nothing
to refuse. When it saves a model, it takes config.json from where the model came from; sparsity and sizes stated there
would no longer describe the weights. The modules are handed in by hooks on their import: this package doesn't import
llm-compressor.
"""

import json
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from sinkprune_plugin.formats.files.shard_reader import CONFIG_NAME, read_json
from sinkprune_plugin.formats.sparsity_config import without_sparsity
from sinkprune_plugin.models.sizes_in_config import with_sizes

__all__ = ["admit_sparse_models", "correct_saved_config"]


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


def correct_saved_config(module: Any) -> None:
    """Make the config.json of what is saved, taken from the source, say what the weights are. Idempotent.

    They are dense, whatever the source was, and structured pruning may have made the model smaller.

    :param module: ``llmcompressor.transformers.compression.compressed_tensors_utils``
    """
    original = module.resave_config
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def resave_config(config: Any, save_dir: str) -> None:
        original(config, save_dir)
        file = Path(save_dir) / CONFIG_NAME
        saved = read_json(file)
        corrected = with_sizes(without_sparsity(saved), config.to_dict())
        if corrected != saved:
            file.write_text(json.dumps(corrected, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    module.resave_config = resave_config

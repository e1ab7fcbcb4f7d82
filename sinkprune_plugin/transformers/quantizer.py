"""Loading sparse checkpoints with transformers' ``from_pretrained``, through its registry of quantizers.

Two kinds of checkpoint are recognised by their ``quantization_config``: those with the dispatch key
``compressed-tensors-sparse``, and historic ones with ``compressed-tensors`` and a ``sparsity_config`` in a sparse
format, whose sparsity transformers on its own drops, leaving freshly initialised weights. The weights are decompressed
one by one while loading. A checkpoint that is only sparse gives an ordinary dense model, with no trace of a quantizer;
one that is quantized as well is handed on to transformers' own quantizer once its sparsity is undone.

Importing this module imports transformers' quantizers; :func:`register_quantizers` must be called right after they have
been imported.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.utils import quantization_config as stock

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.codecs.format_names import LEGACY_METHOD, QUANT_METHOD, CheckpointFormat, parse_format
from sinkprune_plugin.formats.files.file_checks import check_files
from sinkprune_plugin.formats.sparsity_config import read_sparsity_config, without_own_keys
from sinkprune_plugin.transformers.load_context import LoadContext
from sinkprune_plugin.transformers.weight_conversion import add_sparse_conversions

__all__ = [
    "CompressedTensorsConfig",
    "SparseHfQuantizer",
    "SparseQuantizedHfQuantizer",
    "register_quantizers",
]

# Never in a file: only tells transformers' registry which of the two quantizers handles a parsed config.
_STACKED_METHOD = "compressed-tensors-sparse-quantized"


class CompressedTensorsConfig(stock.CompressedTensorsConfig):
    """The ``quantization_config`` of a checkpoint in a sparse format.

    It has the name of transformers' own class because ``from_pretrained(quantization_config=…)``, which
    llm-compressor uses on every ``compressed-tensors`` checkpoint, compares the names of the classes.

    :param sparsity_config: its ``format`` must be one of ``CheckpointFormat``
    :param options: a stacked quantization, as transformers' class takes it
    :raises UsageError: if the format is unknown or the checkpoint can't be loaded correctly
    """

    def __init__(self, sparsity_config: Any = None, **options: Any) -> None:
        self.sparse_format = _sparse_format(sparsity_config)
        # A class of transformers would take them for options of a quantization.
        self.sparsity = read_sparsity_config({"quantization_config": {**options, "sparsity_config": sparsity_config}})
        options = without_own_keys(options)
        self.stacked = _is_quantized(options)
        if not self.stacked and options.get("transform_config"):
            raise UsageError(
                "quantization_config has a transform_config next to its sparsity_config, which can't be loaded without "
                "a quantization; load it with the tool that wrote it and save it dense"
            )
        if self.stacked:
            options["quant_method"] = LEGACY_METHOD
            super().__init__(**options)
            self.quant_method = _STACKED_METHOD
            return
        # The base class asks for compressed-tensors, which only a quantization needs.
        self.quant_method = QUANT_METHOD
        self.quantization_config = None
        self.use_optimized_inference = False
        # transformers calls this dequantized: the loaded model keeps neither quantizer nor config.
        self.dequantize = True

    def get_loading_attributes(self) -> dict[str, Any]:
        """Options a caller may override; see the base class."""
        return super().get_loading_attributes() if self.stacked else {"dequantize": True}


class _CompressedTensorsDispatch(stock.CompressedTensorsConfig):
    """Registered under ``compressed-tensors``: sparse configs go to this package, all others where they went before."""

    previous: type[Any] = stock.CompressedTensorsConfig

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """See the base class."""
        inner = config_dict.get("quantization_config", config_dict)
        sparsity = inner.get("sparsity_config")
        # Without quantization, the format "dense" is ours too: transformers on its own fails on it.
        dense = isinstance(sparsity, dict) and sparsity.get("format") == CheckpointFormat.DENSE
        if not sparsity or (dense and _is_quantized(inner)):
            return cls.previous.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)
        return CompressedTensorsConfig.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)


class _SparseLoading(HfQuantizer):
    """The part that both quantizers share: headers checked first, weights decompressed, the result checked.

    A loaded model says in its attribute ``sparse_checkpoint_format`` what it came from.
    """

    quantization_config: CompressedTensorsConfig

    def __init__(self, quantization_config: CompressedTensorsConfig, **kwargs: Any) -> None:
        self._context: LoadContext | None = None
        self._model: Any = None
        self._originals: dict[int, Any] = {}
        self._added: set[int] = set()
        self._shapes: dict[str, tuple[int, ...]] = {}
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise UsageError(
                "a sparse format can't be asked for with from_pretrained(quantization_config=…); prune the model "
                "and save it with save_sparse_checkpoint"
            )

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> Any:
        """Check the checkpoint's headers before anything is read; see the base class."""
        files = kwargs.get("checkpoint_files")
        if not files:
            raise UsageError("a sparse checkpoint is loaded from its files; a state_dict can't be given instead")
        sparse_format = self.quantization_config.sparse_format
        directory = Path(model.config.name_or_path)
        groups = check_files(
            [Path(file) for file in files],
            self.quantization_config.sparsity,
            # Not where this is a hub's name: then the files are in the hub's cache.
            directory if directory.is_dir() else None,
        )
        if self.quantization_config.stacked:
            # Scales and quantized values keep the dtypes they are stored in, as with transformers' own quantizer.
            self._context = LoadContext(sparse_format, groups, None, {})
        else:
            self._context = LoadContext(sparse_format, groups, dtype, model._get_dtype_plan(dtype))
        self._model = model
        result = super().preprocess_model(model=model, dtype=dtype, **kwargs)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        return result

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Put the decompression into the loader's pipeline; see the base class."""
        if self._context is None:
            # Asked for outside of a load, as when an adapter is added to the model: there is nothing to decompress.
            return super().update_weight_conversions(weight_conversions)
        # Sparsity comes first, so that a quantizer's conversions, added by the base class, see dense weights.
        loading, self._originals, self._added = add_sparse_conversions(weight_conversions, self._context, self._model)
        if self.quantization_config.stacked and self._originals:
            raise UsageError(
                "this model merges weights that are both quantized and sparse (experts), which can't be undone in one "
                "load; convert the checkpoint to dense first"
            )
        count = len(loading) - len(self._added)
        stacked: list[Any] = super().update_weight_conversions(loading[:count])
        return stacked[:count] + loading[count:] + stacked[count:]

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Refuse what didn't load as it should; leave no trace of the loading; see the base class."""
        context, self._context, self._model = self._context, None, None
        if context is not None and context.errors:
            raise context.errors[0]
        for name, tensor in model.state_dict().items():
            # With a quantizer in play the loader doesn't compare shapes itself.
            if (expected := self._shapes.get(name)) is not None and tuple(tensor.shape) != expected:
                raise UsageError(
                    f"{name} has shape {tuple(tensor.shape)} in the checkpoint, but the model wants {expected}: "
                    "config.json doesn't belong to these weights"
                )
        # Saving inverts the conversions of loading; a loaded model must be saved as if it had been dense.
        model._weight_conversions = [
            self._originals.get(id(conversion), conversion)
            for conversion in model._weight_conversions
            if id(conversion) not in self._added
        ]
        self._originals, self._added, self._shapes = {}, set(), {}
        model.sparse_checkpoint_format = self.quantization_config.sparse_format
        return super().postprocess_model(model, **kwargs)


class SparseHfQuantizer(_SparseLoading):
    """Loads a checkpoint that is sparse and not quantized as an ordinary dense model."""

    def remove_quantization_config(self, model: Any) -> None:
        """Make the model an ordinary one, its sub-configs included; see the base class."""
        super().remove_quantization_config(model)
        for key in model.config.sub_configs:
            sub_config = getattr(model.config, key, None)
            if sub_config is not None and hasattr(sub_config, "quantization_config"):
                del sub_config.quantization_config

    def is_serializable(self) -> bool:
        """The dense model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The dense model can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The dense model can be compiled."""
        return True


class SparseQuantizedHfQuantizer(_SparseLoading, CompressedTensorsHfQuantizer):
    """Undoes the sparsity of quantized weights while loading and leaves the rest to transformers' quantizer."""

    def __init__(self, quantization_config: CompressedTensorsConfig, **kwargs: Any) -> None:
        # The registry has done its work; from here on it is a compressed-tensors config like any other.
        quantization_config.quant_method = stock.QuantizationMethod.COMPRESSED_TENSORS
        super().__init__(quantization_config, **kwargs)


def _is_quantized(config: dict[str, Any]) -> bool:
    return bool(config.get("config_groups") or config.get("kv_cache_scheme"))


def _sparse_format(sparsity_config: Any) -> CheckpointFormat:
    """The format named in a ``sparsity_config``; compared, never looked up, so that no text from a file is imported."""
    if not isinstance(sparsity_config, dict):
        raise UsageError(
            f'quant_method "{QUANT_METHOD}" needs a sparsity_config with a format next to it in config.json; '
            f"found {type(sparsity_config).__name__}"
        )
    return parse_format(sparsity_config.get("format"), "sparsity_config.format of config.json")


def _accept_oldest_layout(get_hf_quantizer: Callable[..., Any]) -> Callable[..., Any]:
    """Make the loader see a ``compression_config``, where compressed-tensors before 0.7 put what is now in
    ``quantization_config``: transformers would load such a checkpoint with fresh weights."""

    def get_quantizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        oldest = getattr(config, "compression_config", None)
        if isinstance(oldest, dict) and oldest.get("sparsity_config") and not getattr(config, "quantization_config", 0):
            config.quantization_config = {**oldest, "quant_method": LEGACY_METHOD}
            del config.compression_config
        return get_hf_quantizer(config, *args, **kwargs)

    get_quantizer.accepts_oldest_layout = True  # type: ignore[attr-defined]
    return get_quantizer


def register_quantizers() -> None:
    """Make ``from_pretrained`` know the sparse formats. Idempotent.

    The hooks to call it from are the imports of ``transformers.quantizers.auto`` and, for a process whose first import
    of torch happens within that one, ``transformers.modeling_utils``.
    """
    if QUANT_METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(QUANT_METHOD)(CompressedTensorsConfig)
    for method, quantizer in ((QUANT_METHOD, SparseHfQuantizer), (_STACKED_METHOD, SparseQuantizedHfQuantizer)):
        if method not in auto.AUTO_QUANTIZER_MAPPING:
            auto.register_quantizer(method)(quantizer)
    # No public function replaces an entry; only its from_dict is ever called, and it passes all others through.
    registered = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[LEGACY_METHOD]
    if registered is not _CompressedTensorsDispatch:
        _CompressedTensorsDispatch.previous = registered
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[LEGACY_METHOD] = _CompressedTensorsDispatch
    for module in (auto, sys.modules.get("transformers.modeling_utils")):
        original = getattr(module, "get_hf_quantizer", None)
        if original is not None and not hasattr(original, "accepts_oldest_layout"):
            module.get_hf_quantizer = _accept_oldest_layout(original)  # type: ignore[union-attr]

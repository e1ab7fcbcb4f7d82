"""vLLM's view of a sparse checkpoint: which method runs its Linears once the weights are dense again.

Decompression isn't done here but before the model's loading, see :mod:`~sinkprune_plugin.vllm.sparse_weights`.
"""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.codecs.format_names import LEGACY_METHOD, QUANT_METHOD, CheckpointFormat
from sinkprune_plugin.formats.sparsity_config import without_sparsity
from sinkprune_plugin.vllm.sparse_linear import Sparse24LinearMethod, sparse_tensor_cores
from sinkprune_plugin.vllm.sparse_weights import install_sparse_loading, read_block

__all__ = ["SparseConfig", "register_sparse"]


class SparseConfig(QuantizationConfig):
    """A checkpoint that is sparse and not quantized.

    :param sparse_format: how its weights are stored
    """

    def __init__(self, sparse_format: CheckpointFormat) -> None:
        super().__init__()
        self.sparse_format = sparse_format

    def __repr__(self) -> str:
        return f"SparseConfig({self.sparse_format})"

    def get_name(self) -> Any:
        """The dispatch key."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of dense models."""
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device can run it dense."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Everything is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Read a ``quantization_config``.

        :param config: as in config.json
        :return: ours; for weights that are quantized as well vLLM's own, made as if there were no sparsity
        :raises UsageError: if the format is unknown or the checkpoint can't be loaded correctly
        """
        found = read_block(config)
        if found is None:
            raise UsageError(
                f'quantization "{QUANT_METHOD}" needs a sparsity_config in config.json; leave the option out'
            )
        config = {**config, "quant_method": config.get("quant_method") or LEGACY_METHOD}
        rest = without_sparsity({"quantization_config": config}).get("quantization_config")
        if rest is None:
            return cls(found.format)
        if not found.quantization:
            raise UsageError(
                "quantization_config has a transform_config next to its sparsity_config, which can't be loaded without "
                "a quantization; load it with the tool that wrote it and save it dense"
            )
        return CompressedTensorsConfig.from_config(rest)

    @classmethod
    def override_quantization_method(
        cls,
        hf_quant_cfg: dict[str, Any],
        user_quant: str | None,  # noqa: ARG003
        hf_config: Any = None,  # noqa: ARG003
    ) -> Any:
        """Claim historic checkpoints, which vLLM on its own refuses since 0.19.

        :param hf_quant_cfg: as in config.json
        :param user_quant: ignored
        :param hf_config: ignored
        :return: our dispatch key, or None where a checkpoint isn't ours
        """
        # The oldest of them don't name a method.
        historic = hf_quant_cfg.get("quant_method") in (None, "", LEGACY_METHOD)
        return QUANT_METHOD if historic and hf_quant_cfg.get("sparsity_config") else None

    def get_quant_method(
        self,
        layer: torch.nn.Module,
        prefix: str,
    ) -> QuantizeMethodBase | None:
        """The method that runs a layer.

        :param layer: the layer
        :param prefix: its full name; whether a weight is 2:4 is seen once it is loaded
        :return: a method for Linears, None for all else
        """
        if not isinstance(layer, LinearBase):
            return None
        if self.sparse_format is CheckpointFormat.SPARSE_24_BITMASK and sparse_tensor_cores():
            return Sparse24LinearMethod(prefix)
        return UnquantizedLinearMethod()


def register_sparse() -> None:
    """Make vLLM know the sparse formats. Idempotent."""
    from vllm.model_executor.layers import quantization

    if QUANT_METHOD not in quantization.QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(SparseConfig)
    install_sparse_loading()

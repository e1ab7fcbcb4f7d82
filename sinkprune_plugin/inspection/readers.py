"""Who can load a checkpoint: the support matrix of README.md, applied to one checkpoint.

Each answer other than ``untested`` is backed by test_sparse_loading.py, test_sparse_quantized_loading.py,
test_saving.py, test_support_matrix.py, test_bad_input.py, test_legacy_compressed_tensors.py, test_vllm_checkpoints.py,
test_vllm_models.py or test_vllm_sparse_models.py in integration_tests/; that vLLM loads an ordinary dense checkpoint is
assumed.
"""

from dataclasses import dataclass
from typing import Literal

from sinkprune_plugin.formats import CheckpointFormat
from sinkprune_plugin.formats.codecs.format_names import LEGACY_METHOD, QUANT_METHOD

__all__ = ["Reader", "Storage", "find_readers"]

_ALONE = "transformers without this package"
_COMPRESSED_TENSORS = "compressed-tensors 0.9 to 0.14"
_VLLM = "vLLM with this package"

Answer = Literal["yes", "no", "untested"]


@dataclass(frozen=True)
class Storage:
    """What decides who can load a checkpoint.

    :param format: how the weights are stored
    :param quant_method: dispatch key in config.json, or None
    :param quantization: the quantizer's own format, such as float-quantized; None if nothing is quantized
    :param full_names: sparse, with the names used before compressed-tensors 0.9
    :param float8: whether a weight in parts is float8
    :param diffusion: whether the model is of a diffusion family, whose classes are in this package
    :param block_sizes: whether its config.json has sizes of single blocks, which only this package's classes read
    """

    format: CheckpointFormat
    quant_method: str | None
    quantization: str | None = None
    full_names: bool = False
    float8: bool = False
    diffusion: bool = False
    block_sizes: bool = False

    @property
    def sparse(self) -> bool:
        """Whether weights are stored in parts."""
        return self.format is not CheckpointFormat.DENSE

    @property
    def layout(self) -> str | None:
        """``sinkprune``, ``legacy``, ``before-0.9``; None for a dense checkpoint."""
        if not self.sparse:
            return None
        if self.quant_method == QUANT_METHOD:
            return "sinkprune"
        return "before-0.9" if self.full_names or self.quant_method is None else "legacy"


@dataclass(frozen=True)
class Reader:
    """Whether a tool can load the checkpoint.

    :param reader: the tool
    :param loads: ``yes``, ``no`` or ``untested``
    :param note: why, or what to do
    """

    reader: str
    loads: Answer
    note: str = ""


def find_readers(storage: Storage) -> list[Reader]:
    """List who can load a checkpoint.

    :param storage: how it is stored
    :return: one entry for each tool, always the same tools in the same order
    """
    return [
        _transformers(storage),
        _transformers_alone(storage),
        _llm_compressor(storage),
        _compressed_tensors(storage),
        _vllm(storage),
    ]


def _foreign(storage: Storage) -> bool:
    """Quantized by a tool other than compressed-tensors, which transformers handles itself."""
    return storage.quant_method not in (None, LEGACY_METHOD, QUANT_METHOD)


def _transformers(storage: Storage) -> Reader:
    name = "transformers with this package"
    if _foreign(storage):
        return Reader(name, "untested", "left to transformers and the quantization's own package")
    return Reader(name, "yes", "decompressed while loading" if storage.sparse else "")


def _transformers_alone(storage: Storage) -> Reader:
    if storage.block_sizes:
        return Reader(_ALONE, "no", "official code refuses such blocks; install this package")
    if storage.layout == "sinkprune":
        return Reader(_ALONE, "no", "warns and makes new weights; convert to dense")
    if storage.layout == "before-0.9":
        return Reader(_ALONE, "untested", "it has no decompressor; convert to dense")
    if storage.layout == "legacy":
        what = "it has no decompressor" if storage.quantization else "stops with an error"
        return Reader(_ALONE, "no", f"{what}; convert to dense")
    if storage.quant_method == QUANT_METHOD or _foreign(storage):
        return Reader(_ALONE, "untested")
    if storage.quant_method == LEGACY_METHOD and storage.quantization is None:
        return Reader(_ALONE, "no", "stops at the sparsity_config; convert to dense")
    if storage.diffusion:
        return Reader(_ALONE, "untested", "has no class for this model; needs the model's remote code")
    return Reader(_ALONE, "yes")


def _llm_compressor(storage: Storage) -> Reader:
    name = "llm-compressor with this package"
    if _foreign(storage):
        return Reader(name, "untested")
    if storage.quantization is not None:
        return Reader(name, "no", "quantized weights can't be pruned again")
    return Reader(name, "untested" if storage.layout == "before-0.9" else "yes")


def _compressed_tensors(storage: Storage) -> Reader:
    if not storage.sparse:
        return Reader(_COMPRESSED_TENSORS, "untested", "the weights aren't sparse: nothing in it needs this reader")
    if storage.layout == "before-0.9":
        return Reader(_COMPRESSED_TENSORS, "no", "the names changed in 0.9; convert with --layout legacy")
    if storage.layout == "sinkprune":
        return Reader(_COMPRESSED_TENSORS, "no", "convert with --layout legacy")
    if storage.quantization is not None and storage.float8:
        return Reader(_COMPRESSED_TENSORS, "untested", "checked with int8, not with float8 under a quantization")
    return Reader(_COMPRESSED_TENSORS, "yes", "checked bit for bit with 0.12.2 and 0.14.0")


def _vllm(storage: Storage) -> Reader:
    if _foreign(storage):
        return Reader(_VLLM, "untested")
    if storage.layout == "before-0.9":
        return Reader(_VLLM, "untested", "convert to dense")
    if storage.sparse:
        return Reader(_VLLM, "yes", "decompressed while loading")
    return Reader(_VLLM, "yes", "" if storage.diffusion else "also without it")

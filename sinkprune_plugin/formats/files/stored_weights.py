"""A weight that is stored in parts: what it is when dense, judged by headers and the few bytes of ``shape``."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats.codecs import bitmask, bitmask24
from sinkprune_plugin.formats.codecs.format_names import CheckpointFormat
from sinkprune_plugin.formats.files.part_checks import DAMAGED, VALUE_DTYPES, dense_shape
from sinkprune_plugin.formats.files.safetensors_header import TORCH_DTYPES, TensorEntry, TensorSpec
from sinkprune_plugin.formats.files.shard_reader import read_tensor

__all__ = ["CODECS", "SparseWeight", "open_weight"]

CODECS = {CheckpointFormat.SPARSE_BITMASK: bitmask, CheckpointFormat.SPARSE_24_BITMASK: bitmask24}
"""Sparse format → the module that compresses and decompresses one weight."""


@dataclass(frozen=True)
class SparseWeight:
    """A weight that is stored in parts.

    :param name: name of the dense tensor
    :param format: how it is stored
    :param parts: local name → where it is; the parts may be in different files
    :param spec: kind and size of the dense tensor
    """

    name: str
    format: CheckpointFormat
    parts: Mapping[str, TensorEntry]
    spec: TensorSpec

    @property
    def nbytes(self) -> int:
        """Size of all parts."""
        return sum(entry.nbytes for entry in self.parts.values())

    def read(self) -> torch.Tensor:
        """Read the parts and rebuild the dense weight.

        :raises UsageError: naming tensor and file, if they contradict each other
        """
        parts = {part: read_tensor(entry) for part, entry in self.parts.items()}
        return CODECS[self.format].decompress(parts, name=_where(self.name, self.parts["compressed"]))


def open_weight(name: str, sparse_format: CheckpointFormat, parts: Mapping[str, TensorEntry]) -> SparseWeight:
    """Find out what some parts decompress to, as far as headers and ``shape`` agree on it.

    :param name: name of the dense tensor
    :param sparse_format: a sparse format
    :param parts: all parts of that format, local name → where it is
    :return: the weight
    :raises UsageError: if the parts contradict their headers
    """
    shape, values = parts["shape"], parts["compressed"]
    where = _where(name, shape)
    # Checked before it is read: a real one has 16 bytes.
    if shape.dtype != "I64" or shape.elements > 64:
        raise UsageError(f"{where}: shape is {shape.dtype} of {shape.elements} elements, it must be 2 I64; {DAMAGED}")
    sizes = dense_shape(read_tensor(shape), where)
    if list(parts["bitmask"].shape) != [*sizes[:-1], -(-sizes[-1] // 8)]:
        raise UsageError(
            f"{where}: shape says {sizes}, which doesn't go with a bitmask of {short(list(parts['bitmask'].shape))}; "
            f"{DAMAGED}"
        )
    if TORCH_DTYPES.get(values.dtype) not in VALUE_DTYPES:
        raise UsageError(f"{where}: compressed is {values.dtype}, which no sparse format holds; {DAMAGED}")
    return SparseWeight(name, sparse_format, parts, TensorSpec(values.dtype, tuple(sizes)))


def _where(name: str, entry: TensorEntry) -> str:
    return f"{name} ({entry.file.name})"

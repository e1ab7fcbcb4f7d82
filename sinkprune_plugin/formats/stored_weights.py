"""Which tensors of a checkpoint's files make up which weight, judged by headers and the few bytes of ``shape``."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import bitmask, bitmask24
from sinkprune_plugin.formats.format_names import CheckpointFormat
from sinkprune_plugin.formats.part_checks import DAMAGED, VALUE_DTYPES, dense_shape
from sinkprune_plugin.formats.safetensors_header import TORCH_DTYPES, TensorEntry, TensorSpec
from sinkprune_plugin.formats.shard_reader import read_tensor

__all__ = ["ALL_PARTS", "CODECS", "SparseWeight", "find_sparse_weights"]

CODECS = {CheckpointFormat.SPARSE_BITMASK: bitmask, CheckpointFormat.SPARSE_24_BITMASK: bitmask24}
"""Sparse format → the module that compresses and decompresses one weight."""

ALL_PARTS = frozenset(part for known in CODECS for part in known.parts)
"""Local names that no other tensor of a sparse checkpoint may have."""


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


def find_sparse_weights(entries: Mapping[str, TensorEntry], sparse_format: CheckpointFormat) -> list[SparseWeight]:
    """Group the tensors of a checkpoint.

    :param entries: name → where it is
    :param sparse_format: what config.json says
    :return: the weights stored in parts; every other tensor is stored as it is
    :raises UsageError: if a part is missing or left over, can't be what it claims, or a name is taken twice
    """
    if sparse_format is CheckpointFormat.DENSE:
        _refuse_parts(entries)
        return []
    parts_of: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        owner, _, part = name.rpartition(".")
        if owner and part in ALL_PARTS:
            parts_of.setdefault(owner, {})[part] = entry
    # compressed-tensors before 0.9 compressed every tensor and kept its full name as the prefix.
    full_names = any(owner.endswith(".weight") for owner in parts_of)
    weights = []
    for owner, parts in sorted(parts_of.items()):
        name = owner if full_names else f"{owner}.weight"
        some = next(iter(parts.values()))
        for part in sparse_format.parts:
            if part not in parts:
                raise UsageError(
                    f"{name}: {some.name} is in {some.file}, but {owner}.{part}, which {sparse_format} needs, is in no "
                    f"file; {DAMAGED}"
                )
        if len(parts) != len(sparse_format.parts):
            extra = next(part for part in parts if part not in sparse_format.parts)
            raise UsageError(
                f"{parts[extra].name} in {parts[extra].file} isn't a part of {sparse_format}: config.json names the "
                "wrong format, correct it"
            )
        if name in entries:
            raise UsageError(
                f"{name} is stored twice, dense in {entries[name].file} and sparse in {some.file}; write the "
                "checkpoint again"
            )
        weights.append(SparseWeight(name, sparse_format, parts, _dense_spec(name, parts)))
    return weights


def _refuse_parts(entries: Mapping[str, TensorEntry]) -> None:
    """A sparse checkpoint without its sparsity_config must not pass for a dense one with odd names."""
    for name, entry in entries.items():
        owner = name.removesuffix(".compressed")
        if owner != name and f"{owner}.bitmask" in entries and f"{owner}.shape" in entries:
            raise UsageError(
                f"{name} in {entry.file} is part of a sparse weight, but config.json names no sparse format; put its "
                "sparsity_config back"
            )


def _dense_spec(name: str, parts: Mapping[str, TensorEntry]) -> TensorSpec:
    """What the parts decompress to, as far as headers and ``shape`` agree on it."""
    shape, values = parts["shape"], parts["compressed"]
    where = _where(name, shape)
    # Checked before it is read: a real one has 16 bytes.
    if shape.dtype != "I64" or shape.elements > 64:
        raise UsageError(f"{where}: shape is {shape.dtype} of {shape.elements} elements, it must be 2 I64; {DAMAGED}")
    sizes = dense_shape(read_tensor(shape), where)
    if list(parts["bitmask"].shape) != [*sizes[:-1], -(-sizes[-1] // 8)]:
        raise UsageError(
            f"{where}: shape says {sizes}, which doesn't go with a bitmask of {list(parts['bitmask'].shape)}; {DAMAGED}"
        )
    if TORCH_DTYPES.get(values.dtype) not in VALUE_DTYPES:
        raise UsageError(f"{where}: compressed is {values.dtype}, which no sparse format holds; {DAMAGED}")
    return TensorSpec(values.dtype, tuple(sizes))


def _where(name: str, entry: TensorEntry) -> str:
    return f"{name} ({entry.file.name})"

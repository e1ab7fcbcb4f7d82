"""A checkpoint as a lazy mapping from names to dense tensors, however it is stored."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.formats.codecs.format_names import CheckpointFormat
from sinkprune_plugin.formats.files.digests import check_digest, check_digest_names
from sinkprune_plugin.formats.files.part_groups import group_parts
from sinkprune_plugin.formats.files.safetensors_header import TensorEntry, TensorSpec
from sinkprune_plugin.formats.files.shard_reader import CONFIG_NAME, read_bytes, read_entries, read_json, read_tensor
from sinkprune_plugin.formats.files.shard_writer import tensor_bytes
from sinkprune_plugin.formats.files.stored_weights import SparseWeight, open_weight
from sinkprune_plugin.formats.sparsity_config import SparsityConfig, read_sparsity_config

__all__ = ["CheckpointReader"]


class CheckpointReader(Mapping[str, torch.Tensor]):
    """Name → dense tensor, read and decompressed again on each access.

    Opening reads configuration and headers and checks that they fit together; nothing is kept open. A file that has a
    digest is checked as a whole when its first tensor is read.

    :param directory: checkpoint directory, dense or in a sparse format
    :raises UsageError: if it can't be read, naming file and tensor

    Attributes: ``config`` (content of config.json), ``sparsity`` (what that says, or None), ``files`` (those with the
    tensors, in order).
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        entries = read_entries(self.directory)
        file = self.directory / CONFIG_NAME
        self.config: dict[str, Any] = read_json(file) if file.is_file() else {}
        self.sparsity: SparsityConfig | None = read_sparsity_config(self.config)
        groups = group_parts(entries, self.sparsity)
        self._sparse = {name: open_weight(name, self.format, parts) for name, parts in groups.sparse.items()}
        self._stored: dict[str, TensorEntry | SparseWeight] = {**groups.plain, **self._sparse}
        self.files = sorted({entry.file for entry in entries.values()})
        self._digests = None if self.sparsity is None else self.sparsity.digests
        check_digest_names(self._digests, self.files)
        self._unchecked = set(self.files)

    @property
    def format(self) -> CheckpointFormat:
        """How the checkpoint is stored."""
        return CheckpointFormat.DENSE if self.sparsity is None else self.sparsity.format

    @property
    def sparse_names(self) -> frozenset[str]:
        """Names of the tensors that are stored in parts."""
        return frozenset(self._sparse)

    def spec(self, name: str) -> TensorSpec:
        """Kind and size of a dense tensor, without reading it.

        :param name: its name
        """
        stored = self._stored[name]
        return stored.spec if isinstance(stored, SparseWeight) else stored

    def stored(self, name: str) -> TensorEntry | SparseWeight:
        """Where a tensor is, in one piece or in parts.

        :param name: its dense name
        """
        return self._stored[name]

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a dense tensor in pieces, each valid until the next is asked for.

        :param name: its name
        """
        stored = self._checked(name)
        if isinstance(stored, SparseWeight):
            yield tensor_bytes(stored.read())
        else:
            yield from read_bytes(stored)

    def shard(self, name: str) -> int:
        """Number of the file that holds a tensor or, if it is sparse, its values.

        :param name: its dense name
        """
        stored = self._stored[name]
        entry = stored.parts["compressed"] if isinstance(stored, SparseWeight) else stored
        return self.files.index(entry.file)

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._checked(name)
        return stored.read() if isinstance(stored, SparseWeight) else read_tensor(stored)

    def _checked(self, name: str) -> TensorEntry | SparseWeight:
        stored = self._stored[name]
        entries = stored.parts.values() if isinstance(stored, SparseWeight) else (stored,)
        for file in self._unchecked.intersection(entry.file for entry in entries):
            check_digest(self._digests, file, self._sparse.values())
            self._unchecked.remove(file)
        return stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

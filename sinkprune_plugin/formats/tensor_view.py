"""Some tensors of a checkpoint under new names, whole or in part: a checkpoint from which something was removed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from sinkprune_plugin.formats.checkpoint_reader import CheckpointReader
from sinkprune_plugin.formats.files.safetensors_header import TensorSpec
from sinkprune_plugin.formats.files.shard_writer import tensor_bytes

__all__ = ["TensorView", "ViewedTensor"]


@dataclass(frozen=True)
class ViewedTensor:
    """What a tensor of the new checkpoint is in the old one.

    :param name: its name there
    :param rows: indices into its first dimension; None: all of it
    """

    name: str
    rows: tuple[int, ...] | None = None


class TensorView:
    """A :class:`~sinkprune_plugin.formats.files.tensor_source.TensorSource` over tensors of another checkpoint.

    Tensors pass through in pieces, whole or in part; only sparse ones are in memory, one at a time.

    :param reader: the other checkpoint
    :param tensors: new name → what it is there
    """

    def __init__(self, reader: CheckpointReader, tensors: Mapping[str, ViewedTensor]) -> None:
        self._reader = reader
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def spec(self, name: str) -> TensorSpec:
        """See ``TensorSource``."""
        viewed = self._tensors[name]
        spec = self._reader.spec(viewed.name)
        shape = spec.shape if viewed.rows is None else (len(viewed.rows), *spec.shape[1:])
        return TensorSpec(spec.dtype, shape)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """See ``TensorSource``."""
        viewed = self._tensors[name]
        if viewed.rows is None:
            yield from self._reader.chunks(viewed.name)
        elif viewed.name in self._reader.sparse_names or list(viewed.rows) != sorted(set(viewed.rows)):
            yield tensor_bytes(self[name])
        else:
            spec = self._reader.spec(viewed.name)
            yield from _of_rows(self._reader.chunks(viewed.name), spec.nbytes // max(spec.shape[0], 1), viewed.rows)

    def __getitem__(self, name: str) -> torch.Tensor:
        viewed = self._tensors[name]
        tensor = self._reader[viewed.name]
        return tensor if viewed.rows is None else tensor[torch.tensor(viewed.rows, dtype=torch.int64)]


def _of_rows(pieces: Iterator[memoryview], row: int, rows: tuple[int, ...]) -> Iterator[memoryview]:
    """Of a tensor's bytes those of some rows of ``row`` bytes, ascending."""
    begin = 0
    for piece in pieces:
        end = begin + len(piece)
        for number in rows:
            if row * number < end and row * (number + 1) > begin:
                yield piece[max(row * number - begin, 0) : row * (number + 1) - begin]
        begin = end

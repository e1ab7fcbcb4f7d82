"""Where the tensors of a checkpoint to be written come from."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats.files.safetensors_header import TensorEntry, TensorSpec, is_tensor_name
from sinkprune_plugin.formats.files.shard_reader import read_bytes, read_tensor
from sinkprune_plugin.formats.files.shard_writer import spec_of, tensor_bytes, write_at, writing

__all__ = ["MemoryTensors", "SpooledTensors", "TensorSource"]


class TensorSource(Protocol):
    """Dense tensors by name, which can be read more than once."""

    def __iter__(self) -> Iterator[str]: ...

    def spec(self, name: str) -> TensorSpec:
        """Kind and size of a tensor, without reading it."""

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor in pieces, each valid until the next is asked for."""

    def __getitem__(self, name: str) -> torch.Tensor: ...


class MemoryTensors:
    """Tensors that a mapping holds or makes.

    :param tensors: name → tensor
    :raises UsageError: for a tensor that can't be saved
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._specs: dict[str, TensorSpec] = {}
        for name in tensors:
            _check_name(name)
            self._specs[name] = spec_of(tensors[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """See :class:`TensorSource`."""
        return self._specs[name]

    def chunks(self, name: str) -> Iterator[memoryview]:
        """See :class:`TensorSource`."""
        yield tensor_bytes(self._tensors[name])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class SpooledTensors:
    """Tensors that can be read only once, stored on disk so that no more than one is in memory.

    :param tensors: (name, tensor) pairs
    :param directory: where the file lies while it is needed
    :raises UsageError: for a tensor that can't be saved, two of one name, or a full disk
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]], directory: Path) -> None:
        self._entries: dict[str, TensorEntry] = {}
        file, end = directory / "tensors", 0
        with file.open("xb", buffering=0) as stream:
            for name, tensor in tensors:
                _check_name(name)
                if name in self._entries:
                    raise UsageError(f"two tensors are named {name}; give each a name of its own")
                spec = spec_of(tensor, name)
                self._entries[name] = TensorEntry(spec.dtype, spec.shape, name, file, end)
                with writing(file):
                    write_at(stream.fileno(), end, tensor_bytes(tensor))
                end += spec.nbytes

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def spec(self, name: str) -> TensorSpec:
        """See :class:`TensorSource`."""
        return self._entries[name]

    def chunks(self, name: str) -> Iterator[memoryview]:
        """See :class:`TensorSource`."""
        return read_bytes(self._entries[name])

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._entries[name])


def _check_name(name: str) -> None:
    if not is_tensor_name(name):
        raise UsageError(f"'{short(name)}' can't be the name of a tensor; rename it")

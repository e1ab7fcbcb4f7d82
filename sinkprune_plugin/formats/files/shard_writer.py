"""Writing a safetensors file tensor by tensor, and planning which tensors go into which file."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.files.safetensors_header import DTYPE_NAMES, TensorSpec, shard_header
from sinkprune_plugin.formats.files.shard_reader import SINGLE_NAME

__all__ = ["ShardWriter", "shard_names", "spec_of", "split_into_shards", "tensor_bytes", "write_at", "writing"]


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Report in one line what went wrong while a file or directory was written.

    :param file: its path
    :raises UsageError: for a full disk and the like
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{file.name} can't be written: {error.strerror or error}; choose another place or free space"
        ) from error


def spec_of(tensor: torch.Tensor, name: str) -> TensorSpec:
    """Kind and size of a tensor.

    :param tensor: any tensor
    :param name: what to call it in an error
    :raises UsageError: if safetensors can't hold it or it has no values
    """
    if tensor.dtype not in DTYPE_NAMES:
        raise UsageError(f"{name} is {tensor.dtype}, which safetensors can't hold; cast it")
    if tensor.is_meta or tensor.layout != torch.strided:
        kind = "on the meta device and has no values" if tensor.is_meta else f"a {tensor.layout} tensor"
        raise UsageError(f"{name} is {kind}; pass a dense tensor that is in memory")
    return TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The data of a tensor, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_at(descriptor: int, offset: int, data: memoryview) -> None:
    """Write all of the data; a single call writes at most 2 GiB.

    :param descriptor: of a file open for writing
    :param offset: from the start of the file
    :param data: what to write
    """
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


class ShardWriter:
    """A safetensors file whose layout is known and whose tensors come one by one, in any order.

    :param file: file to create
    :param tensors: name → kind and size of each tensor it will hold
    """

    def __init__(self, file: Path, tensors: Mapping[str, TensorSpec]) -> None:
        self.file = file
        self._tensors = tensors
        self._missing = set(tensors)
        header, self._offsets = shard_header(tensors)
        with writing(file):
            self._stream = file.open("xb", buffering=0)
            write_at(self._stream.fileno(), 0, memoryview(header))

    def write(self, name: str, pieces: Iterable[memoryview]) -> None:
        """Write a tensor.

        :param name: its name
        :param pieces: its data, in order
        :raises UsageError: if it isn't of the size announced, or the disk is full
        """
        begin = offset = self._offsets[name]
        for piece in pieces:
            with writing(self.file):
                write_at(self._stream.fileno(), offset, piece)
            offset += len(piece)
        wanted = self._tensors[name].nbytes
        if offset - begin != wanted:
            raise UsageError(
                f"{name} has {offset - begin} bytes and had {wanted} before: it changed meanwhile; try again"
            )
        self._missing.remove(name)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with writing(self.file):
            self._stream.close()
        if kind is None and self._missing:
            raise RuntimeError(f"{self.file.name} was closed without {sorted(self._missing)[:3]}")


def split_into_shards(sizes: Sequence[int], largest: int) -> list[int]:
    """Fill files in order.

    :param sizes: bytes of each item
    :param largest: bytes of a file, kept unless one item alone is larger
    :return: number of each item's file, from 0
    """
    shards: list[int] = []
    number, filled = 0, 0
    for size in sizes:
        if filled and filled + size > largest:
            number, filled = number + 1, 0
        filled += size
        shards.append(number)
    return shards


def shard_names(count: int) -> list[str]:
    """File names, as every loader expects them.

    :param count: number of files
    """
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]

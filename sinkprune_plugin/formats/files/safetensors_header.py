"""Headers of safetensors files: which tensors a file holds, of what dtype and shape, and where their bytes are.

Reading a header here instead of with the library gives the place of every tensor in the file, so that tensors are read
one by one into their own memory, and a shard is never mapped or held as a whole; a file that shrinks meanwhile is a
short read instead of a fatal signal. Writing it here lets a shard grow tensor by tensor. A file so written is the same,
byte for byte, as the library's own.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError, short

__all__ = ["DTYPE_NAMES", "TORCH_DTYPES", "TensorEntry", "TensorSpec", "is_tensor_name", "read_header", "shard_header"]

# Name → bits of an element, in the order in which the library sorts the tensors of a file, last first.
_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_RANK = {name: rank for rank, name in enumerate(_BITS)}

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Name of a dtype in a header → torch's dtype; sub-byte types have none and can only be copied."""

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""torch's dtype → its name in a header."""

# The library's own limit, and far more dimensions than torch can handle.
_LARGEST_HEADER = 100_000_000
_MAX_DIMENSIONS = 64
# torch counts elements in 64 bits, and multiplies the sizes of a tensor that has none as well.
_MOST_ELEMENTS = 1 << 62
# Several times as long as in any model. Messages print names in full.
_LONGEST_NAME = 512
_METADATA = "__metadata__"
_AGAIN = "fetch or write the file again"


@dataclass(frozen=True)
class TensorSpec:
    """Kind and size of a tensor.

    :param dtype: name in a header, such as BF16
    :param shape: its sizes
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return self.elements * _BITS[self.dtype] // 8


@dataclass(frozen=True)
class TensorEntry(TensorSpec):
    """A tensor in a file.

    :param name: its name there
    :param file: the file
    :param begin: offset of its first byte, from the start of the file
    """

    name: str
    file: Path
    begin: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Read and check the header of a file.

    :param file: a safetensors file
    :return: name → entry, in the order of the data
    :raises UsageError: naming file and tensor, if the file isn't whole
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
            if length > min(size - 8, _LARGEST_HEADER):
                raise UsageError(f"{file} has {size} bytes and no safetensors header within; {_AGAIN}")
            text = stream.read(length)
    except OSError as error:
        raise UsageError(f"{file} can't be read: {error.strerror}") from error
    header = _parse(text, file)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict):
        raise UsageError(f"{file}: {_METADATA} in the header isn't a mapping; {_AGAIN}")
    start = 8 + length
    entries = [_entry(name, value, file, start) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.nbytes))
    end = start
    for entry in entries:
        if entry.begin != end:
            raise UsageError(f"{entry.name} in {file} starts at byte {entry.begin} instead of {end}; {_AGAIN}")
        end += entry.nbytes
        if end > size:
            raise UsageError(f"{file} is truncated: {entry.name} ends at byte {end}, the file at {size}; {_AGAIN}")
    if end != size:
        raise UsageError(f"{file} has {size - end} bytes after its last tensor; {_AGAIN}")
    return {entry.name: entry for entry in entries}


def _parse(text: bytes, file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise UsageError(f"{file} has two entries '{short(twice)}' in its header; {_AGAIN}")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} has no readable safetensors header ({type(error).__name__}); {_AGAIN}") from error
    if not isinstance(header, dict):
        raise UsageError(f"{file} has a {type(header).__name__} for a header, not a mapping; {_AGAIN}")
    return header


def is_tensor_name(name: str) -> bool:
    """Whether a tensor may have this name: names are printed, compared and written again, so they have no line breaks,
    no lone surrogates, and a limited length.
    """
    return 0 < len(name) <= _LONGEST_NAME and name.isprintable()


def _entry(name: str, value: Any, file: Path, start: int) -> TensorEntry:
    if not is_tensor_name(name):
        raise UsageError(f"{file}: '{short(name)}' of {len(name)} characters can't be the name of a tensor; {_AGAIN}")
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{name} in {file} lacks dtype, shape or data_offsets; {_AGAIN}") from error
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise UsageError(
            f"{name} in {file} has the unknown dtype '{short(dtype, 40)}'; {_AGAIN} or update this package"
        )
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_size, [*shape, begin, end])):
        raise UsageError(f"{name} in {file} has a shape or data_offsets that aren't sizes; {_AGAIN}")
    if math.prod(max(size, 1) for size in shape) >= _MOST_ELEMENTS:
        raise UsageError(f"{name} in {file} has shape {short(shape)}, which no tensor can have; {_AGAIN}")
    entry = TensorEntry(dtype, tuple(shape), name, file, start + begin)
    if entry.nbytes != end - begin or entry.elements * _BITS[dtype] % 8:
        raise UsageError(
            f"{name} in {file} is {dtype} of shape {short(shape)}, which takes {entry.nbytes} bytes, but has "
            f"{end - begin}; {_AGAIN}"
        )
    return entry


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def shard_header(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """Lay out a file.

    :param tensors: name → kind and size of the tensors it will hold
    :return: everything before the data; name → offset of its first byte, from the start of the file
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name.encode())):
        spec = tensors[name]
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + header[name]["data_offsets"][0] for name in tensors}
    return struct.pack("<Q", len(text)) + text, offsets

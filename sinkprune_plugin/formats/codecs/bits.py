"""Bit masks, and moving the values they mark, one cache-sized piece of a weight at a time.

A mask of shape (R, C) is packed row by row, 8 columns per byte, column ``c`` in bit ``c % 8``; each row starts on a
fresh byte and the bits after the last column are 0. On the CPU, numpy's kernels do the work on bits and find the set
positions without a branch per element, which is several times as fast as any path through torch; on other devices the
same functions are written in torch.
"""

from collections.abc import Iterator

import numpy as np
import torch

__all__ = [
    "bit_counts",
    "count_nonzeros",
    "integer_view",
    "look_up",
    "nonzero_bits",
    "pack",
    "place",
    "row_pieces",
    "select",
    "set_positions",
    "unpack",
    "zeros",
]

# Positions take 8 bytes per set bit: pieces of this size, their mask and their positions fit in a second-level cache.
_PIECE_CPU = 1 << 18
# A device has no such limit; large pieces keep the number of kernel launches low.
_PIECE_DEVICE = 1 << 25

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_POPCOUNT = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)


def zeros(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A result's memory.

    :param count: number of elements
    :param dtype: a signed integer
    :param device: where
    :return: (count,) zeros
    """
    if device.type == "cpu" and count:
        # numpy asks the system for large pages. Touching fresh small ones costs as much as all the work on the bits.
        return torch.from_numpy(np.zeros(count, dtype=f"i{dtype.itemsize}"))
    return torch.zeros(count, dtype=dtype, device=device)


def row_pieces(matrix: torch.Tensor) -> Iterator[tuple[int, int]]:
    """Split a matrix into runs of whole rows.

    :param matrix: (R, C)
    :return: (first row, row after the last) of each run; none if the matrix has no element
    """
    rows, columns = matrix.shape
    size = _PIECE_CPU if matrix.device.type == "cpu" else _PIECE_DEVICE
    step = max(1, size // max(columns, 1))
    for start in range(0, rows if columns else 0, step):
        yield start, min(start + step, rows)


def integer_view(values: torch.Tensor) -> torch.Tensor:
    """The same memory as signed integers of the same width, for which every kernel exists.

    :param values: contiguous tensor with elements of 1, 2 or 4 bytes
    """
    return values.view(_INTEGERS[values.element_size()])


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask.

    :param mask: (R, C) bool
    :return: (R, ceil(C / 8)) uint8
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    return _pack_on_device(mask)


def _pack_on_device(mask: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    places = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.view(mask.shape[0], -1, 8) * places).sum(dim=-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Undo :func:`pack`.

    :param packed: (R, ceil(C / 8)) uint8
    :param columns: C
    :return: (R, C) bool
    """
    if packed.device.type == "cpu":
        each = np.unpackbits(packed.numpy(), axis=-1, count=columns, bitorder="little")
        return torch.from_numpy(each).view(torch.bool)
    return _unpack_on_device(packed, columns)


def _unpack_on_device(packed: torch.Tensor, columns: int) -> torch.Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    each = (packed.unsqueeze(-1) >> places) & 1
    return each.flatten(1)[:, :columns].bool()


def set_positions(mask: torch.Tensor) -> torch.Tensor:
    """Row-major positions of the set elements of a mask, ascending, int64."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().flatten()


def look_up(table: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Replace each byte by its entry in a table of 256.

    :param table: (256,)
    :param packed: uint8 of any shape
    :return: same shape, in the table's dtype
    """
    return table.to(packed.device).index_select(0, packed.flatten().int()).view(packed.shape)


def bit_counts(packed: torch.Tensor) -> torch.Tensor:
    """Set bits of each row.

    :param packed: (R, B) uint8
    :return: (R,) int64
    """
    counts = torch.zeros(packed.shape[0], dtype=torch.int64, device=packed.device)
    for start, stop in row_pieces(packed):
        counts[start:stop] = look_up(_POPCOUNT, packed[start:stop]).sum(dim=1)
    return counts


def nonzero_bits(weight: torch.Tensor) -> torch.Tensor:
    """Packed mask of the elements that differ from zero; minus zero doesn't, NaN does.

    :param weight: (R, C), contiguous, floating or int8
    :return: (R, ceil(C / 8)) uint8
    """
    bits, magnitude = integer_view(weight), _magnitude(weight)
    packed = torch.zeros(weight.shape[0], -(-weight.shape[1] // 8), dtype=torch.uint8, device=weight.device)
    for start, stop in row_pieces(weight):
        packed[start:stop] = pack((bits[start:stop] & magnitude).bool())
    return packed


def _magnitude(values: torch.Tensor) -> int:
    # Comparing bit patterns, the sign bit left out, costs a tenth of comparing half-precision numbers.
    return torch.iinfo(_INTEGERS[values.element_size()]).max if values.is_floating_point() else -1


def select(weight: torch.Tensor, packed: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Values at the set bits, row-major.

    :param weight: (R, C), contiguous
    :param packed: (R, ceil(C / 8)) uint8
    :param counts: (R,) set bits of each row
    :return: (counts.sum(),) in the weight's dtype
    """
    dense = integer_view(weight)
    ends = counts.cumsum(0)
    values = zeros(int(ends[-1]) if len(ends) else 0, dense.dtype, dense.device)
    first = 0
    for start, stop in row_pieces(weight):
        last = int(ends[stop - 1])
        positions = set_positions(unpack(packed[start:stop], weight.shape[1]))
        torch.index_select(dense[start:stop].view(-1), 0, positions, out=values[first:last])
        first = last
    return values.view(weight.dtype)


def place(values: torch.Tensor, packed: torch.Tensor, counts: torch.Tensor, columns: int) -> torch.Tensor:
    """Undo :func:`select`: zeros with the values at the set bits.

    :param values: (counts.sum(),), contiguous
    :param packed: (R, ceil(C / 8)) uint8
    :param counts: (R,) set bits of each row
    :param columns: C
    :return: (R, C) in the values' dtype
    """
    source = integer_view(values)
    dense = zeros(packed.shape[0] * columns, source.dtype, source.device).view(packed.shape[0], columns)
    ends = counts.cumsum(0)
    first = 0
    for start, stop in row_pieces(dense):
        last = int(ends[stop - 1])
        positions = set_positions(unpack(packed[start:stop], columns))
        dense[start:stop].view(-1).scatter_(0, positions, source[first:last])
        first = last
    return dense.view(values.dtype)


def count_nonzeros(values: torch.Tensor) -> int:
    """Count the elements that differ from zero, as :func:`nonzero_bits` does.

    :param values: 1-D, contiguous, floating or int8
    :return: their number
    """
    column, magnitude = integer_view(values).unsqueeze(1), _magnitude(values)
    pieces = row_pieces(column)
    return sum(int(torch.count_nonzero(column[start:stop] & magnitude)) for start, stop in pieces)

"""The format ``sparse-24-bitmask``: two values of every four, and a bit for every weight.

For a dense weight of shape (R, C), C a multiple of 4, with at most two non-zeros in each group of four columns:

- ``shape`` (2, 1) int64: R and C
- ``compressed`` (R, C / 2) in the weight's dtype: two values for each group, in column order
- ``bitmask`` (R, ceil(C / 8)) uint8: which they are, exactly two bits for each group

A group with fewer than two non-zeros is filled up with zeros. Which ones makes no difference to a reader; this writer
takes those that compressed-tensors took, so that its files are the same byte for byte. docs/format.md is the normative
text.
"""

from collections.abc import Mapping

import torch

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats.codecs import bits
from sinkprune_plugin.formats.codecs.format_names import CheckpointFormat
from sinkprune_plugin.formats.files.part_checks import DAMAGED, check_bitmask, check_weight, dense_shape, require_parts

__all__ = ["compress", "decompress", "excess_groups"]

# Mask of a group's non-zeros → mask of its stored values, bit 0 being the first column.
_FILLED = {
    0b0000: 0b1100,
    0b0001: 0b0101,
    0b0010: 0b1010,
    0b0100: 0b1100,
    0b1000: 0b1100,
}


def _fill(group: int) -> int:
    return _FILLED.get(group, group)


# The same for the two groups of a byte, and how many of them have too many bits or not exactly two.
_FILLED_BYTES = torch.tensor([_fill(byte & 15) | _fill(byte >> 4) << 4 for byte in range(256)], dtype=torch.uint8)
_COUNTS = [((byte & 15).bit_count(), (byte >> 4).bit_count()) for byte in range(256)]
_EXCESS = torch.tensor([(low > 2) + (high > 2) for low, high in _COUNTS], dtype=torch.uint8)
_NOT_TWO = torch.tensor([(low != 2) + (high != 2) for low, high in _COUNTS], dtype=torch.uint8)


def excess_groups(packed: torch.Tensor) -> int:
    """Count the groups of four columns with more than two bits set.

    :param packed: (R, B) uint8, a packed mask
    :return: their number; a weight with that mask fits the format if it is 0 and its width a multiple of 4
    """
    return _total(_EXCESS, packed)


def _total(table: torch.Tensor, packed: torch.Tensor) -> int:
    pieces = bits.row_pieces(packed)
    return sum(int(bits.look_up(table, packed[start:stop]).sum()) for start, stop in pieces)


def compress(weight: torch.Tensor, *, name: str = "weight") -> dict[str, torch.Tensor]:
    """Split a weight into its parts. The weight isn't changed.

    :param weight: (R, C) float32, bfloat16, float16, int8 or float8_e4m3fn
    :param name: what to call the weight in an error
    :return: local name → part, on the weight's device
    :raises UsageError: if the weight can't be stored sparse or isn't 2:4
    """
    weight = check_weight(weight, name)
    rows, columns = weight.shape
    if columns % 4:
        raise UsageError(
            f"{name} has {columns} columns, {CheckpointFormat.SPARSE_24_BITMASK} needs a multiple of 4; use "
            f"{CheckpointFormat.SPARSE_BITMASK}"
        )
    if not columns:
        return {
            "compressed": weight.new_empty(rows, 0),
            "bitmask": weight.new_empty(rows, 0, dtype=torch.uint8),
            "shape": torch.tensor([[rows], [0]], dtype=torch.int64, device=weight.device),
        }
    bitmask = bits.nonzero_bits(weight)
    excess = excess_groups(bitmask)
    if excess:
        raise UsageError(
            f"{name} isn't 2:4: {excess} of its {rows * columns // 4} groups of 4 have more than 2 non-zeros; use "
            f"{CheckpointFormat.SPARSE_BITMASK} or prune it with mask_structure 2:4"
        )
    for start, stop in bits.row_pieces(bitmask):
        bitmask[start:stop] = bits.look_up(_FILLED_BYTES, bitmask[start:stop])
    if columns % 8:
        # The last byte of a row holds one group; its other half is padding, not a group of zeros.
        bitmask[:, -1] &= 0b1111
    counts = torch.full((rows,), columns // 2, device=weight.device)
    return {
        "compressed": bits.select(weight, bitmask, counts).view(rows, columns // 2),
        "bitmask": bitmask,
        "shape": torch.tensor([[rows], [columns]], dtype=torch.int64, device=weight.device),
    }


def decompress(parts: Mapping[str, torch.Tensor], *, name: str = "weight") -> torch.Tensor:
    """Rebuild a weight from its parts. The parts aren't changed.

    :param parts: local name → part
    :param name: what to call the weight in an error
    :return: (R, C) the dense weight, in the dtype and on the device of ``compressed``
    :raises UsageError: if the parts contradict each other; nothing of the dense size is allocated before that
    """
    require_parts(parts, CheckpointFormat.SPARSE_24_BITMASK.parts, name)
    sizes = dense_shape(parts["shape"], name)
    if len(sizes) != 2:
        raise UsageError(f"{name}: shape says {sizes}, a 2:4 weight has 2 dimensions; {DAMAGED}")
    rows, columns = sizes
    packed = check_bitmask(parts["bitmask"], sizes, name)
    compressed = parts["compressed"]
    if columns % 2 or rows * columns % 4 or list(compressed.shape) != [rows, columns // 2]:
        raise UsageError(
            f"{name}: shape says {sizes}, but compressed has shape {short(list(compressed.shape))} instead of half "
            f"as many columns; {DAMAGED}"
        )
    if not columns:
        # Such rows take no bytes in a file, so there may be any number of them: nothing of that size is made.
        return compressed.new_empty(sizes)
    wrong = _groups_without_two(packed, columns)
    if wrong:
        raise UsageError(f"{name}: {wrong} groups of 4 in bitmask don't have exactly 2 bits set; {DAMAGED}")
    if columns % 4:
        counts = bits.bit_counts(packed)
    else:
        counts = torch.full((rows,), columns // 2, device=packed.device)
    return bits.place(compressed.reshape(-1), packed, counts, columns)


def _groups_without_two(packed: torch.Tensor, columns: int) -> int:
    if columns % 4:
        # The old writer let groups of four run over the end of a row.
        return int((bits.unpack(packed, columns).view(-1, 4).sum(dim=1) != 2).sum())
    if columns % 8:
        packed = packed.clone()
        packed[:, -1] |= 0b0011_0000
    return _total(_NOT_TWO, packed)

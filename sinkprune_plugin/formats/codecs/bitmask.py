"""The format ``sparse-bitmask``: a bit for every weight, and the values of those that aren't zero.

For a dense weight of shape (R, C):

- ``shape`` (2,) int64: R and C
- ``compressed`` (nnz,) in the weight's dtype: the non-zero values, row-major
- ``bitmask`` (R, ceil(C / 8)) uint8: which they are, packed as :mod:`~sinkprune_plugin.formats.codecs.bits` describes
- ``row_offsets`` (R,) int64: where each row's values start in ``compressed``

The layout is that of compressed-tensors 0.9 to 0.14; docs/format.md is the normative text.
"""

import math
from collections.abc import Mapping

import torch

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats.codecs import bits
from sinkprune_plugin.formats.codecs.format_names import CheckpointFormat
from sinkprune_plugin.formats.files.part_checks import DAMAGED, check_bitmask, check_weight, dense_shape, require_parts

__all__ = ["compress", "decompress"]


def compress(weight: torch.Tensor, *, name: str = "weight") -> dict[str, torch.Tensor]:
    """Split a weight into its parts. The weight isn't changed.

    :param weight: (R, C) float32, bfloat16, float16, int8 or float8_e4m3fn
    :param name: what to call the weight in an error
    :return: local name → part, on the weight's device
    :raises UsageError: if the weight can't be stored sparse
    """
    weight = check_weight(weight, name)
    bitmask = bits.nonzero_bits(weight)
    counts = bits.bit_counts(bitmask)
    return {
        "compressed": bits.select(weight, bitmask, counts),
        "bitmask": bitmask,
        "shape": torch.tensor(weight.shape, dtype=torch.int64, device=weight.device),
        "row_offsets": counts.cumsum(0) - counts,
    }


def decompress(parts: Mapping[str, torch.Tensor], *, name: str = "weight") -> torch.Tensor:
    """Rebuild a weight from its parts. The parts aren't changed.

    Besides matrices it takes what compressed-tensors before 0.9 made of other tensors.

    :param parts: local name → part
    :param name: what to call the weight in an error
    :return: the dense weight, in the dtype and on the device of ``compressed``
    :raises UsageError: if the parts contradict each other; nothing of the dense size is allocated before that
    """
    require_parts(parts, CheckpointFormat.SPARSE_BITMASK.parts, name)
    sizes = dense_shape(parts["shape"], name)
    packed = check_bitmask(parts["bitmask"], sizes, name)
    # Rows take no bytes in a mask without columns, but their offsets do: the row count is limited by what is stored.
    _check_offsets_shape(parts["row_offsets"], sizes, name)
    counts = bits.bit_counts(packed)
    compressed, count = parts["compressed"], int(counts.sum())
    if list(compressed.shape) != [count]:
        raise UsageError(
            f"{name}: bitmask has {count} bits set, but compressed holds values of shape "
            f"{short(list(compressed.shape))}; {DAMAGED}"
        )
    _check_offsets(parts["row_offsets"], counts, sizes, name)
    return bits.place(compressed.contiguous(), packed, counts, sizes[-1]).view(sizes)


def _check_offsets_shape(row_offsets: torch.Tensor, sizes: list[int], name: str) -> None:
    if list(row_offsets.shape) != sizes[:-1]:
        raise UsageError(
            f"{name}: row_offsets has shape {short(list(row_offsets.shape))}, the weight has "
            f"{math.prod(sizes[:-1])} rows; {DAMAGED}"
        )


def _check_offsets(row_offsets: torch.Tensor, counts: torch.Tensor, sizes: list[int], name: str) -> None:
    if len(sizes) > 2:
        # The old writer summed along the first axis only; such offsets say nothing.
        return
    wrong = (row_offsets.flatten() != counts.cumsum(0) - counts).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise UsageError(
            f"{name}: row_offsets[{row}] is {int(row_offsets.flatten()[row])}, but {int(counts[:row].sum())} bits are "
            f"set above that row; {DAMAGED}"
        )

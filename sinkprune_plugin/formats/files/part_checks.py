"""What both sparse formats require of a weight to be compressed and of the parts to be decompressed."""

import math
from collections.abc import Mapping, Sequence

import torch

from sinkprune_plugin.errors import UsageError, short

__all__ = ["DAMAGED", "VALUE_DTYPES", "check_bitmask", "check_weight", "dense_shape", "require_parts"]

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
"""What a sparse weight's values may be; always the dense weight's own dtype."""

DAMAGED = "the checkpoint is damaged, fetch or write it again"
"""The remedy for parts that contradict each other."""

# Any real weight has at most five dimensions (a 3-D convolution).
_MAX_DIMENSIONS = 8


def check_weight(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Check that a weight can be stored sparse.

    :param weight: anything
    :param name: what to call it in an error
    :return: the weight, detached and contiguous; the same memory where it was contiguous
    :raises UsageError: if it isn't a 2-D dense tensor with data, of one of ``VALUE_DTYPES``
    """
    if weight.dim() != 2:
        raise UsageError(f"{name} has {weight.dim()} dimensions, a sparse weight needs 2; leave it dense")
    if weight.dtype not in VALUE_DTYPES:
        raise UsageError(
            f"{name} is {_names([weight.dtype])}, sparse formats hold {_names(VALUE_DTYPES)}; cast it or leave it dense"
        )
    if weight.layout != torch.strided:
        raise UsageError(f"{name} is a {weight.layout} tensor; pass weight.to_dense()")
    if weight.is_meta:
        raise UsageError(f"{name} is on the meta device and has no values; load it first")
    return weight.detach().contiguous()


def require_parts(parts: Mapping[str, torch.Tensor], wanted: Sequence[str], name: str) -> None:
    """Check that the parts are there, have data and have the dtypes that the formats prescribe.

    :param parts: local name → tensor
    :param wanted: local names
    :param name: what to call the weight in an error
    :raises UsageError: naming the part
    """
    for part in wanted:
        if part not in parts:
            raise UsageError(f"{name}: part {part} is missing; {DAMAGED}")
        tensor = parts[part]
        dtypes = {"compressed": VALUE_DTYPES, "bitmask": (torch.uint8,)}.get(part, (torch.int64,))
        if tensor.dtype not in dtypes:
            raise UsageError(f"{name}: {part} is {_names([tensor.dtype])}, it must be {_names(dtypes)}; {DAMAGED}")
        if tensor.is_meta:
            raise UsageError(f"{name}: {part} is on the meta device and has no values; load it first")


def dense_shape(shape: torch.Tensor, name: str) -> list[int]:
    """Read the part ``shape``, whether a list or a column.

    :param shape: (ndim,) or (ndim, 1) int64
    :param name: what to call the weight in an error
    :return: the sizes
    :raises UsageError: if they aren't those of a weight
    """
    if not 1 <= shape.numel() <= _MAX_DIMENSIONS:
        raise UsageError(f"{name}: shape has {shape.numel()} entries, a weight has 2; {DAMAGED}")
    sizes: list[int] = shape.flatten().tolist()
    # torch counts elements in 64 bits.
    if min(sizes) < 0 or math.prod(max(size, 1) for size in sizes) >= 1 << 62:
        raise UsageError(f"{name}: shape says {sizes}, which no tensor can have; {DAMAGED}")
    return sizes


def check_bitmask(bitmask: torch.Tensor, sizes: Sequence[int], name: str) -> torch.Tensor:
    """Check a mask against the shape, before anything of that shape is allocated.

    :param bitmask: (…, ceil(C / 8)) uint8
    :param sizes: the dense shape (…, C)
    :param name: what to call the weight in an error
    :return: (R, ceil(C / 8)), contiguous, with R the product of all sizes but the last
    :raises UsageError: if the mask has another shape or a bit set after the last column
    """
    rows, columns = math.prod(sizes[:-1]), sizes[-1]
    width = -(-columns // 8)
    if list(bitmask.shape) != [*sizes[:-1], width]:
        raise UsageError(
            f"{name}: shape says {list(sizes)}, which needs a bitmask of {[*sizes[:-1], width]}, but it is "
            f"{short(list(bitmask.shape))}; {DAMAGED}"
        )
    packed = bitmask.reshape(rows, width).contiguous()
    if columns % 8 and bool((packed[:, -1] >> columns % 8).any()):
        raise UsageError(f"{name}: bitmask has bits set after the last column {columns - 1}; {DAMAGED}")
    return packed


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

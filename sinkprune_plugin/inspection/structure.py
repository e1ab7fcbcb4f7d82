"""The structure of a weight's zeros: none, unstructured, or N of every M successive columns.

Any weight with enough zeros has some in every group: at 90 % unstructured, each sixteen columns hold a handful. That
every group has N zeros is necessary, and verified on all groups, but not sufficient: N:M must also explain most of the
zeros, and their distribution over the groups must be practically impossible by chance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from sinkprune_plugin.formats.codecs import bits

__all__ = ["DENSE", "MIXED", "UNSTRUCTURED", "ZERO", "ZeroCount", "common_structure", "count_zeros", "structure_of"]

DENSE = "dense"
"""No more zeros than weights have without pruning."""

UNSTRUCTURED = "unstructured"
"""Zeros anywhere."""

ZERO = "zero"
"""Nothing but zeros, which fits every structure."""

MIXED = "mixed"
"""Several weights without a structure that all of them have."""

_WIDTHS = range(2, 17)
# A weight of 16 columns with 8 zeros in each row is formally 8:16; wide groups need several per row.
_ANY_WIDTH = 4
# N:M followed by rounding or dead channels has a few more zeros than N/M; an unstructured weight's emptiest group has
# far fewer than the mean.
_LEAST_SHARE = 0.75
# In nats: a weight without structure passes once in e^10 = 22 000.
_LEAST_EVIDENCE = 10.0
# Share of zeros without pruning. Rounding to 8 bits makes more of them, in int8 by far the most.
_NATURAL = 0.05
_NATURAL_8_BIT = 0.25

Histogram = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ZeroCount:
    """What was counted in one weight, or in several.

    :param weights: number of elements
    :param zeros: how many of them are zero
    :param natural: how many may be zero without pruning
    :param groups: group width M → (M + 1,) number of groups with 0 … M zeros; only widths that may have a structure
    """

    weights: int = 0
    zeros: int = 0
    natural: float = 0.0
    groups: Mapping[int, Histogram] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.weights if self.weights else 0.0

    @staticmethod
    def total(counts: Sequence["ZeroCount"]) -> "ZeroCount":
        """Add up several counts, with the group widths that all of them have.

        :param counts: of single weights
        """
        filled = [count for count in counts if count.weights]
        widths = set.intersection(*(set(count.groups) for count in filled)) if filled else set()
        return ZeroCount(
            sum(count.weights for count in filled),
            sum(count.zeros for count in filled),
            sum(count.natural for count in filled),
            {width: np.sum([count.groups[width] for count in filled], axis=0) for width in sorted(widths)},
        )


def count_zeros(weight: torch.Tensor) -> ZeroCount:
    """Count the zeros of a weight and of its groups of successive columns. −0.0 is a zero, NaN isn't.

    :param weight: (R, C) of any dtype, float8 included, on the CPU
    :return: the counts
    """
    if not weight.numel():
        # There may be any number of rows without columns; nothing is counted for each.
        return ZeroCount()
    packed = _nonzero_bits(weight.contiguous())
    columns = weight.shape[1]
    zeros = weight.numel() - int(bits.bit_counts(packed).sum())
    natural = weight.numel() * (_NATURAL_8_BIT if weight.element_size() == 1 else _NATURAL)
    alive = {
        width: np.zeros(width + 1, dtype=np.int64)
        for width in _WIDTHS
        if columns % width == 0 and (width <= _ANY_WIDTH or columns >= 4 * width)
    }
    least = _LEAST_SHARE * zeros / max(weight.numel(), 1)
    for start, stop in bits.row_pieces(weight) if zeros else ():
        empty = ~bits.unpack(packed[start:stop], columns).numpy()
        for width, histogram in list(alive.items()):
            each = _group_sums(empty, width)
            # One group with too few zeros settles it, which spares all later pieces.
            if int(each.min()) < max(1, least * width):
                del alive[width]
                continue
            histogram += np.bincount(each.reshape(-1), minlength=width + 1)
        if not alive:
            break
    return ZeroCount(weight.numel(), zeros, natural, alive if zeros else {})


def _nonzero_bits(weight: torch.Tensor) -> torch.Tensor:
    if weight.dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        # These have one zero; the pattern of a minus zero is their NaN.
        return bits.pack(weight.view(torch.uint8) != 0)
    if weight.dtype == torch.float8_e8m0fnu:
        return bits.pack(torch.ones(weight.shape, dtype=torch.bool))  # powers of two: there is no zero
    if weight.element_size() > 4:
        return bits.pack(weight != 0)
    return bits.nonzero_bits(weight)


def _group_sums(mask: npt.NDArray[np.bool_], width: int) -> npt.NDArray[np.uint8]:
    # Adding strided columns is several times as fast as a sum over a short last axis.
    sums = mask[:, ::width].astype(np.uint8)
    for column in range(1, width):
        sums += mask[:, column::width]
    return sums


def structure_of(count: ZeroCount) -> str:
    """Name the structure of a weight's zeros.

    :param count: what was counted in it
    :return: ``N:M`` (N zeros or more in each M successive columns), or ``unstructured``, ``dense``, ``zero``
    """
    if count.weights and count.zeros == count.weights:
        return ZERO
    found = _find_pattern(count)
    if found is not None:
        return _name(found)
    return UNSTRUCTURED if count.zeros > count.natural else DENSE


def common_structure(counts: Sequence[ZeroCount]) -> str:
    """Name the tightest structure that all of several weights have.

    :param counts: of single weights
    :return: as :func:`structure_of`, or ``mixed``
    """
    total = ZeroCount.total(counts)
    if total.weights and total.zeros == total.weights:
        return ZERO
    found = _find_pattern(total)
    if found is not None:
        return _name(found)
    names = {structure_of(count) for count in counts if count.weights} - {ZERO}
    if names and all(":" in name for name in names):
        # Each is N:M beyond doubt, so chance need not be ruled out again.
        common = [(_least(histogram), width) for width, histogram in total.groups.items()]
        return _name(max(common, key=lambda nm: (nm[0] / nm[1], -nm[1]))) if common else MIXED
    if len(names) > 1:
        return MIXED
    return names.pop() if names else DENSE


def _find_pattern(count: ZeroCount) -> tuple[int, int] | None:
    """The tightest N:M in which every group has N zeros, that explains most of the zeros and isn't chance."""
    best: tuple[int, int] | None = None
    for width, histogram in sorted(count.groups.items()):
        least = _least(histogram)
        if not 0 < least < width or least / width < _LEAST_SHARE * count.sparsity:
            continue
        # Most groups have N zeros and no more: of a 2:4 weight with one broken group, wider groups aren't a structure.
        if int(histogram.argmax()) != least:
            continue
        if best is not None and (width % best[1] or least * best[1] <= best[0] * width):
            continue
        if _evidence(count, best, width) >= _LEAST_EVIDENCE:
            best = least, width
    return best


def _evidence(count: ZeroCount, known: tuple[int, int] | None, width: int) -> float:
    """−log of the chance that all groups lie in the range they lie in.

    Given a known structure of narrower groups and no other, a group is several independent draws of these; without one,
    it is ``width`` independent elements.
    """
    narrow = np.array([1 - count.sparsity, count.sparsity])
    if known is not None:
        narrow = count.groups[known[1]] / count.groups[known[1]].sum()
    chances = np.ones(1)
    for _ in range(width // (len(narrow) - 1)):
        chances = np.convolve(chances, narrow)
    histogram = count.groups[width]
    inside = float(chances[list(_range(histogram))].sum())
    return -int(histogram.sum()) * math.log(min(max(inside, 1e-300), 1.0))


def _range(histogram: Histogram) -> range:
    filled = np.flatnonzero(histogram)
    return range(int(filled[0]), int(filled[-1]) + 1)


def _least(histogram: Histogram) -> int:
    return _range(histogram).start


def _name(pattern: tuple[int, int]) -> str:
    return f"{pattern[0]}:{pattern[1]}"

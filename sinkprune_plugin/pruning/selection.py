"""The k smallest entries of a matrix that is only ever held in chunks of rows. Torch only."""

from collections.abc import Callable, Sequence

import torch

__all__ = ["mark_smallest"]

# A non-negative float32 orders like its bits read as an integer: 16 high bits first, then 16 low bits.
_BINS = 1 << 16


def mark_smallest(
    scores: Callable[[slice], torch.Tensor], chunks: Sequence[slice], count: int, mask: torch.Tensor
) -> None:
    """Set ``mask`` to True at exactly the ``count`` smallest scores and to False elsewhere.

    Exact with any chunks: two histograms find the bits of the threshold, and of entries that equal it the first in
    row-major order are taken. ``scores`` is called three times per chunk, once if there is only one; nothing of the
    matrix' size is held beyond a chunk.

    :param scores: gives the (rows, C) float32 scores ≥ 0 of a chunk; inf for an entry that must stay False
    :param chunks: slices of rows, in order
    :param count: entries to mark, at most the number of finite scores
    :param mask: (rows, C) bool, overwritten
    """
    if count == 0:
        mask.zero_()
        return
    device = mask.device
    whole = _bits(scores, chunks[0]) if len(chunks) == 1 else None

    def bits_of(rows: slice) -> torch.Tensor:
        return _bits(scores, rows) if whole is None else whole

    high_counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
    for rows in chunks:
        high_counts += torch.bincount((bits_of(rows) >> 16).flatten(), minlength=_BINS)
    high, below = _bin_of(high_counts, count)
    low_counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
    for rows in chunks:
        bits = bits_of(rows)
        low_counts += torch.bincount(bits[bits >> 16 == high] & (_BINS - 1), minlength=_BINS)
    low, below_low = _bin_of(low_counts, count - below)
    threshold = (high << 16) | low
    # How many entries that equal the threshold are still wanted, and whether that is not all of them.
    wanted = count - below - below_low
    split = wanted < int(low_counts[low])
    for rows in chunks:
        bits = bits_of(rows)
        if not split:
            mask[rows] = bits <= threshold
            continue
        equal = bits == threshold
        taken = equal & (equal.flatten().cumsum(0).view_as(equal) <= wanted)
        mask[rows] = (bits < threshold) | taken
        wanted -= int(taken.sum())


def _bits(scores: Callable[[slice], torch.Tensor], rows: slice) -> torch.Tensor:
    return scores(rows).contiguous().view(torch.int32)


def _bin_of(counts: torch.Tensor, count: int) -> tuple[int, int]:
    """Bin that holds the ``count``-th smallest entry, and how many entries lie in bins below it."""
    ends = counts.cumsum(0)
    index = int(torch.searchsorted(ends, count))
    return index, int(ends[index] - counts[index])

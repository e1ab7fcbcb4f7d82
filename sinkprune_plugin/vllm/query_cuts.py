"""Queries cut where blocks of a context begin, so that attention runs each block as a sequence of its own.

A token of a block-causal context sees its own block and those before. An attention kernel that looks in both directions
over a sequence's keys computes that for a query of one block, if the sequence ends with it. Several such sequences may
share their pages, and all keys of a step are written before attention in each layer. So a query of n blocks is given to
the kernel as n sequences, and one forward pass reads a prompt of any length.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["DeviceCuts", "QueryCuts", "cut_queries"]

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class QueryCuts:
    """The parts of all queries of a step, S of them.

    :param request: (S,) int64, whose query it is a part of; ascending
    :param starts: (S + 1,) int64, where each begins in the tokens of the step, and where the last one ends
    :param ends: (S,) int64, positions before the end of each within its request, all of which it sees
    """

    request: Ints
    starts: Ints
    ends: Ints

    @property
    def widest(self) -> int:
        """Tokens of the longest part."""
        return int(np.diff(self.starts).max())


@dataclass(frozen=True)
class DeviceCuts:
    """The same on the device.

    :param host: the same on the host
    :param request: (S,) int64
    :param starts: (S + 1,) int32
    :param ends: (S,) int32
    """

    host: QueryCuts
    request: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor


def cut_queries(computed: Ints, query: Ints, block: Ints) -> QueryCuts | None:
    """Cut queries at the multiples of their block lengths.

    :param computed: (num_reqs,) positions before each query
    :param query: (num_reqs,) its tokens, at least one
    :param block: (num_reqs,) its block length; 0: it isn't cut
    :return: the parts; None if no query is cut
    """
    end = computed + query
    length = np.where(block > 0, block, end)
    first = computed // length
    parts = (end - 1) // length - first + 1
    if (parts <= 1).all():
        return None
    request = np.repeat(np.arange(len(query)), parts)
    number = np.arange(len(request)) - np.repeat(np.cumsum(parts) - parts, parts)
    ends = np.minimum((first[request] + number + 1) * length[request], end[request])
    begins = np.maximum((first[request] + number) * length[request], computed[request])
    return QueryCuts(request, np.concatenate([[0], np.cumsum(ends - begins)]), ends)

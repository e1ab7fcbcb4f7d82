"""The table that describes a batch to the sampler: one row of 64-bit numbers for each request, one copy to the device.

Host and device, numpy, torch and Triton read the same layout, whose columns are named here. Floating-point columns hold
the bits of a float64.
"""

from enum import IntEnum

import numpy as np

__all__ = ["FLOATS", "Column", "Ints", "floats_of"]

Ints = np.ndarray[tuple[int, int], np.dtype[np.int64]]


class Column(IntEnum):
    """Columns of the table."""

    SLOT = 0
    """The request's slot, which canvas and progress are kept under."""
    WIDTH = 1
    """Positions of its open block; 0 if only its prompt is run."""
    FIRST_ROW = 2
    """Where its rows of logits begin."""
    ROWS = 3
    """How many it has: at least as many as positions are masked."""
    FIRST_HIDDEN = 4
    """Where its canvas begins in the hidden states of all canvases."""
    COUNT = 5
    """Tokens to unmask."""
    NOISE_STEP = 6
    """Number of the noise's step."""
    START = 7
    """Position in prompt and canvas at which the block begins."""
    REJECTED = 8
    """Query positions to compute again while the block is open."""
    REJECTED_FINISHED = 9
    """The same when it is finished."""
    IS_LAST = 10
    """1 if the block is the last."""
    HIDDEN_SUFFIX = 11
    """Positions after the query that attention must see as well."""
    STATE_BEFORE = 12
    """Where the hidden state of the position before the block is kept, for models with shifted logits."""
    SEED = 13
    REMASKING = 14
    """Index in :data:`~sinkprune_plugin.sampling.options.REMASKINGS`."""
    COMMITS = 15
    """1 if a finished block has to be run once more for its keys and values."""
    EARLY_STOP = 16
    """1 if a block may end as soon as its end-of-sequence token is settled."""
    TOP_K = 17
    TEMPERATURE = 18
    """float64; 0 takes the most likely token."""
    THRESHOLD = 19
    """float64; infinite for none."""
    FACTOR = 20
    """float64; 0 for none."""
    TOP_P = 21
    """float64; 1 for all."""


FLOATS = (Column.TEMPERATURE, Column.THRESHOLD, Column.FACTOR, Column.TOP_P)


def floats_of(table: Ints) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The same memory as float64, for the columns :data:`FLOATS`.

    :param table: (R, columns) int64, contiguous
    :return: a view
    """
    return table.view(np.float64)

"""Hidden states moved by one position, for models whose logits at position i predict token i + 1 (Dream).

The first row of a query that begins after position 0 needs the hidden state of a position that isn't in the batch. It
is the one from the step that computed the kept keys and values: as stale as those, and fresh where nothing is kept.
"""

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from sinkprune_plugin.vllm.step_plan import BatchLayout

__all__ = ["BoundaryStates", "LogitShift"]


class LogitShift:
    """Callable of one step: (T, d) hidden states to (T, d), row i holding what predicts token i.

    :param boundary: (slots, d), updated by the call
    :param source: (T,) row of the concatenation of hidden states and boundary states of each result row
    :param save: (2, K) slot and row of the hidden states to be kept for later steps
    """

    def __init__(self, boundary: torch.Tensor, source: torch.Tensor, save: torch.Tensor) -> None:
        self._boundary = boundary
        self._source = source
        self._save = save

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Shift.

        :param hidden: (T, d); rows after the batch's tokens are padding
        :return: (T, d)
        """
        tokens = len(self._source)
        shifted = torch.cat([hidden[:tokens], self._boundary])[self._source]
        slots, rows = self._save
        self._boundary[slots] = hidden[rows]
        return torch.cat([shifted, hidden[tokens:]])


class BoundaryStates:
    """The hidden state before each slot's canvas, and the shift of each step.

    :param slots: number of slots
    :param width: d
    :param dtype: of the model
    :param device: of the model
    """

    def __init__(self, slots: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._states = torch.zeros(2 * slots, width, dtype=dtype, device=device)
        self._slots = slots
        # Cache commit: the last row of the last query, which is the one before the canvas as soon as a block is done.
        self._canvas_start = np.full(slots, -1, np.int64)
        self._half = np.zeros(slots, np.int64)

    def shift(self, batch: BatchLayout) -> LogitShift:
        """Prepare a step.

        :param batch: what was scheduled
        :return: the step's shift
        """
        slots, computed, query, canvas = batch.slots, batch.computed, batch.query, batch.canvas
        begin = np.cumsum(query) - query
        start = computed + query - canvas
        # Each slot has two states: the one before its canvas, and the last row of its last query. They are swapped when
        # the canvas moves on (for the first time after the prompt), since the last query ended where it begins.
        marked = np.where(canvas > 0, start, -1)
        moved = self._canvas_start[slots] != marked
        self._half[slots] = np.where(moved, 1 - self._half[slots], self._half[slots])
        self._canvas_start[slots] = marked
        before = slots + self._slots * self._half[slots]
        other = slots + self._slots * (1 - self._half[slots])
        tokens = int(query.sum())
        source = np.arange(tokens) - 1
        source[begin] = np.where(computed > 0, tokens + before, begin)
        inside = (computed < start) & (canvas > 0)
        save = np.concatenate(
            [
                np.stack([other, begin + query - 1]),
                np.stack([before, begin + start - computed - 1])[:, inside],
            ],
            axis=1,
        )
        device = self._states.device
        return LogitShift(
            self._states,
            async_tensor_h2d(source, device=device),
            async_tensor_h2d(np.ascontiguousarray(save), device=device),
        )

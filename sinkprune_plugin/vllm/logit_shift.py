"""Models whose logits at position i predict token i + 1 (Dream): which hidden state predicts a block's first token.

It is that of the position before the canvas, which often isn't in the batch. Then it is the one from the step that
computed the kept keys and values: as stale as those, and fresh where nothing is kept.
"""

from typing import Any

import numpy as np
import torch

from sinkprune_plugin.sampling.batch_table import Column
from sinkprune_plugin.vllm.step_plan import BatchLayout, Ints

__all__ = ["BoundaryStates", "StateKeeper"]


class StateKeeper:
    """Callable of one step on the (T, d) hidden states of the batch, which it returns as they are.

    :param states: (·, d), updated by the call
    :param places: (K,) int64, where hidden states are kept
    :param rows: (K,) int64, of the hidden states to keep
    """

    def __init__(self, states: torch.Tensor, places: torch.Tensor, rows: torch.Tensor) -> None:
        self._states, self._places, self._rows = states, places, rows

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Keep what later steps need.

        :param hidden: (T, d)
        :return: the same
        """
        self._states[self._places] = hidden[self._rows]
        return hidden


class BoundaryStates:
    """The hidden state before each slot's canvas.

    :param slots: number of slots
    :param width: d
    :param dtype: of the model
    :param device: of the model
    """

    def __init__(self, slots: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.states = torch.zeros(2 * slots, width, dtype=dtype, device=device)
        self._slots = slots
        # Cache commit: the last row of the last query, which is the one before the canvas as soon as a block is done.
        self._canvas_start = np.full(slots, -1, np.int64)
        self._half = np.zeros(slots, np.int64)

    def plan(self, batch: BatchLayout, table: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[Ints, Ints]:
        """Plan a step.

        :param batch: what was scheduled
        :param table: the step's table, whose column ``STATE_BEFORE`` is filled in
        :return: places and rows for :class:`StateKeeper`
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
        table[:, Column.STATE_BEFORE] = before
        inside = (computed < start) & (canvas > 0)
        places = np.concatenate([other, before[inside]])
        return places, np.concatenate([begin + query - 1, (begin + start - computed - 1)[inside]])

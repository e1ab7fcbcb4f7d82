"""What one step does to each request: host arithmetic only, so that no step has to wait for the device to plan it.

Notation: a request has P prompt tokens and a generation of G tokens in blocks of L. Its canvas begins at absolute
position ``start`` = P + tokens emitted so far, and its block is the first ``width`` positions of the canvas. A step
runs the model on the query positions [computed, computed + query).

=========  ===========================================  ======================  =========================
cache      query of a step                              computed after a step   after a block's last step
=========  ===========================================  ======================  =========================
none       [0, P + G)                                   0                       0
prefix     first of a block [0, P + G), then [start, )   start                   0
dual       first of a block [0, P + G), then the block  start                   0
commit     the block; once more when it is finished     opened                  start + width
=========  ===========================================  ======================  =========================

A block begins at ``opened``, which is ``start`` unless blocks lie on a grid over prompt and generation: then the first
one may begin within the prompt, and its tokens there are run with it. Such a request's context is block-causal, and
its queries are cut into blocks (:mod:`~sinkprune_plugin.vllm.query_cuts`), so any blocks of the context may be run
before the open one in one query.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sinkprune_plugin.sampling.batch_table import Column, floats_of
from sinkprune_plugin.sampling.batched import StepNeeds
from sinkprune_plugin.sampling.options import CACHES, REMASKINGS, SamplingOptions
from sinkprune_plugin.sampling.tokens import Needs
from sinkprune_plugin.vllm.query_cuts import QueryCuts, cut_queries

__all__ = ["BatchLayout", "SlotTable", "StepPlan"]

NONE, DUAL, COMMIT = (CACHES.index(name) for name in ("none", "dual", "commit"))
Ints = np.ndarray[Any, np.dtype[np.int64]]
# Columns that stay as they are while a request runs.
FIXED = slice(Column.SEED, len(Column))


@dataclass(frozen=True)
class BatchLayout:
    """What vLLM scheduled, for each request of the batch in its order.

    :param slots: (num_reqs,) int64, its slot
    :param computed: (num_reqs,) int64, positions whose keys and values are kept from before
    :param query: (num_reqs,) int64, positions in the query
    :param canvas: (num_reqs,) int64, how many of these, at the end, are canvas; 0 for a prompt
    """

    slots: Ints
    computed: Ints
    query: Ints
    canvas: Ints


@dataclass(frozen=True)
class StepPlan:
    """One step of the batch. N rows of logits are needed: one for each position that may still be masked.

    :param table: (num_reqs, columns) int64, see :class:`~sinkprune_plugin.sampling.batch_table.Column`
    :param row_request: (N,) int64, each row's request
    :param needs: what the sampler must know on the host
    :param cuts: the queries cut into blocks; None if none is
    """

    table: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    row_request: Ints
    needs: StepNeeds
    cuts: QueryCuts | None

    @property
    def hidden_suffix(self) -> Ints:
        """(num_reqs,) int64, positions after the query that attention must see as well."""
        return self.table[:, Column.HIDDEN_SUFFIX]


class SlotTable:
    """Plans and progress of the requests in a worker, by slot.

    :param slots: number of slots
    :param canvas_length: longest generation served
    """

    def __init__(self, slots: int, canvas_length: int) -> None:
        self.canvas_length = canvas_length
        self.prompt_length = np.zeros(slots, np.int64)
        self.gen_length = np.ones(slots, np.int64)
        self.block_length = np.ones(slots, np.int64)
        # Block length of those whose blocks lie on a grid over prompt and generation, 0 of the others, and the tokens
        # of the prompt that the first block begins with.
        self.cut = np.zeros(slots, np.int64)
        self.grid_offset = np.zeros(slots, np.int64)
        self.cache = np.zeros(slots, np.int64)
        # How many tokens a step unmasks depends on what the model says.
        self.dynamic = np.zeros(slots, bool)
        self.fixed = np.zeros((slots, len(Column)), np.int64)
        # Denoising steps of each block, and where the open block begins, how many steps it has had and how many of its
        # positions are masked (at most, if dynamic).
        self.block_steps = np.ones((slots, canvas_length), np.int32)
        self.block_start = np.full(slots, -1, np.int64)
        self.step_in_block = np.zeros(slots, np.int64)
        self.masked = np.zeros(slots, np.int64)

    def add(self, slot: int, prompt_length: int, options: SamplingOptions) -> None:
        """Assign a slot to a request.

        :param slot: the slot
        :param prompt_length: tokens of its prompt, without what it has generated
        :param options: its options
        """
        self.prompt_length[slot] = prompt_length
        self.gen_length[slot] = options.gen_length
        self.block_length[slot] = options.block_length
        self.cut[slot] = options.block_length if options.on_grid else 0
        self.grid_offset[slot] = options.offset
        self.cache[slot] = CACHES.index(options.cache)
        self.dynamic[slot] = options.threshold is not None or options.factor is not None
        fixed = self.fixed[slot]
        fixed[Column.SLOT] = slot
        fixed[Column.SEED] = options.seed
        fixed[Column.REMASKING] = REMASKINGS.index(options.remasking)
        fixed[Column.COMMITS] = options.cache == "commit"
        fixed[Column.EARLY_STOP] = options.early_stop
        fixed[Column.TOP_K] = options.top_k
        floats = fixed.view(np.float64)
        floats[Column.TEMPERATURE] = options.temperature
        floats[Column.THRESHOLD] = np.inf if options.threshold is None else options.threshold
        floats[Column.FACTOR] = options.factor or 0.0
        floats[Column.TOP_P] = options.top_p
        blocks = len(options.blocks)
        self.block_steps[slot] = 1
        self.block_steps[slot, :blocks] = [options.steps_in_block(block) for block in range(blocks)]
        self.block_start[slot] = -1

    def note_left(self, left: Ints) -> None:
        """Take over how many positions are really masked, where the host can only tell that there are fewer.

        :param left: (slots,) masked positions of each slot's block after its last step
        """
        np.minimum(self.masked, left, out=self.masked, where=self.dynamic)

    def plan(self, batch: BatchLayout) -> StepPlan:
        """Plan a step. Counts a step for each denoising request.

        :param batch: what was scheduled
        :return: the plan
        """
        slots, canvas = batch.slots, batch.canvas
        end = batch.computed + batch.query
        denoises = canvas > 0
        start = end - canvas
        prompt, generation, cache = self.prompt_length[slots], self.gen_length[slots], self.cache[slots]
        # Requests that vLLM warms up with run past their generation; they stay within their canvas.
        offset = np.clip(start - prompt, 0, generation - 1)
        length = self.block_length[slots]
        block, before = np.divmod(offset + self.grid_offset[slots], length)
        width = np.minimum(np.minimum(length - before, generation - offset), canvas)
        opened = self.block_start[slots] != start
        step = np.where(opened, 0, self.step_in_block[slots])
        masked = np.where(opened, width, self.masked[slots])
        steps = self.block_steps[slots, block]
        count = width // steps + (step < width % steps)
        going = slots[denoises]
        dynamic = self.dynamic[slots]
        # One at least is unmasked by threshold and factor.
        self.masked[going] = np.maximum(masked - np.where(dynamic, 1, count), 0)[denoises]
        self.block_start[going] = start[denoises]
        self.step_in_block[going] = step[denoises] + 1
        rows = np.where(denoises, masked, 0)

        table = self.fixed[slots]
        table[:, Column.WIDTH] = width
        table[:, Column.FIRST_ROW] = np.cumsum(rows) - rows
        table[:, Column.ROWS] = rows
        table[:, Column.FIRST_HIDDEN] = np.cumsum(canvas) - canvas
        table[:, Column.COUNT] = count
        table[:, Column.NOISE_STEP] = offset + step
        table[:, Column.START] = start
        # To compute everything again, all of it is rejected; to keep what lies before the canvas, the canvas is, with
        # what belongs to its block before it.
        opened = np.where(cache == COMMIT, before, 0)
        table[:, Column.REJECTED] = np.where(
            denoises, np.where(cache == NONE, end, canvas + opened), np.where(cache == COMMIT, 0, end)
        )
        table[:, Column.REJECTED_FINISHED] = np.where(cache == COMMIT, canvas - width, end)
        table[:, Column.IS_LAST] = offset + width >= generation
        table[:, Column.HIDDEN_SUFFIX] = np.where(
            (cache == DUAL) & denoises, np.maximum(prompt + generation - end, 0), 0
        )
        row_request = np.repeat(np.arange(len(slots)), rows)
        needs = self._needs(table, row_request, int(width.max(initial=0)))
        return StepPlan(table, row_request, needs, cut_queries(batch.computed, batch.query, self.cut[slots]))

    def _needs(self, table: Ints, row_request: Ints, widest: int) -> StepNeeds:
        floats = floats_of(table)
        denoises = table[:, Column.WIDTH] > 0
        hot = denoises & (floats[:, Column.TEMPERATURE] > 0)
        # The most likely token always passes: without a temperature a filter changes nothing.
        filters = hot & ((table[:, Column.TOP_K] > 0) | (floats[:, Column.TOP_P] < 1))
        filtered = np.flatnonzero(filters[row_request]) if filters.any() else np.zeros(0, np.int64)
        kinds = frozenset(table[denoises, Column.REMASKING].tolist())
        return StepNeeds(
            widest=widest,
            proposals=Needs(noise=bool(hot.any()), filters=len(filtered) > 0, remaskings=kinds),
            filtered=filtered,
            stops=bool((table[:, Column.EARLY_STOP] > 0).any()),
        )

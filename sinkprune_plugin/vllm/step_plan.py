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
commit     the block; once more when it is finished     start                   start + width
=========  ===========================================  ======================  =========================
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sinkprune_plugin.sampling.options import CACHES, REMASKINGS, SamplingOptions
from sinkprune_plugin.sampling.tokens import Needs

__all__ = ["BatchLayout", "SlotTable", "StepPlan"]

NONE, PREFIX, DUAL, COMMIT = (CACHES.index(name) for name in ("none", "prefix", "dual", "commit"))
Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


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
    """One step of the batch. R denoising requests, N rows of logits that can be unmasked (Σ width).

    :param rows: (N,) int64, the rows among all canvas rows of the batch, block by block
    :param row_request: (N,) int64, number of the row's request among the R
    :param row_column: (N,) int64, the row's column in its block
    :param ints: (R, 9) int64: slot, number in the batch, width, tokens to unmask, seed, number of the noise's step,
        start, rejected while the block is open, rejected when it is finished
    :param options: (R, 4) int64: remasking, top_k, whether a finished block has to be committed, whether it is the last
    :param floats: (R, 3) float64: temperature, threshold (infinite: none), top_p
    :param idle: (K,) int64, numbers in the batch of the requests that only had their prompt run
    :param idle_slots: (K,) int64, their slots
    :param idle_rejected: (K,) int64, what they reject
    :param hidden_suffix: (num_reqs,) int32, positions behind the query that attention must see as well
    """

    rows: Ints
    row_request: Ints
    row_column: Ints
    ints: Ints
    options: Ints
    floats: Floats
    idle: Ints
    idle_slots: Ints
    idle_rejected: Ints
    hidden_suffix: np.ndarray[Any, np.dtype[np.int32]]

    @property
    def widest(self) -> int:
        """Width of the widest block."""
        return int(self.ints[:, 2].max()) if len(self.ints) else 0

    @property
    def needs(self) -> Needs:
        """What at least one request asks of the sampler."""
        temperature, top_p = self.floats[:, 0], self.floats[:, 2]
        return Needs(
            noise=bool((temperature > 0).any()),
            filters=bool((self.options[:, 1] > 0).any() or (top_p < 1).any()),
            remaskings=frozenset(self.options[:, 0].tolist()),
        )


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
        self.cache = np.zeros(slots, np.int64)
        self.remasking = np.zeros(slots, np.int64)
        self.top_k = np.zeros(slots, np.int64)
        self.seed = np.zeros(slots, np.int64)
        self.floats = np.zeros((slots, 3))
        # Denoising steps of each block, and where the open block begins and how many steps it has had.
        self.block_steps = np.ones((slots, canvas_length), np.int32)
        self.block_start = np.full(slots, -1, np.int64)
        self.step_in_block = np.zeros(slots, np.int64)

    def add(self, slot: int, prompt_length: int, options: SamplingOptions) -> None:
        """Give a slot to a request.

        :param slot: the slot
        :param prompt_length: tokens of its prompt, without what it has generated
        :param options: its options
        """
        self.prompt_length[slot] = prompt_length
        self.gen_length[slot] = options.gen_length
        self.block_length[slot] = options.block_length
        self.cache[slot] = CACHES.index(options.cache)
        self.remasking[slot] = REMASKINGS.index(options.remasking)
        self.top_k[slot] = options.top_k
        self.seed[slot] = options.seed
        threshold = np.inf if options.threshold is None else options.threshold
        self.floats[slot] = options.temperature, threshold, options.top_p
        blocks = len(options.blocks)
        self.block_steps[slot] = 1
        self.block_steps[slot, :blocks] = [options.steps_in_block(block) for block in range(blocks)]
        self.block_start[slot] = -1

    def plan(self, batch: BatchLayout) -> StepPlan:
        """Plan a step. Counts a step for each denoising request.

        :param batch: what was scheduled
        :return: the plan
        """
        slots, canvas = batch.slots, batch.canvas
        end = batch.computed + batch.query
        denoising = np.flatnonzero(canvas)
        idle = np.flatnonzero(canvas == 0)
        slot, start = slots[denoising], (end - canvas)[denoising]
        # Requests that vLLM warms up with run past their generation; they stay within their canvas.
        offset = np.clip(start - self.prompt_length[slot], 0, self.gen_length[slot] - 1)
        block = offset // self.block_length[slot]
        width = np.minimum(np.minimum(self.block_length[slot], self.gen_length[slot] - offset), canvas[denoising])
        opened = self.block_start[slot] != start
        step = np.where(opened, 0, self.step_in_block[slot])
        self.block_start[slot] = start
        self.step_in_block[slot] = step + 1

        steps = self.block_steps[slot, block]
        count = width // steps + (step < width % steps)
        cache = self.cache[slot]
        # To compute everything anew, all of it is rejected; to keep what lies before the canvas, the canvas is.
        everything, only_canvas = end[denoising], canvas[denoising]
        rejected = np.where(cache == NONE, everything, only_canvas)
        rejected_when_finished = np.where(cache == COMMIT, only_canvas - width, everything)
        last = offset + width >= self.gen_length[slot]
        number = np.arange(len(denoising))
        row_request = np.repeat(number, width)
        row_column = np.arange(int(width.sum())) - np.repeat(np.cumsum(width) - width, width)
        canvas_begin = np.cumsum(canvas) - canvas
        hidden_suffix = np.zeros(len(slots), np.int32)
        hidden_suffix[denoising] = np.where(
            cache == DUAL, np.maximum(self.prompt_length[slot] + self.gen_length[slot] - everything, 0), 0
        )
        return StepPlan(
            rows=canvas_begin[denoising][row_request] + row_column,
            row_request=row_request,
            row_column=row_column,
            ints=np.stack(
                [
                    slot,
                    denoising,
                    width,
                    count,
                    self.seed[slot],
                    offset + step,
                    start,
                    rejected,
                    rejected_when_finished,
                ],
                axis=1,
            ),
            options=np.stack([self.remasking[slot], self.top_k[slot], cache == COMMIT, last], axis=1).astype(np.int64),
            floats=self.floats[slot],
            idle=idle,
            idle_slots=slots[idle],
            idle_rejected=np.where(self.cache[slots[idle]] == COMMIT, 0, end[idle]),
            hidden_suffix=hidden_suffix,
        )

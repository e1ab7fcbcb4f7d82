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
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from sinkprune_plugin.sampling.options import CACHES, REMASKINGS, SamplingOptions
from sinkprune_plugin.sampling.tokens import Needs

__all__ = ["BatchLayout", "RequestFloats", "RequestNumbers", "SlotTable", "StepPlan"]

NONE, DUAL, COMMIT = (CACHES.index(name) for name in ("none", "dual", "commit"))
Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Column = TypeVar("Column")


class RequestNumbers(NamedTuple, Generic[Column]):
    """What the sampler must know of each denoising request: (R,) int64 arrays on the host, tensors on the device.

    The order is that of the columns of the one (R, 13) int64 copy to the device.

    :param slot: its slot
    :param number: its number in the batch
    :param width: positions of its block
    :param to_unmask: tokens to unmask
    :param seed: its seed
    :param noise_step: number of the noise's step
    :param start: position in the sequence at which the block begins
    :param rejected: query positions to compute again while the block is open
    :param rejected_finished: query positions to compute again when the block is finished
    :param remasking: index in ``REMASKINGS``
    :param top_k: most likely tokens to choose from; 0 for all
    :param commits: 1 if a finished block has to be run once more for its keys and values
    :param is_last: 1 if the block is the last
    """

    slot: Column
    number: Column
    width: Column
    to_unmask: Column
    seed: Column
    noise_step: Column
    start: Column
    rejected: Column
    rejected_finished: Column
    remasking: Column
    top_k: Column
    commits: Column
    is_last: Column


class RequestFloats(NamedTuple, Generic[Column]):
    """As :class:`RequestNumbers`, float64: the columns of an (R, 3) copy to the device.

    :param temperature: of the proposals; 0 takes the most likely token
    :param threshold: confidence above which a token is unmasked at once; infinite for none
    :param top_p: probability mass to choose from
    """

    temperature: Column
    threshold: Column
    top_p: Column


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
    :param numbers: integers of each denoising request
    :param floats: numbers of each denoising request that aren't integers
    :param idle: (K,) int64, numbers in the batch of the requests that only had their prompt run
    :param idle_slots: (K,) int64, their slots
    :param idle_rejected: (K,) int64, what they reject
    :param hidden_suffix: (num_reqs,) int32, positions after the query that attention must see as well
    """

    rows: Ints
    row_request: Ints
    row_column: Ints
    numbers: RequestNumbers[Ints]
    floats: RequestFloats[Floats]
    idle: Ints
    idle_slots: Ints
    idle_rejected: Ints
    hidden_suffix: np.ndarray[Any, np.dtype[np.int32]]

    @property
    def widest(self) -> int:
        """Width of the widest block; 0 if no request denoises."""
        return int(self.numbers.width.max(initial=0))

    @property
    def needs(self) -> Needs:
        """What at least one request needs from the sampler."""
        return Needs(
            noise=bool((self.floats.temperature > 0).any()),
            filters=bool((self.numbers.top_k > 0).any() or (self.floats.top_p < 1).any()),
            remaskings=frozenset(self.numbers.remasking.tolist()),
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
        self.floats = RequestFloats(np.zeros(slots), np.zeros(slots), np.zeros(slots))
        # Denoising steps of each block, and where the open block begins and how many steps it has had.
        self.block_steps = np.ones((slots, canvas_length), np.int32)
        self.block_start = np.full(slots, -1, np.int64)
        self.step_in_block = np.zeros(slots, np.int64)

    def add(self, slot: int, prompt_length: int, options: SamplingOptions) -> None:
        """Assign a slot to a request.

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
        self.floats.temperature[slot] = options.temperature
        self.floats.threshold[slot] = np.inf if options.threshold is None else options.threshold
        self.floats.top_p[slot] = options.top_p
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
        # To compute everything again, all of it is rejected; to keep what lies before the canvas, the canvas is.
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
            numbers=RequestNumbers(
                slot=slot,
                number=denoising,
                width=width,
                to_unmask=count,
                seed=self.seed[slot],
                noise_step=offset + step,
                start=start,
                rejected=rejected,
                rejected_finished=rejected_when_finished,
                remasking=self.remasking[slot],
                top_k=self.top_k[slot],
                commits=(cache == COMMIT).astype(np.int64),
                is_last=last.astype(np.int64),
            ),
            floats=RequestFloats(*(column[slot] for column in self.floats)),
            idle=idle,
            idle_slots=slots[idle],
            idle_rejected=np.where(self.cache[slots[idle]] == COMMIT, 0, end[idle]),
            hidden_suffix=hidden_suffix,
        )

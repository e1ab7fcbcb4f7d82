"""Where a request stands, as the scheduler sees it: what its next step runs, and what that step leaves behind.

The counterpart in the worker is :class:`~sinkprune_plugin.vllm.step_plan.SlotTable`; both follow the table in that
module. Where the number of steps of a block is fixed, this knows the outcome of a step before it has run, so the next
step can be scheduled at once.
"""

from dataclasses import dataclass
from typing import NamedTuple

from sinkprune_plugin.sampling.options import SamplingOptions

__all__ = ["Query", "RequestProgress"]


class Query(NamedTuple):
    """One step of a request.

    :param tokens: positions that it runs, from the first that isn't computed
    :param canvas: how many of these, at the end, are canvas
    :param block: how many of the canvas are the open block, whose logits are computed
    """

    tokens: int
    canvas: int
    block: int


@dataclass
class RequestProgress:
    """Progress of one request, which denoises its blocks from left to right.

    :param options: its options
    :param prompt: tokens of its prompt
    :param emitted: tokens of the blocks that are finished
    :param steps: steps that the open block has had
    """

    options: SamplingOptions
    prompt: int
    emitted: int = 0
    steps: int = 0

    @property
    def fixed(self) -> bool:
        """Whether the number of steps of each block is known in advance."""
        return self.options.fixed_steps

    @property
    def length(self) -> int:
        """Tokens of prompt and whole generation."""
        return self.prompt + self.options.gen_length

    @property
    def start(self) -> int:
        """Position at which the canvas begins."""
        return self.prompt + self.emitted

    @property
    def width(self) -> int:
        """Tokens of the open block that are generated; 0 if nothing is left to generate."""
        return self.options.open_block(self.emitted)[2]

    @property
    def opened(self) -> int:
        """Position at which the open block begins, before :attr:`start` where the prompt has a part of it."""
        return self.start - self.options.open_block(self.emitted)[1]

    def restart(self, emitted: int) -> None:
        """Begin the open block anew, for a request that is new or was preempted.

        :param emitted: tokens that it has generated
        """
        self.emitted, self.steps = emitted, 0

    def query(self, computed: int, budget: int) -> Query:
        """The next step.

        :param computed: positions whose keys and values are kept
        :param budget: positions that may be run; what can't be split is returned whole
        :return: what to run; no tokens if nothing is left to generate, or if the budget isn't enough for a block of the
            context
        """
        block, cache = self.width, self.options.cache
        if not block:
            return Query(0, 0, 0)
        whole = cache in ("none", "prefix") or (cache == "dual" and computed == 0)
        canvas = self.options.gen_length - self.emitted if whole else block
        step = Query(self.start + canvas - computed, canvas, block)
        if cache != "commit" or computed >= self.opened:
            return step
        if not self.options.on_grid:
            return Query(self._replayed(computed), 0, 0)
        # Each block of the query is cut out by itself, see QueryCuts, so any number of them can be run at once.
        if step.tokens <= budget:
            return step
        length = self.options.block_length
        end = min(self.opened, (computed + budget) // length * length)
        return Query(max(end - computed, 0), 0, 0)

    def _replayed(self, computed: int) -> int:
        """Positions of the next part of a context off the grid.

        The prompt and each finished block by themselves, as they were run at first: with a prompt that doesn't see
        them, and blocks that don't see later ones.
        """
        behind = (computed - self.prompt) % self.options.block_length
        end = self.prompt if computed < self.prompt else computed + self.options.block_length - behind
        return min(end, self.start) - computed

    def predict(self, query: Query) -> int:
        """Count a step of a request whose number of steps is fixed.

        :param query: the step
        :return: tokens that it will emit
        """
        if not query.canvas:
            return 0
        self.steps += 1
        block = self.options.open_block(self.emitted)[0]
        # A finished block is run once more for its keys and values, unless none follows.
        commits = self.options.cache == "commit" and self.emitted + query.block < self.options.gen_length
        if self.steps < self.options.steps_in_block(block) + commits:
            return 0
        return query.block

    def settle(self, query: Query, computed: int, emitted: int) -> int:
        """Account for the outcome of a step.

        :param query: the step
        :param computed: positions that were computed before it
        :param emitted: tokens that it emits
        :return: positions whose keys and values are kept for the next step
        """
        if not query.canvas:
            return computed + query.tokens
        opened = self.opened
        if emitted:
            self.restart(self.emitted + emitted)
            return self.start if self.options.cache == "commit" else 0
        return 0 if self.options.cache == "none" else opened

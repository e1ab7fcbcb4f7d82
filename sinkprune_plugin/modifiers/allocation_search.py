"""The search for block sparsities: candidates put together from a database, measured against the dense model."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import tqdm
from compressed_tensors.offload import get_execution_device

from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.level_database import LevelDatabase
from sinkprune_plugin.modifiers.prediction_distance import PredictionDistance
from sinkprune_plugin.modifiers.replaced_forward import forward_replaced, linear_with
from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.pruning import search_rounds
from sinkprune_plugin.pruning.evolution import Candidate, SearchOptions, SearchState, search
from sinkprune_plugin.pruning.level_grid import LevelGrid

__all__ = ["AllocationSearch", "search_options"]

# Rounds for each decoder block that has targets, so that every one can move by several levels.
ROUNDS_PER_BLOCK = 4
# Passes of the last stage at least: a small budget makes fewer rounds, not coarser ones.
LEAST_PASSES = 8


def search_options(budget: int, pass_tokens: int, passes: int, blocks: int, seed: int) -> SearchOptions:
    """How a search spends its tokens.

    :param budget: the recipe's ``search_budget``
    :param pass_tokens: tokens of a pass
    :param passes: passes of all processes
    :param blocks: decoder blocks with targets
    :param seed: the recipe's ``seed``
    :return: options with as many rounds as the blocks need, or fewer where the budget isn't enough for them, and as
        many passes in each as the budget is then enough for
    :raises UsageError: if the budget isn't enough for one round
    """
    # All processes run a pass at a time.
    unit = pass_tokens * distributed.world_size()
    rounds = ROUNDS_PER_BLOCK * blocks
    last = max(int(budget / rounds / search_rounds.round_cost() / unit), LEAST_PASSES)
    last = max(min(last, passes // distributed.world_size()), 1)
    options = SearchOptions(budget, search_rounds.OFFSPRING, search_rounds.round_stages(last, unit), seed)
    return replace(options, budget=min(budget, rounds * options.round_tokens))


class AllocationSearch:
    """Searches the levels of the blocks for the least distance to the dense model's predictions.

    :param grid: levels of the blocks that have targets
    :param targets: for each of these blocks, by its index in the model, its targets
    :param database: their weights at all levels
    :param distance: measures candidates
    """

    def __init__(
        self,
        grid: LevelGrid,
        targets: Mapping[int, Sequence[PruningTarget]],
        database: LevelDatabase,
        distance: PredictionDistance,
    ) -> None:
        self._grid = grid
        self._targets = targets
        self._groups = {block: group for group, block in enumerate(targets)}
        self._database = database
        self._distance = distance

    def run(self, options: SearchOptions, start: Sequence[Candidate], *, title: str) -> SearchState:
        """Search, from where an interrupted search of the same directory stopped.

        :param options: budget, stages and seed
        :param start: first candidates
        :param title: name of the progress bar
        :return: the final state, the same in every process
        """
        saved = self._database.read_state()
        state = None if saved is None else SearchState.from_json(saved)
        # Nobody writes before all have read.
        distributed.barrier()
        total = options.rounds * options.round_tokens
        quiet = distributed.rank() != 0
        with tqdm.tqdm(desc=title, total=total, unit="token", unit_scale=True, smoothing=0, disable=quiet) as bar:
            bar.update(0 if state is None else state.tokens)

            def fitness(candidate: Candidate, tokens: int, number: int) -> float:
                value = self.measure(candidate, tokens, number)
                bar.update(tokens)
                return value

            def save(state: SearchState) -> None:
                if distributed.rank() == 0:
                    self._database.write_state(state.to_json())

            return search(self._grid.space, fitness, options, start=start, state=state, after_round=save)

    def measure(self, candidate: Candidate, tokens: int | None = None, number: int = 0) -> float:
        """Distance of a candidate, see :meth:`PredictionDistance.measure`.

        :param candidate: one level for each block with targets
        :param tokens: forward tokens to spend
        :param number: number of the round
        """
        return self._distance.measure(lambda block: self._installed(block, candidate), tokens, number)

    @contextlib.contextmanager
    def _installed(self, block: int, candidate: Candidate) -> Iterator[None]:
        """Let a block's Linears compute with the weights of the candidate's level."""
        replacements = []
        if block in self._groups:
            level = candidate[self._groups[block]]
            for target in self._targets[block]:
                weight = self._database.read(target.name, level, get_execution_device(target.module))
                replacements.append((target.module, linear_with(weight, target.module)))
        with forward_replaced(replacements):
            yield

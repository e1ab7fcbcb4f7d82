"""The search over candidates that are put together block by block and measured against the dense model."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import tqdm

from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.finalist_recovery import FinalistRecovery
from sinkprune_plugin.modifiers.prediction_distance import PredictionDistance
from sinkprune_plugin.pruning.evolution import Candidate, SearchOptions, SearchSpace, SearchState, Stage, search

__all__ = ["CandidateBlocks", "CandidateSearch", "RecoverableBlocks"]


class CandidateBlocks(Protocol):
    """What a candidate's decoder blocks compute."""

    def installed(self, block: int, candidate: Candidate) -> contextlib.AbstractContextManager[Any]:
        """Let a block compute as the candidate's.

        :param block: index of the decoder block
        :param candidate: one level for each group
        """
        ...


@runtime_checkable
class RecoverableBlocks(CandidateBlocks, Protocol):
    """Candidates that can be recovered before they are measured."""

    def weights(self, block: int, candidate: Candidate) -> Mapping[torch.nn.Linear, torch.Tensor] | None:
        """What a candidate's block computes with, in the dense block's shapes and with zeros for what is pruned.

        :param block: index of the decoder block
        :param candidate: one level for each group
        :return: weights of the Linears that differ from the dense block's, on its device, not to be changed; None if
            the block is left out
        """
        ...


class CandidateSearch:
    """Searches for the least distance to the dense model's predictions.

    :param space: the candidates
    :param blocks: what they compute
    :param distance: measures them
    :param recovery: recovers candidates of a stage that says so before they are measured; then ``blocks`` are
        recoverable
    """

    def __init__(
        self,
        space: SearchSpace,
        blocks: CandidateBlocks,
        distance: PredictionDistance,
        recovery: FinalistRecovery | None = None,
    ) -> None:
        self._space = space
        self._blocks = blocks
        self._distance = distance
        self._recovery = recovery

    def run(
        self,
        options: SearchOptions,
        start: Sequence[Candidate],
        *,
        title: str,
        state: SearchState | None = None,
        after_round: Callable[[SearchState], None] | None = None,
    ) -> SearchState:
        """Search.

        :param options: budget, stages and seed
        :param start: first candidates
        :param title: name of the progress bar
        :param state: where an interrupted search stopped, to go on from
        :param after_round: see :func:`search`
        :return: the final state, the same in every process
        """
        total = options.rounds * options.round_tokens
        quiet = distributed.rank() != 0
        with tqdm.tqdm(desc=title, total=total, unit="token", unit_scale=True, smoothing=0, disable=quiet) as bar:
            bar.update(0 if state is None else state.tokens)

            def fitness(candidate: Candidate, stage: Stage, number: int) -> float:
                value = self._value(candidate, stage, number)
                bar.update(stage.cost)
                return value

            return search(self._space, fitness, options, start=start, state=state, after_round=after_round)

    def measure(self, candidate: Candidate, tokens: int | None = None, number: int = 0) -> float:
        """Distance of a candidate as it is, see :meth:`PredictionDistance.measure`.

        :param candidate: one level for each group
        :param tokens: forward tokens to spend
        :param number: number of the round
        """
        return self._distance.measure(lambda block: self._blocks.installed(block, candidate), tokens, number)

    def _value(self, candidate: Candidate, stage: Stage, number: int) -> float:
        if not stage.recovery:
            return self.measure(candidate, stage.tokens, number)
        blocks = self._blocks
        # Who asks for it gives both.
        assert self._recovery is not None and isinstance(blocks, RecoverableBlocks)  # noqa: PT018
        fitting = self._recovery.of(lambda block: blocks.weights(block, candidate), number)
        return self._distance.measure_fitted(fitting, stage.tokens, number)

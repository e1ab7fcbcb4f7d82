"""What all searches share: what they may spend, and what candidates are measured on."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from compressed_tensors.offload import disable_onloading

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.block_fit import state_bytes
from sinkprune_plugin.modifiers.calibrating_base import CalibratingModifierBase
from sinkprune_plugin.modifiers.candidate_search import CandidateBlocks, CandidateSearch
from sinkprune_plugin.modifiers.finalist_recovery import STEP_PASSES, FinalistRecovery
from sinkprune_plugin.modifiers.passes import PassEngine
from sinkprune_plugin.modifiers.prediction_distance import PredictionDistance, kept_prediction_bytes, scored_passes
from sinkprune_plugin.modifiers.run_estimate import RunEstimate, SearchPlan, hidden_state_bytes
from sinkprune_plugin.modifiers.trajectory import CorruptionSource, TrajectoryCorruption, window_copies
from sinkprune_plugin.pruning.evolution import Candidate, SearchOptions, SearchSpace, SearchState
from sinkprune_plugin.pruning.search_rounds import search_options

__all__ = ["SearchBase"]

# The search measures, and recovers, on other noise than the one that the weights are solved on.
NOISE_OF_SEARCH, NOISE_OF_RECOVERY = 1_000_003, 2_000_003


class SearchBase(CalibratingModifierBase):
    """Abstract base of the modifiers whose ``allocation`` may be ``search``, whatever they prune."""

    # ---- known beforehand

    def estimate(self, model: torch.nn.Module, num_batches: int, tokens: int) -> RunEstimate:
        """See the base class; with what a search takes."""
        estimate = super().estimate(model, num_batches, tokens)
        if self.allocation != "search":
            return estimate
        with disable_onloading():
            options = self._search_options(num_batches * distributed.world_size(), tokens // num_batches)
            search = SearchPlan(
                tokens=options.rounds * options.round_tokens,
                candidates=options.rounds * options.round_candidates,
                recovered=options.rounds * options.round_recoveries,
                prediction_bytes=kept_prediction_bytes(tokens, self._grid),
            )
            # Weights alone may say what goes, without a sweep before the search.
            measured = hidden_state_bytes(model, options.stages[-1].tokens // distributed.world_size())
            estimate = replace(estimate, search=search, hidden_bytes=max(estimate.hidden_bytes, measured))
            if not self.search_recovery_steps:
                return estimate
            noisy = tokens * len(self._grid) * window_copies(self._corruption)
            return self._with_recovery(estimate, options, model, tokens // num_batches, noisy)

    def _with_recovery(
        self, estimate: RunEstimate, options: SearchOptions, model: torch.nn.Module, batch_tokens: int, tokens: int
    ) -> RunEstimate:
        fitted = min(self._recovery_tokens(batch_tokens) // distributed.world_size(), tokens)
        measured = options.stages[-1].tokens // distributed.world_size()
        sizes = [
            [module.weight.numel() for module in block.modules() if isinstance(module, torch.nn.Linear)]
            for block in self._blocks
        ]
        dtype = self._targets[0].module.weight.dtype
        return replace(
            estimate,
            # Those of the dense model beside those of the candidate.
            hidden_bytes=max(estimate.hidden_bytes, hidden_state_bytes(model, 2 * (fitted + measured))),
            training_bytes=max(state_bytes(each, dtype) for each in sizes),
        )

    @abstractmethod
    def _groups_of_levels(self) -> int:
        """Number of groups that a search chooses a level for."""

    def _search_options(self, batches: int, batch_tokens: int) -> SearchOptions:
        """How a search spends its budget.

        :param batches: calibration batches of all processes
        :param batch_tokens: tokens of one of them
        :return: the same options in every process
        :raises UsageError: if the budget isn't enough for one round
        """
        processes = distributed.world_size()
        return search_options(
            self.search_budget,
            # All processes run a pass at a time.
            batch_tokens * window_copies(self._corruption) * processes,
            batches * len(self._grid) // processes,
            self._groups_of_levels(),
            self.seed,
            self._recovery_tokens(batch_tokens),
        )

    def _recovery_tokens(self, batch_tokens: int) -> int:
        return self.search_recovery_steps * STEP_PASSES * batch_tokens * window_copies(self._corruption)

    # ---- the search

    def _search(
        self,
        engine: PassEngine,
        space: SearchSpace,
        blocks: CandidateBlocks,
        start: Sequence[Candidate],
        *,
        state: SearchState | None = None,
        after_round: Callable[[SearchState], None] | None = None,
    ) -> tuple[Candidate, str]:
        """Search on the calibration samples.

        :param engine: engine of the dense model
        :param space: the candidates
        :param blocks: what they compute
        :param start: first candidates; the result is compared with the first one
        :param state: where an interrupted search stopped
        :param after_round: called with the state after each round
        :return: the best candidate and a note on how it was found
        """
        counts = distributed.gather_objects((len(self._batches), sum(b.input_ids.numel() for b in self._batches)))
        batches, tokens = (sum(column) for column in zip(*counts, strict=True))
        options = self._search_options(batches, tokens // batches)
        search = CandidateSearch(space, blocks, self._distance(engine), self._recovery(engine))
        state = search.run(options, start, title=self._title("search"), state=state, after_round=after_round)
        best, first = search.measure(state.best), search.measure(start[0])
        steps = self.search_recovery_steps
        return state.best, (
            f"search: {state.tokens} forward tokens in {state.rounds} rounds, "
            f"{f'{steps} recovery steps before a choice, ' if steps else ''}seed {self.seed}, distance to the dense "
            f"model's predictions {best:.4f} nats per token (uniform {first:.4f})"
        )

    def _recovery(self, engine: PassEngine) -> FinalistRecovery | None:
        if not self.search_recovery_steps:
            return None
        spec = resolve_diffusion(engine.model.config, mask_token_id=self.mask_token_id)
        noise = self._noise(NOISE_OF_RECOVERY)
        return FinalistRecovery(
            self._blocks, self._batches, self._grid, noise, spec, self.noise_eps, self.search_recovery_steps
        )

    def _distance(self, engine: PassEngine) -> PredictionDistance:
        """Distance to the dense model's predictions, on other noise than that of the calibration."""
        spec = resolve_diffusion(engine.model.config, mask_token_id=self.mask_token_id)
        passes = scored_passes(self._batches, self._grid, self._noise(NOISE_OF_SEARCH), spec, self.noise_eps)
        return PredictionDistance(engine.model, self._blocks, passes, spec, hidden_states=self.hidden_states)

    def _noise(self, offset: int) -> CorruptionSource:
        assert self._corruption is not None  # set in on_initialize
        if isinstance(self._corruption, TrajectoryCorruption):
            return replace(self._corruption, seed=self.seed + offset)
        return self._corruption

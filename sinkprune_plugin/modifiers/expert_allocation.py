"""Numbers of experts that differ from block to block, by search; and what a run comes to, for the saved recipe."""

from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import PrivateAttr

from sinkprune_plugin.models.expert_lists import experts_of
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.expert_candidates import ExpertCandidates
from sinkprune_plugin.modifiers.expert_choice import ExpertChoice
from sinkprune_plugin.modifiers.expert_fields import ExpertFields
from sinkprune_plugin.modifiers.level_database import LevelDatabase
from sinkprune_plugin.modifiers.passes import PassEngine
from sinkprune_plugin.modifiers.run_estimate import RunEstimate
from sinkprune_plugin.modifiers.search_problem import fingerprint
from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.pruning.evolution import Candidate, SearchState
from sinkprune_plugin.pruning.expert_allocation import ExpertGrid
from sinkprune_plugin.pruning.experts import experts_that_stay

__all__ = ["ExpertAllocation"]


class ExpertAllocation(ExpertFields):
    """Chooses how many experts each block loses, for ``allocation: search``."""

    _choice: ExpertChoice = PrivateAttr()

    def settle(self, removed: Mapping[int, int], blocks: int, note: str | None = None) -> str | None:
        """Make the fields say how many experts each block loses, so that the saved recipe repeats it.

        :param removed: number of the block → how many go
        :param blocks: decoder blocks
        :param note: how the numbers came about; None: as the allocation is called
        :return: a line that says so; None where the fields said it already
        """
        if self.allocation == "uniform":
            return None
        values = [removed.get(index, 0) for index in range(blocks)]
        # Plain assignment would run validation again, which refuses some of them together on the way.
        self.__dict__.update(experts=values, allocation="uniform", allocation_note=note or self.allocation)
        text = ", ".join(map(str, values))
        return f"{type(self).__name__}: experts removed by block {text} ({self.allocation_note})"

    # ---- known beforehand

    def _groups_of_levels(self) -> int:
        return len(self._choice.layers)

    def _check_room(self, model: torch.nn.Module, estimate: RunEstimate) -> None:
        super()._check_room(model, estimate)
        if self.allocation == "search":
            # Refuses what leaves nothing to choose, and a directory of another search.
            self._grid_of_counts()
            self._state_file(model)

    def _grid_of_counts(self) -> ExpertGrid:
        return ExpertGrid.around(list(self._choice.layers.values()), list(self._choice.removed.values()))

    # ---- the search

    def _search_counts(self, engine: PassEngine, importances: Mapping[int, torch.Tensor]) -> tuple[dict[int, int], str]:
        """Search for the numbers with the least distance to the dense model's predictions.

        :param engine: the engine
        :param importances: number of the block → (E,) float64, in whose order experts go
        :return: number of the block → how many go, and a note on how they were found
        """
        choice = self._choice
        grid, layers = self._grid_of_counts(), list(choice.layers.items())
        # Refuses scores that aren't finite.
        choice.kept(importances, self.score, choice.removed)

        def kept(place: int, level: int) -> list[int]:
            index, layer = layers[place]
            return experts_that_stay(importances[index], layer.experts - grid.kept[place][level], layer.groups)

        candidates = ExpertCandidates(self._blocks, experts_of(engine.model.config), list(choice.layers), kept)
        file = self._state_file(engine.model)
        saved = None if file is None else file.read_state()
        # Nobody writes before all have read.
        distributed.barrier()

        def save(state: SearchState) -> None:
            if file is not None and distributed.rank() == 0:
                file.write_state(state.to_json())

        found, note = self._search(
            engine,
            grid.space,
            candidates,
            self._start(grid, importances),
            state=None if saved is None else SearchState.from_json(saved),
            after_round=save,
        )
        gone = {index: layer.experts - count for (index, layer), count in zip(layers, grid.counts(found), strict=True)}
        return gone, note

    def _start(self, grid: ExpertGrid, importances: Mapping[int, torch.Tensor]) -> list[Candidate]:
        """Candidates of the first round: uniform, shares falling and rising over the depth, and ``error``."""
        choice = self._choice
        spreads = [choice.over_depth(sign * self.allocation_spread) for sign in (1, -1)]
        removed = [choice.removed, *spreads, choice.by_error(importances, self.score)]
        near = [
            grid.nearest([layer.experts - each[index] for index, layer in choice.layers.items()], self.seed)
            for each in removed
        ]
        return [candidate for candidate in near if candidate is not None]

    def _state_file(self, model: torch.nn.Module) -> LevelDatabase | None:
        """Where the state after each round is kept; None where there is no directory for it."""
        if self.search_directory is None:
            return None
        path = experts_of(model.config).experts
        targets = [
            PruningTarget(f"{index}.{path}.{name}", module, index)
            for index in self._choice.layers
            for name, module in self._blocks[index].get_submodule(path).named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        problem = fingerprint(self, model, targets, self._batches)
        with distributed.failing_together():
            # No weights are kept there: candidates are routers with fewer rows.
            return LevelDatabase(Path(self.search_directory), problem, needed_bytes=0, dense_bytes=0)

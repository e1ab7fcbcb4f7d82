"""Sparsities of the decoder blocks by measurement: one more sweep, and for ``search`` an evolutionary search."""

import contextlib
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from compressed_tensors.offload import align_module_device, disable_onloading, get_execution_device

from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.block_sparsities import targets_by_block
from sinkprune_plugin.modifiers.level_database import LevelDatabase, weight_bytes
from sinkprune_plugin.modifiers.passes import CalibrationPass, PassEngine
from sinkprune_plugin.modifiers.run_estimate import RunEstimate, SweepPlan
from sinkprune_plugin.modifiers.search_problem import fingerprint
from sinkprune_plugin.modifiers.searching_base import SearchingModifierBase
from sinkprune_plugin.modifiers.sparsity_candidates import SparsityCandidates
from sinkprune_plugin.modifiers.targets import PruningTarget, stage_of
from sinkprune_plugin.outputs import check_output
from sinkprune_plugin.pruning.allocation import equal_marginal_error, linear_over_depth
from sinkprune_plugin.pruning.evolution import Candidate, SearchState
from sinkprune_plugin.pruning.level_grid import LevelGrid
from sinkprune_plugin.termination import removed_on_termination

__all__ = ["AllocatingModifierBase"]

# Errors of a Linear at each level, relative to the power of its output, and that power.
LinearErrors = tuple[list[float], float]
# Receives a target's name, its pruned weight (rows, C) at each level of its block, the errors and the power.
ReceiveLevels = Callable[[str, list[torch.Tensor], list[float], float], None]


class AllocatingModifierBase(SearchingModifierBase):
    """Abstract base of the modifiers, with the allocations that take a calibration of their own.

    ``error`` and ``search`` solve every Linear at several levels, in one sweep with the dense model's inputs. A level's
    error is that of the Linear's output on these inputs, relative to the output itself: Σ ‖(W' − W) x‖² / Σ ‖W x‖².
    Relative, since outputs of different Linears have different scales, which the norms after them take out again. The
    error of a block is the mean over its Linears. The same Linear of all experts of a layer counts as one, whose output
    is the sum of theirs times the router's weights: the sum of their errors over the sum of their powers. Experts that
    got too few tokens, whose statistics are of tokens that aren't theirs, have no part in it unless all are such.
    """

    @property
    def measures_allocation(self) -> bool:
        """Whether the allocation takes a sweep of its own."""
        return self.allocation in ("error", "search")

    @abstractmethod
    def _error_metric(self, statistics: list[torch.Tensor]) -> torch.Tensor:
        """Second moments in which output errors are measured.

        :param statistics: sums over all processes, not to be changed
        :return: (C, C) moments of the input, or (C,) their diagonal; a new tensor
        """

    # ---- known beforehand

    def estimate(self, model: torch.nn.Module, num_batches: int, tokens: int) -> RunEstimate:
        """See the base class; with what a search takes."""
        estimate = super().estimate(model, num_batches, tokens)
        if estimate.search is None or not self.measures_allocation:
            return estimate
        with disable_onloading():
            on_disk, decoded = self._database_bytes()
        return replace(estimate, search=replace(estimate.search, database_bytes=on_disk, decoded_bytes=decoded))

    def _check_room(self, model: torch.nn.Module, estimate: RunEstimate) -> None:
        super()._check_room(model, estimate)
        if self.measures_allocation:
            # Refuses what leaves nothing to choose.
            self._level_grid()
        if estimate.search is None or not self.measures_allocation:
            return
        if self.search_directory is None:
            directory = Path(tempfile.gettempdir())
            check_output(directory, overwrite=True, needed_bytes=estimate.search.database_bytes)
        else:
            self._open_database(model, Path(self.search_directory))

    def _level_sweeps(self, plan: SweepPlan) -> tuple[SweepPlan, ...]:
        """The sweep of the allocation, for :meth:`_sweeps`.

        :param plan: one sweep of the passes that statistics come from
        """
        if not self.measures_allocation:
            return ()
        of_blocks = targets_by_block(self._targets).values()
        runs = max((self._level_runs(group) for group in of_blocks), default=1)
        return (replace(plan, runs_per_block=runs, streams=1),)

    def _database_bytes(self) -> tuple[int, int]:
        """Of all weights at all levels: bytes on disk, and bytes of the same decoded."""
        grid, by_block = self._level_grid()
        weights = [
            (target.module.weight, level)
            for group, levels in zip(by_block.values(), grid.sparsities, strict=True)
            for target in group
            for level in levels
        ]
        return sum(weight_bytes(W, level) for W, level in weights), sum(W.nbytes for W, _ in weights)

    def _groups_of_levels(self) -> int:
        return len(targets_by_block(self._targets))

    def _level_grid(self) -> tuple[LevelGrid, dict[int, list[PruningTarget]]]:
        """Levels of the blocks that have targets, and these targets."""
        assert isinstance(self.sparsity, float)  # a list leaves nothing to measure
        by_block = targets_by_block(self._targets)
        sizes = [
            sum(target.module.in_features * target.module.out_features for target in group)
            for group in by_block.values()
        ]
        return LevelGrid.around(self.sparsity, sizes), by_block

    # ---- the measurement

    def _measure_allocation(self, engine: PassEngine, passes: Sequence[CalibrationPass]) -> None:
        """Settle the sparsities of the blocks where that takes measurements.

        :param engine: the engine
        :param passes: passes with their final token weights
        """
        if not self.measures_allocation:
            return
        grid, by_block = self._level_grid()
        levels = dict(zip(by_block, grid.sparsities, strict=True))
        if self.allocation == "error":
            mine: dict[str, LinearErrors] = {}

            def keep(name: str, _weights: list[torch.Tensor], errors: list[float], power: float) -> None:
                mine[name] = errors, power

            self._solve_levels(engine, passes, levels, keep)
            errors = {name: found for part in distributed.gather_objects(mine) for name, found in part.items()}
            chosen = _by_error(grid, by_block, errors)
            note = "error: equal marginal error"
        else:
            with self._database(engine.model) as database:
                chosen, note = self._search_sparsities(engine, passes, grid, by_block, database)
        by_index = dict(zip(by_block, chosen, strict=True))
        self._settle([by_index.get(index, grid.total) for index in range(len(self._blocks))], note)

    def _search_sparsities(
        self,
        engine: PassEngine,
        passes: Sequence[CalibrationPass],
        grid: LevelGrid,
        by_block: dict[int, list[PruningTarget]],
        database: LevelDatabase,
    ) -> tuple[list[float], str]:
        levels = dict(zip(by_block, grid.sparsities, strict=True))
        self._solve_levels(engine, passes, levels, database.write, done=database.has)
        # Files of other processes are read from here on.
        distributed.barrier()
        errors = {target.name: database.errors(target.name) for group in by_block.values() for target in group}
        start = self._start(grid, _by_error(grid, by_block, errors))
        saved = database.read_state()
        # Nobody writes before all have read.
        distributed.barrier()

        def save(state: SearchState) -> None:
            if distributed.rank() == 0:
                database.write_state(state.to_json())

        best, note = self._search(
            engine,
            grid.space,
            SparsityCandidates(by_block, database),
            start,
            state=None if saved is None else SearchState.from_json(saved),
            after_round=save,
        )
        return grid.values(best), note

    def _start(self, grid: LevelGrid, by_error: Sequence[float]) -> list[Candidate]:
        """Candidates of the first round: uniform, sparsity falling and rising over the depth, equal marginal error."""
        allocations = [linear_over_depth(grid.total, grid.sizes, spread) for spread in (0.1, -0.1)]
        near = [grid.nearest(values, self.seed) for values in (*allocations, by_error)]
        return [grid.uniform, *(candidate for candidate in near if candidate is not None)]

    @contextlib.contextmanager
    def _database(self, model: torch.nn.Module) -> Iterator[LevelDatabase]:
        """The database in ``search_directory``, or in a directory that is removed at the end."""
        if self.search_directory is not None:
            yield self._open_database(model, Path(self.search_directory))
            return
        made = Path(tempfile.mkdtemp(prefix="sinkprune-search-")) if distributed.rank() == 0 else None
        directory = distributed.gather_objects(made)[0]
        with removed_on_termination(directory):
            try:
                yield self._open_database(model, directory)
                # Nobody reads any more.
                distributed.barrier()
            finally:
                if made is not None:
                    shutil.rmtree(directory, ignore_errors=True)

    def _open_database(self, model: torch.nn.Module, directory: Path) -> LevelDatabase:
        problem = fingerprint(self, model, self._targets, self._batches)
        with disable_onloading():
            on_disk, decoded = self._database_bytes()
        with distributed.failing_together():
            return LevelDatabase(directory, problem, needed_bytes=on_disk, dense_bytes=decoded)

    def _solve_levels(
        self,
        engine: PassEngine,
        passes: Sequence[CalibrationPass],
        levels: Mapping[int, Sequence[float]],
        receive: ReceiveLevels,
        done: Callable[[str], bool] = lambda _name: False,
    ) -> None:
        """Solve every Linear at the levels of its block, on the dense model's inputs; weights stay as they are.

        :param engine: the engine
        :param passes: passes with their final token weights
        :param levels: block → sparsities
        :param receive: gets the result on the process that solved it
        :param done: name of a target → whether it is known already
        """
        by_block = targets_by_block(self._targets)

        def solve(leader: str, group: Sequence[PruningTarget], statistics: list[torch.Tensor]) -> None:
            device = torch.device(get_execution_device(group[0].module))
            metric = self._error_metric(statistics).to(device, torch.float32)
            solver = self._solver(leader, statistics, device)
            for target in group:
                assert target.block is not None  # the allocation refuses others
                with align_module_device(target.module):
                    W = target.module.weight.detach()
                    whole = _energy(W, metric)
                    solved = [solver(W, level)[0] for level in levels[target.block]]
                    errors = [_energy(each - W, metric) / whole if whole else 0.0 for each in solved]
                fed = target.expert is not None and target.expert.key in self._fed_experts
                receive(target.name, solved, errors, 0.0 if fed else whole)

        self._sweep_statistics(
            engine, passes, lambda block: [each for each in by_block.get(block, []) if not done(each.name)], solve
        )


def _by_error(
    grid: LevelGrid, by_block: dict[int, list[PruningTarget]], errors: Mapping[str, LinearErrors]
) -> list[float]:
    """Equal marginal error over the levels of the blocks."""
    curves = []
    for group in by_block.values():
        stages: dict[str, list[LinearErrors]] = {}
        for target in group:
            stages.setdefault(stage_of(target), []).append(errors[target.name])
        of_stages = [_together(each) for each in stages.values()]
        curves.append([sum(values) / len(of_stages) for values in zip(*of_stages, strict=True)][::-1])
    return equal_marginal_error(grid.total, grid.sizes, [levels[::-1] for levels in grid.sparsities], curves)


def _together(errors: Sequence[LinearErrors]) -> list[float]:
    """Errors of Linears whose outputs are added up, at each level, relative to the power of all."""
    powers = [power for _, power in errors]
    whole = sum(powers)
    shares = [power / whole if whole else 1 / len(powers) for power in powers]
    by_level = zip(*(values for values, _ in errors), strict=True)
    return [sum(share * value for share, value in zip(shares, values, strict=True)) for values in by_level]


def _energy(W: torch.Tensor, metric: torch.Tensor) -> float:
    """Σ over tokens of the squared output of a weight: tr(W M Wᵀ)."""
    W = W.float()
    product = W * metric if metric.dim() == 1 else W @ metric
    return float((product * W).sum(dtype=torch.float64))

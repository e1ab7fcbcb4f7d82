"""Widths that differ from block to block: by the rise of the output errors, or by search under a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch
from compressed_tensors.offload import align_module_device, disable_onloading, get_execution_device
from loguru import logger
from pydantic import PrivateAttr

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.hidden_states import MEMORY_SHARE
from sinkprune_plugin.modifiers.passes import CalibrationPass, PassEngine
from sinkprune_plugin.modifiers.run_estimate import SweepPlan
from sinkprune_plugin.modifiers.structured_fields import StructuredFields
from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.modifiers.unit_costs import UnitCosts, count_costs, time_costs
from sinkprune_plugin.modifiers.unit_targets import FIELDS, UnitTarget
from sinkprune_plugin.modifiers.width_candidates import WidthCandidates
from sinkprune_plugin.pruning.hessian import prepare_hessian
from sinkprune_plugin.pruning.unit_budget import (
    GroupLevels,
    cheapest_in_error,
    drop_dominated,
    space_of,
    uniform_candidate,
)
from sinkprune_plugin.pruning.unit_removal import SolvedLevels, solve_levels
from sinkprune_plugin.pruning.units import level_widths

__all__ = ["StructuredAllocation"]


class StructuredAllocation(StructuredFields):
    """Chooses the widths for ``allocation: error`` and ``search``."""

    _units: list[UnitTarget] = PrivateAttr(default_factory=list)
    # By the Linear that reads the units: how many channels or heads stay.
    _widths: dict[str, int] = PrivateAttr(default_factory=dict)
    _gone: list[int] = PrivateAttr(default_factory=list)

    def _groups_of_levels(self) -> int:
        return len([unit for unit in self._units if unit.block not in self._gone])

    def _level_sweeps(self, plan: SweepPlan) -> tuple[SweepPlan, ...]:
        return () if self.allocation == "uniform" else (replace(plan, runs_per_block=1, streams=1),)

    def _choose_widths(self, engine: PassEngine, passes: Sequence[CalibrationPass]) -> None:
        """Set the width of every group of units, and put them into the fields, which the saved recipe has.

        :param engine: the engine
        :param passes: passes with their final token weights
        :raises UsageError: if the budget can't be met
        """
        units = [unit for unit in self._units if unit.block not in self._gone]
        widths = {unit.name: self._level_widths(unit) for unit in units}
        costs = self._costs(engine.model, units, widths)
        what = self.budget_of if self._ratio is not None else "parameters"
        if self._ratio is not None:
            budget = costs.whole / self._ratio
        else:
            budget = costs.fixed + sum(costs.widths[unit.name][self._widths[unit.name]] for unit in units)
        # Before the long part: without the errors it is known whether the budget can be met.
        space_of([_levels(unit, costs, None) for unit in units], budget, costs.fixed, costs.whole, what)
        if self.allocation == "search":
            _check_memory(units, widths)
        solved = self._solve_all_levels(engine, passes, units, widths)
        groups = [_levels(unit, costs, solved[unit.name]) for unit in units]
        space = space_of(groups, budget, costs.fixed, costs.whole, what)
        found = cheapest_in_error(space, groups, self.seed)
        note: str = self.allocation
        if self.allocation == "search":
            choices = [group.widths for group in groups]
            candidates = WidthCandidates(self._blocks, self._gone, units, choices, widths, solved)
            start = [uniform_candidate(space, groups, self.seed), found]
            found, note = self._search(engine, space, candidates, start)
        chosen = zip(units, groups, found, strict=True)
        self._widths |= {unit.name: group.widths[level] for unit, group, level in chosen}
        ratio = costs.whole / (costs.fixed + space.cost(found))
        logger.info(f"{type(self).__name__}: widths chosen by {note}, {ratio:.2f}x of {what}")
        self._fix_widths()

    def _level_widths(self, unit: UnitTarget) -> list[int]:
        if self.allocation == "error":
            # Errors of all widths come with the order of removal.
            return level_widths(unit.group, unit.group.units)
        return sorted({*level_widths(unit.group, self.levels), self._widths[unit.name]})

    def _costs(
        self, model: torch.nn.Module, units: Sequence[UnitTarget], widths: Mapping[str, Sequence[int]]
    ) -> UnitCosts:
        tokens = max(batch.input_ids.shape[1] for batch in self._batches)
        if self._ratio is not None and self.budget_of == "latency":
            return time_costs(
                model, self._blocks, units, widths, self._gone, batch_size=self.latency_batch_size, tokens=tokens
            )
        counts_flops = self._ratio is not None and self.budget_of == "flops"
        return count_costs(model, units, widths, self._gone, tokens=tokens if counts_flops else None)

    def _fix_widths(self) -> None:
        """Make the fields say what was chosen, so that the saved recipe repeats it."""
        removed: dict[str, list[Any]] = {name: [0] * len(self._blocks) for name in FIELDS.values()}
        for unit in self._units:
            removed[FIELDS[unit.kind]][unit.block] = unit.group.total - self._widths[unit.name]
        # Plain assignment would run validation again, which refuses some of them together on the way.
        self.__dict__.update({name: each if any(each) else 0 for name, each in removed.items()})
        self.__dict__.update(allocation="uniform", budget=None)

    # ---- all levels of all groups

    def _solve_all_levels(
        self,
        engine: PassEngine,
        passes: Sequence[CalibrationPass],
        units: Sequence[UnitTarget],
        widths: Mapping[str, Sequence[int]],
    ) -> dict[str, SolvedLevels]:
        """Solve every group of units at all its widths on the dense model's inputs; weights stay as they are."""
        solved: dict[str, SolvedLevels] = {}
        mine: dict[str, SolvedLevels] = {}
        by_name = {unit.name: unit for unit in units}

        def solve(leader: str, _targets: Sequence[PruningTarget], statistics: list[torch.Tensor]) -> None:
            mine[leader] = self._solve_group(by_name[leader], statistics, widths[leader])

        def share() -> None:
            # Block by block, as all of them at once would be in memory several times.
            for part in distributed.gather_objects(dict(mine)):
                solved.update(part)
            mine.clear()

        of_block = lambda block: [unit.target for unit in units if unit.block == block]  # noqa: E731
        self._sweep_statistics(engine, passes, of_block, solve, share)
        return solved

    def _solve_group(self, unit: UnitTarget, statistics: list[torch.Tensor], widths: Sequence[int]) -> SolvedLevels:
        module = unit.target.module
        H, _ = self._second_moments(statistics, torch.device(get_execution_device(module)))
        hessian = prepare_hessian(H, self.dampening_frac, unit.name, invertible=self.score == "obs")
        with align_module_device(module):
            W = module.weight.detach()
            return solve_levels(
                W,
                hessian,
                unit.group,
                widths,
                self.score,
                compensate=self.compensate,
                fixed_zeros=self._fixed_zeros(W),
                with_weights=self.allocation == "search",
            )


def _check_memory(units: Sequence[UnitTarget], widths: Mapping[str, Sequence[int]]) -> None:
    """Refuse a database that doesn't fit, before anything is solved."""
    with disable_onloading():
        needed = sum(
            unit.target.module.weight[:, : unit.group.columns_each].nbytes * sum(widths[unit.name]) for unit in units
        )
    free = int(MEMORY_SHARE * psutil.virtual_memory().available)
    if needed > free:
        raise UsageError(
            f"the weights of all widths that the search chooses from take {needed / 1e9:.1f} GB and main memory has "
            f"{free / 1e9:.1f} GB free; lower `levels`, or use `allocation: error`, which keeps none"
        )


def _levels(unit: UnitTarget, costs: UnitCosts, solved: SolvedLevels | None) -> GroupLevels:
    of_width = costs.widths[unit.name]
    errors = (0.0,) * len(of_width) if solved is None else solved.errors
    return drop_dominated(GroupLevels(tuple(of_width), errors, tuple(of_width.values())))

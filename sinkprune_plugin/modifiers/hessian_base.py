"""What the modifiers that solve with a Hessian share: how it is gathered, and what is to be matched."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.allocating_base import AllocatingModifierBase
from sinkprune_plugin.modifiers.input_observer import InputObserver, RoutedPass, require_reached
from sinkprune_plugin.modifiers.passes import CalibrationPass, OnloadedBlock, PassEngine
from sinkprune_plugin.modifiers.replaced_forward import forward_replaced, linear_with
from sinkprune_plugin.modifiers.routing import ExpertKey
from sinkprune_plugin.modifiers.run_estimate import SweepPlan, hessian_bytes
from sinkprune_plugin.modifiers.targets import PruningTarget, stage_of
from sinkprune_plugin.modifiers.trajectory import clean_pass, spec_of, without_sinks
from sinkprune_plugin.pruning.hessian import accumulate_drift, square_matrix
from sinkprune_plugin.pruning.sparsegpt import accumulate_hessian

__all__ = ["HessianModifierBase"]


class HessianModifierBase(AllocatingModifierBase):
    """Abstract base of the modifiers that solve for weights with the second moments of a Linear's input.

    :param calibrate_on: ``corrupted`` builds the Hessian along the denoising trajectory, each timestep's rows weighted
        with its own 1 − m; ``clean`` as published: clean samples, rows weighted with 1 − the mean of m over timesteps
    :param dampening_frac: share of the mean diagonal added to the Hessian's diagonal; raised tenfold, with a warning,
        until the Hessian can be factored
    :param offload_hessians: keep the Hessians of a block in main memory while they wait to be solved: less device
        memory, a little more time
    :param target: whose output a pruned Linear should reproduce: ``current``, its own on the inputs that it gets
        from the model as pruned so far, or ``dense``, the dense model's on the dense model's inputs; the latter needs a
        second stream of hidden states
    :param within_block: ``parallel`` gathers all Hessians of a block before any of its Linears is pruned; with
        ``sequential`` a Linear sees the pruned ones that come before it in the block, at the cost of more runs of the
        block
    :param expert_hessian_gb: most gigabytes of Hessians of experts that are held at once; more experts are pruned group
        by group, each with a run of the block on all passes
    """

    calibrate_on: Literal["corrupted", "clean"] = "corrupted"
    dampening_frac: float = Field(default=0.01, gt=0.0, allow_inf_nan=False)
    offload_hessians: bool = False
    target: Literal["dense", "current"] = "current"
    within_block: Literal["sequential", "parallel"] = "parallel"
    expert_hessian_gb: float = Field(default=8.0, gt=0.0, allow_inf_nan=False)

    _hessians: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
    _drifts: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
    # Inputs that the dense model gives in the pass that is being run; of experts with the tokens they are of.
    _dense_inputs: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = PrivateAttr(default_factory=dict)
    # Whether inputs are compared with the dense model's.
    _compares: bool = PrivateAttr(default=False)
    _samples: int = PrivateAttr(default=0)

    @model_validator(mode="before")
    @classmethod
    def _check_combination(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = dict(values)
            if values.pop("propagate_error", True) is False:
                raise UsageError(
                    f"{cls.__name__} always propagates error from block to block; drop `propagate_error: false`"
                )
            if values.get("calibrate_on") == "clean" and values.get("timestep_weighting", "uniform") != "uniform":
                raise UsageError(
                    f"timestep_weighting {values['timestep_weighting']} needs `calibrate_on: corrupted`: clean samples "
                    "have no timestep"
                )
        return values

    def _calibrate_and_prune(self, engine: PassEngine) -> None:
        passes = self._weighted_passes(engine)
        self._measure_allocation(engine, passes)
        self._prune_in_one_sweep(engine, passes, propagate=True, two_streams=self.target == "dense")

    def _weighted_passes(self, engine: PassEngine) -> list[CalibrationPass]:
        """Find the sinks, and give the passes that Hessians are gathered from their final token weights."""
        noisy = self._corrupted_passes()
        masks = self._find_sinks(engine, noisy)
        if self.calibrate_on == "corrupted":
            passes = without_sinks(noisy, masks, self._grid, self.timestep_weighting)
        else:
            spec = spec_of(self._corruption)
            passes = [
                # Of noisy tokens, which come last: clean context before them is there for their sake.
                _weighted(clean_pass(batch, spec), 1.0 - mask[..., -batch.input_ids.shape[1] :].mean(dim=1))
                for batch, mask in zip(self._batches, masks, strict=True)
            ]
        self._samples = sum(distributed.gather_objects(sum(len(each.row_weights) for each in passes)))
        return passes

    def _sweeps(self, clean: SweepPlan, noisy: SweepPlan) -> tuple[SweepPlan, ...]:
        # Sequential: at most as many groups as Linears in a block; which of them share an input shows in the run.
        groups = max(self._most_groups(index) for index in range(len(self._blocks)))
        streams = 2 if self.target == "dense" else 1
        second = noisy if self.calibrate_on == "corrupted" else clean
        pruning = replace(second, runs_per_block=(groups + 1) * streams, streams=streams)
        return noisy, *self._level_sweeps(second), pruning

    def _most_groups(self, block: int) -> int:
        targets = [target for target in self._targets if target.block == block]
        stages: dict[str, list[PruningTarget]] = {}
        for target in targets:
            stages.setdefault("" if self.within_block == "parallel" else stage_of(target), []).append(target)
        of_experts = len(self._expert_groups(stages.values()))
        return of_experts + sum(any(not target.expert for target in stage) for stage in stages.values())

    def _statistics_bytes(self, noisy: SweepPlan) -> int:
        del noisy
        experts = int(self.expert_hessian_gb * 1e9)
        matrices = 2 if self.target == "dense" else 1
        most = hessian_bytes([target for target in self._targets if not target.expert], matrices)
        return max(most, min(experts, hessian_bytes([target for target in self._targets if target.expert], matrices)))

    # ---- a block

    def _prune_block(
        self, block: OnloadedBlock, targets: Sequence[PruningTarget], *, advance_dense: bool, last: bool
    ) -> None:
        assert not advance_dense  # error is always propagated
        dense = _DenseWeights()
        two_streams = self._compares = self.target == "dense"
        for group in self._groups(block, targets):
            before = InputObserver(group, self._keep_dense_input, stop=True)
            handles = before.attach(self.register_hook) if two_streams else set()

            @contextlib.contextmanager
            def dense_model(number: int, each: CalibrationPass, before: InputObserver = before) -> Iterator[None]:
                self._dense_inputs.clear()
                with dense.in_place(), before.watching(number, each):
                    yield

            self._observe_and_prune(
                group,
                lambda watch: block.run(watch, dense=dense_model if two_streams else None),
                before_pruning=dense.remember if two_streams else None,
                stop=True,
                dense=before if two_streams else None,
            )
            self.remove_hooks(handles)
            self._dense_inputs.clear()
        if not last:
            with distributed.failing_together():
                block.run(dense=dense.in_place if two_streams else None, advance=True)

    def _groups(self, block: OnloadedBlock, targets: Sequence[PruningTarget]) -> list[list[PruningTarget]]:
        """Targets that are pruned together: all, or those that share an input, in the order of their calls."""
        if not targets:
            return []
        if self.within_block == "parallel":
            # Nothing in a block comes after its experts, so with them first all see the dense block.
            return self._level_groups(targets)
        observer = InputObserver(targets, lambda *_: None)
        with distributed.failing_together():
            handles = observer.attach(self.register_hook)
            block.run(observer.watching, only_first=True)
            self.remove_hooks(handles)
        groups: dict[str, list[PruningTarget]] = {}
        by_name = {target.name: target for target in targets}
        for name, leader in observer.leaders.items():
            groups.setdefault(stage_of(by_name[leader]), []).append(by_name[name])
        # An expert that the first pass doesn't reach has its Linears where others have theirs.
        stages = {stage_of(target): stage for stage, group in groups.items() for target in group}
        for target in targets:
            if target.name not in observer.leaders and target.expert and stage_of(target) in stages:
                groups[stages[stage_of(target)]].append(target)
        with distributed.failing_together():
            require_reached(targets, {target.name for group in groups.values() for target in group})
        # The first pass of each process calls other experts, in another order.
        order = {target.name: place for place, target in enumerate(targets)}
        ordered = [sorted(group, key=lambda target: order[target.name]) for group in groups.values()]
        return [part for group in ordered for part in (self._expert_groups([group]) if group[0].expert else [group])]

    def _level_groups(self, targets: Sequence[PruningTarget]) -> list[list[PruningTarget]]:
        rest = [target for target in targets if not target.expert]
        return [*self._expert_groups([list(targets)]), *([rest] if rest else [])]

    def _expert_groups(self, groups: Iterable[list[PruningTarget]]) -> list[list[PruningTarget]]:
        """Linears of experts, whole experts, in groups whose Hessians fit the limit."""
        limit = self.expert_hessian_gb * 1e9
        matrices = 2 if self.target == "dense" else 1
        result: list[list[PruningTarget]] = []
        for group in groups:
            filled = limit
            by_expert: dict[ExpertKey, list[PruningTarget]] = {}
            for target in group:
                if target.expert:
                    by_expert.setdefault(target.expert.key, []).append(target)
            for linears in by_expert.values():
                # Those of one width share an input, or need no more than if they did, as gate and up do.
                size = 4 * matrices * sum(columns**2 for columns in {t.module.in_features for t in linears})
                if filled + size > limit:
                    result.append([])
                    filled = 0.0
                result[-1] += linears
                filled += size
        return result

    def _report_dampening(self, leader: str, used: float) -> None:
        if used > self.dampening_frac:
            logger.warning(
                f"the Hessian of {leader} is not positive definite with dampening_frac {self.dampening_frac:g}; pruned "
                f"with {used:g} instead; with more calibration samples less dampening is enough"
            )

    def _fixed_zeros(self, W: torch.Tensor) -> torch.Tensor | None:
        """(rows, C) bool, weights that must stay zero; None where any may be filled."""
        return W == 0 if self.preserve_sparsity_mask else None

    # ---- statistics

    def _keep_dense_input(self, leader: str, x: torch.Tensor, each: CalibrationPass) -> None:
        # A copy: the model may write into it later.
        self._dense_inputs[leader] = x.clone(), each.rows if isinstance(each, RoutedPass) else None

    def _observe(self, leader: str, x: torch.Tensor, each: CalibrationPass) -> None:
        weights = each.row_weights.to(x.device)
        H = square_matrix(self._hessians, leader, x)
        accumulate_hessian(H, x, weights, each.square_scale)
        self._finite.note(H.diagonal(), leader, each.source)
        if self._compares and isinstance(each, RoutedPass):
            # There in every process, also where the dense model sends no token to this expert.
            square_matrix(self._drifts, leader, x)
        if leader in self._dense_inputs:
            D = square_matrix(self._drifts, leader, x)
            dense, rows = self._dense_inputs.pop(leader)
            if rows is not None:
                assert isinstance(each, RoutedPass)
                dense = _of_same_tokens(dense, rows, x, each)
            accumulate_drift(D, x, dense, weights, each.square_scale)

    def _take_statistics(self, leader: str) -> list[torch.Tensor]:
        taken = [matrices.pop(leader) for matrices in (self._hessians, self._drifts) if leader in matrices]
        # Once for each block, after its last input: from then on one Hessian at a time is on the device.
        return [_to_main_memory(each) for each in taken] if self.offload_hessians else taken

    def _error_metric(self, statistics: list[torch.Tensor]) -> torch.Tensor:
        return statistics[0].clone()

    def _second_moments(
        self, statistics: list[torch.Tensor], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hessian, and drift where the dense output is the target, both scaled to the mean over samples, times 2."""
        H, *drift = [each.to(device).mul_(2.0 / self._samples) for each in statistics]
        return H, drift[0] if drift else None


class _DenseWeights:
    """Weights as they were before their Linears were pruned, to run a block of the dense model again."""

    def __init__(self) -> None:
        self._weights: list[tuple[torch.nn.Linear, torch.Tensor]] = []

    def remember(self, targets: Sequence[PruningTarget]) -> None:
        """Copy the weights of Linears that are about to be pruned, on the device."""
        self._weights += [(target.module, target.module.weight.detach().clone()) for target in targets]

    def in_place(self, *_pass: Any) -> contextlib.AbstractContextManager[None]:
        """Let the pruned Linears compute with their dense weights; also as a watch of the engine, in every pass."""
        return forward_replaced([(module, linear_with(weight, module)) for module, weight in self._weights])


def _of_same_tokens(dense: torch.Tensor, rows: torch.Tensor, x: torch.Tensor, each: RoutedPass) -> torch.Tensor:
    """The dense model's inputs of the tokens in ``x``; where it sends a token elsewhere, the input that is there."""
    place = torch.full((int(each.inputs["input_ids"].numel()),), -1, device=rows.device)  # type: ignore[union-attr]
    place[rows] = torch.arange(len(rows), device=rows.device)
    found = place[each.rows]
    aligned = x.clone()
    aligned[:, found >= 0] = dense[:, found[found >= 0]]
    return aligned


def _weighted(each: CalibrationPass, weights: torch.Tensor) -> CalibrationPass:
    return replace(each, row_weights=each.row_weights.to(weights.device) * weights)


def _to_main_memory(H: torch.Tensor) -> torch.Tensor:
    return H.to("cpu")

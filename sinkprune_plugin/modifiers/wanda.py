"""Sink-aware Wanda as an llm-compressor modifier."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from compressed_tensors.offload import disable_onloading
from pydantic import Field, PrivateAttr, model_validator

from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.allocating_base import AllocatingModifierBase
from sinkprune_plugin.modifiers.base import Solver
from sinkprune_plugin.modifiers.input_observer import InputObserver, RoutedPass
from sinkprune_plugin.modifiers.passes import CalibrationPass, PassEngine
from sinkprune_plugin.modifiers.run_estimate import SweepPlan, hessian_bytes
from sinkprune_plugin.modifiers.trajectory import without_sinks
from sinkprune_plugin.pruning.hessian import prepare_hessian, square_matrix
from sinkprune_plugin.pruning.reconstruct import reconstruct
from sinkprune_plugin.pruning.sparsegpt import accumulate_hessian
from sinkprune_plugin.pruning.wanda import ActivationNorms, NormAggregation, sparsify_weight

__all__ = ["SinkAwareWandaModifier"]

# Memory for the inputs of all targets in all passes, up to which they are kept while the sinks are being found. A small
# model then needs one sweep instead of two. Fixed rather than a share of what is free, so that a recipe takes the same
# path on every machine; the masks are the same on both.
ONE_SWEEP_BYTES = 2 * 2**30


class SinkAwareWandaModifier(AllocatingModifierBase):
    """Prune a diffusion LM with Wanda on activation norms that leave out attention sinks.

    Paper: Sink-Aware Pruning for Diffusion Language Models, https://arxiv.org/abs/2602.17664

    Sample yaml:

    ```yaml
    prune_stage:
      prune_modifiers:
        SinkAwareWandaModifier:
          sparsity: 0.5
          mask_structure: "2:4"
          targets: ["Linear"]
          sink_scope: all
    ```

    Lifecycle:

    - on_initialize: resolve family and targets, validate
    - on_calibration_start
        - corrupt every sample at every timestep
        - first sweep over the blocks: find the sinks
        - second sweep: activation norms without them, summed over ranks; prune
        - small models: the inputs of the first sweep are kept, and the second sweep is left out
    - on_finalize: remove hooks

    Further fields: see :class:`SinkAwareModifierBase`.

    :param propagate_error: later blocks are scored on the outputs of pruned ones; False scores every layer on the dense
        model, as published
    :param norm_aggregation: ``sum_of_norms`` over samples and timesteps, as published, or ``sum_of_squares``, the root
        of the weighted sum of squares; left out: ``sum_of_norms`` for ``timestep_weighting: uniform``, else
        ``sum_of_squares``
    :param reconstruct: solve for the weights that stay, given the mask, so that the outputs stay close to the dense
        ones; takes Hessians as SparseGPT does
    :param dampening_frac: share of the mean diagonal added to those Hessians
    """

    propagate_error: bool = False
    norm_aggregation: NormAggregation | None = None
    reconstruct: bool = False
    dampening_frac: float = Field(default=0.01, gt=0.0, allow_inf_nan=False)

    _norms: dict[str, ActivationNorms] = PrivateAttr(default_factory=dict)
    _hessians: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _choose_aggregation(self) -> "SinkAwareWandaModifier":
        if self.norm_aggregation is None:
            uniform = self.timestep_weighting == "uniform"
            self.__dict__["norm_aggregation"] = "sum_of_norms" if uniform else "sum_of_squares"
        return self

    def _calibrate_and_prune(self, engine: PassEngine) -> None:
        passes = self._corrupted_passes()
        if self._keeps_inputs(sum(each.row_weights.numel() for each in passes)):
            self._prune_on_kept_inputs(engine, passes)
        else:
            masks = self._find_sinks(engine, passes)
            passes = without_sinks(passes, masks, self._grid, self.timestep_weighting)
            self._measure_allocation(engine, passes)
            self._prune_in_one_sweep(engine, passes, propagate=self.propagate_error)

    def _sweeps(self, clean: SweepPlan, noisy: SweepPlan) -> tuple[SweepPlan, ...]:
        del clean
        if self._keeps_inputs(noisy.tokens):
            return (noisy,)
        pruning = replace(noisy, runs_per_block=2 if self.propagate_error else 1)
        return noisy, *self._level_sweeps(noisy), pruning

    def _statistics_bytes(self, noisy: SweepPlan) -> int:
        norms = 8 * sum(target.module.in_features for target in self._targets)
        inputs = self._input_bytes(noisy.tokens) if self._keeps_inputs(noisy.tokens) else 0
        return norms + inputs + (hessian_bytes(self._targets) if self.reconstruct else 0)

    def _keeps_inputs(self, tokens: int) -> bool:
        """Whether all inputs are kept while the sinks are found, so that one sweep is enough."""
        # A target outside the blocks gets its input after the last block, where that sweep ends.
        within_blocks = all(target.block is not None for target in self._targets)
        # Experts that get too few tokens need another run of their block.
        experts = any(target.expert for target in self._targets)
        one_sweep = within_blocks and not experts and not self.propagate_error and not self.measures_allocation
        return one_sweep and self._input_bytes(tokens) <= ONE_SWEEP_BYTES

    def _input_bytes(self, tokens: int) -> int:
        """Bytes of the inputs of all targets; an input that several Linears share counts once for each."""
        # Only the dtypes of weights are read, which must not onload them.
        with disable_onloading():
            return tokens * sum(t.module.in_features * t.module.weight.element_size() for t in self._targets)

    def _prune_on_kept_inputs(self, engine: PassEngine, passes: Sequence[CalibrationPass]) -> None:
        kept: dict[str, list[torch.Tensor]] = {}

        def keep(leader: str, x: torch.Tensor, _each: CalibrationPass) -> None:
            # A copy: the model may write into it later.
            kept.setdefault(leader, []).append(x.clone())

        observer = InputObserver(self._targets, keep)
        handles = observer.attach(self.register_hook)
        masks = self._find_sinks(engine, passes, observer.watching)
        self.remove_hooks(handles)
        passes = without_sinks(passes, masks, self._grid, self.timestep_weighting)
        with distributed.failing_together():
            observer.require_reached()
            for leader in list(kept):
                for x, each in zip(kept.pop(leader), passes, strict=True):
                    self._observe(leader, x, each)
            self._finite.require()
        self._prune(self._targets, observer.leaders)

    def _observe(self, leader: str, x: torch.Tensor, each: CalibrationPass) -> None:
        assert self.norm_aggregation is not None  # _choose_aggregation fills it
        norms = self._norms.setdefault(leader, ActivationNorms(self.norm_aggregation))
        weights = each.row_weights.to(x.device)
        for sample, own in each.by_sample(x) if isinstance(each, RoutedPass) else [(x, weights)]:
            self._finite.note(norms.add(sample, own.to(x.device), each.square_scale), leader, each.source)
        if self.reconstruct:
            accumulate_hessian(square_matrix(self._hessians, leader, x), x, weights, each.square_scale)

    def _take_statistics(self, leader: str) -> list[torch.Tensor]:
        total = self._norms.pop(leader).total
        assert total is not None  # a leader is named by its first input
        return [total, self._hessians.pop(leader)] if self.reconstruct else [total]

    def _error_metric(self, statistics: list[torch.Tensor]) -> torch.Tensor:
        if self.reconstruct:
            return statistics[1].clone()
        # Wanda's own idea of the error: the Hessian's diagonal.
        return self._norms_of(statistics[0]).square()

    def _solver(self, leader: str, statistics: list[torch.Tensor], device: torch.device) -> Solver:
        norms = self._norms_of(statistics[0].to(device))
        if not self.reconstruct:
            return lambda W, sparsity: (sparsify_weight(W, norms, sparsity, self._structure), None)
        prepared = prepare_hessian(statistics[1].to(device), self.dampening_frac, leader)

        def solve(W: torch.Tensor, sparsity: float) -> tuple[torch.Tensor, float]:
            mask = sparsify_weight(W, norms, sparsity, self._structure) == 0
            return reconstruct(W, mask, prepared)

        return solve

    def _norms_of(self, total: torch.Tensor) -> torch.Tensor:
        """(C,) float64 activation norms from a sum over all processes."""
        assert self.norm_aggregation is not None  # _choose_aggregation fills it
        gathered = ActivationNorms(self.norm_aggregation)
        gathered.total = total
        return gathered.norms()

"""Sink-aware SparseGPT as an llm-compressor modifier."""

from dataclasses import replace
from typing import Any, Literal

import torch
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.base import SinkAwareModifierBase, Solver
from sinkprune_plugin.modifiers.passes import CalibrationPass, PassEngine
from sinkprune_plugin.modifiers.run_estimate import SweepPlan, hessian_bytes
from sinkprune_plugin.modifiers.sparsegpt.sparsegpt_sparsify import accumulate_hessian, invert_hessian, sparsify_weight
from sinkprune_plugin.modifiers.trajectory import clean_pass

__all__ = ["SinkAwareSparseGPTModifier"]


class SinkAwareSparseGPTModifier(SinkAwareModifierBase):
    """Prune a diffusion LM with SparseGPT on Hessians that leave out attention sinks.

    Paper: Sink-Aware Pruning for Diffusion Language Models, https://arxiv.org/abs/2602.17664

    Sample yaml:

    ```yaml
    prune_stage:
      prune_modifiers:
        SinkAwareSparseGPTModifier:
          sparsity: 0.5
          mask_structure: "2:4"
          targets: ["Linear"]
          calibrate_on: corrupted
    ```

    Lifecycle:

    - on_initialize: resolve family and targets, validate
    - on_calibration_start
        - corrupt every sample at every timestep
        - first sweep over the blocks: find the sinks
        - second sweep, block by block: accumulate the token-weighted Hessians, sum over ranks, prune, pass the outputs
          on
    - on_finalize: remove hooks

    Further fields: see :class:`SinkAwareModifierBase`. Error is always propagated from block to block.

    :param calibrate_on: ``corrupted`` builds the Hessian along the denoising trajectory, each timestep's rows weighted
        with its own 1 − m; ``clean`` as published: clean samples, rows weighted with 1 − the mean of m over timesteps
    :param block_size: columns in a lazy-update block
    :param dampening_frac: share of the mean diagonal added to the Hessian's diagonal; raised tenfold, with a warning,
        as often as the Hessian can't be factored
    :param offload_hessians: keep the Hessians of a block in main memory while they wait to be solved: less device
        memory, a little more time
    """

    calibrate_on: Literal["corrupted", "clean"] = "corrupted"
    block_size: int = Field(default=128, gt=0)
    dampening_frac: float = Field(default=0.01, gt=0.0, allow_inf_nan=False)
    offload_hessians: bool = False

    _hessians: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
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
        noisy = self._corrupted_passes()
        masks = self._find_sinks(engine, noisy)
        if self.calibrate_on == "corrupted":
            passes = self._without_sinks(noisy, masks)
        else:
            passes = [
                _weighted(clean_pass(batch), 1.0 - mask.mean(dim=1))
                for batch, mask in zip(self._batches, masks, strict=True)
            ]
        self._samples = sum(distributed.gather_objects(sum(len(each.row_weights) for each in passes)))
        self._prune_in_one_sweep(engine, passes, propagate=True)

    def _sweeps(self, clean: SweepPlan, noisy: SweepPlan) -> tuple[SweepPlan, ...]:
        return noisy, replace(noisy if self.calibrate_on == "corrupted" else clean, runs_per_block=2)

    def _statistics_bytes(self, noisy: SweepPlan) -> int:
        del noisy
        return hessian_bytes(self._targets)

    def _observe(self, leader: str, x: torch.Tensor, each: CalibrationPass) -> None:
        if leader not in self._hessians:
            size = x.shape[-1]
            self._hessians[leader] = torch.zeros(size, size, dtype=torch.float32, device=x.device)
        H = self._hessians[leader]
        accumulate_hessian(H, x, each.row_weights.to(x.device), each.square_scale)
        self._finite.note(H.diagonal(), leader, each.source)

    def _take_statistics(self, leader: str) -> torch.Tensor:
        H = self._hessians.pop(leader)
        # Once for each block, after its last input: from then on one Hessian at a time is on the device.
        return _to_main_memory(H) if self.offload_hessians else H

    def _solver(self, leader: str, statistics: torch.Tensor, device: torch.device) -> Solver:
        H = statistics.to(device).mul_(2.0 / self._samples)
        factor = invert_hessian(H, self.dampening_frac, leader)
        if factor.dampening_frac > self.dampening_frac:
            logger.warning(
                f"the Hessian of {leader} is not positive definite with dampening_frac {self.dampening_frac:g}; pruned "
                f"with {factor.dampening_frac:g} instead, more calibration samples would do with less"
            )
        return lambda W, sparsity: sparsify_weight(W, factor, sparsity, self._structure, block_size=self.block_size)


def _weighted(each: CalibrationPass, weights: torch.Tensor) -> CalibrationPass:
    return replace(each, row_weights=each.row_weights.to(weights.device) * weights)


def _to_main_memory(H: torch.Tensor) -> torch.Tensor:
    return H.to("cpu")

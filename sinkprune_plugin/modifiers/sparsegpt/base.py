"""Sink-aware SparseGPT as an llm-compressor modifier."""

from typing import Any, Literal

import torch
from compressed_tensors.utils import get_execution_device
from pydantic import Field, PrivateAttr, model_validator

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.base import SinkAwareModifierBase
from sinkprune_plugin.modifiers.block_runner import BlockRunner
from sinkprune_plugin.modifiers.calibration import CalibrationBatch, forward
from sinkprune_plugin.modifiers.sparsegpt.sparsegpt_sparsify import (
    InverseFactor,
    accumulate_hessian,
    invert_hessian,
    sparsify_weight,
)
from sinkprune_plugin.modifiers.targets import PruningTarget

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
        - for every sample and timestep: corrupt, run the dense model once, find the sinks, keep the first block's input
        - block by block: accumulate the token-weighted Hessians, sum over ranks, prune, pass the outputs on
    - on_finalize: remove hooks

    Further fields: see :class:`SinkAwareModifierBase`. Error is always propagated from block to block.

    :param calibrate_on: ``corrupted`` builds the Hessian along the denoising trajectory, each timestep's rows weighted
        with its own 1 − m; ``clean`` as published: clean samples, rows weighted with 1 − the mean of m over timesteps
    :param block_size: columns in a lazy-update block
    :param dampening_frac: share of the mean diagonal added to the Hessian's diagonal
    :param offload_hessians: keep Hessians in main memory between updates: less device memory, more time
    """

    calibrate_on: Literal["corrupted", "clean"] = "corrupted"
    block_size: int = Field(default=128, gt=0)
    dampening_frac: float = Field(default=0.01, gt=0.0)
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

    def _calibrate_and_prune(self, model: torch.nn.Module) -> None:
        runner = BlockRunner(self._blocks)
        passes: list[tuple[CalibrationBatch, torch.Tensor, torch.Tensor]] = []
        if self.calibrate_on == "corrupted":
            masks = self._soft_masks(model, runner)
            for batch, mask in zip(self._batches, masks, strict=True):
                for step_index, timestep in enumerate(self._grid):
                    weights = self._row_scale(timestep) * self._token_weights(mask[:, step_index], batch)
                    passes.append((batch, self._noisy_ids(batch, step_index, timestep), weights))
        else:
            masks = self._soft_masks(model, None)
            for batch, mask in zip(self._batches, masks, strict=True):

                def run_model(batch: CalibrationBatch = batch) -> None:
                    forward(model, batch.input_ids, batch.valid)

                runner.record(run_model, whole_model=False)
                passes.append((batch, batch.input_ids, self._token_weights(mask.mean(dim=1), batch)))
        count = sum(len(weights) for _, _, weights in passes)
        self._samples = sum(distributed.gather_objects(count))
        self._prune_block_by_block(model, runner, passes)

    def _observe_weighted(self, leader: str, x: torch.Tensor, weights: torch.Tensor, batch: CalibrationBatch) -> None:
        if leader not in self._hessians:
            size = x.shape[-1]
            self._hessians[leader] = torch.zeros(size, size, dtype=torch.float32, device=x.device)
        H = self._hessians[leader].to(x.device)
        accumulate_hessian(H, x, weights)
        if not bool(torch.isfinite(H.diagonal()).all()):
            raise UsageError(
                f"the input of {leader} in calibration batch {batch.index} has NaN or Inf; check the checkpoint or "
                "load it with dtype float32"
            )
        self._hessians[leader] = H.to("cpu") if self.offload_hessians else H

    def _prune(self, targets: list[PruningTarget], leaders: dict[str, str]) -> None:
        for leader in sorted({leaders[target.name] for target in targets}):
            served = [target for target in targets if leaders[target.name] == leader]
            device = get_execution_device(served[0].module)
            H = self._hessians.pop(leader).to(device)
            distributed.sum_over_ranks([H])
            factor = invert_hessian(H.mul_(2.0 / self._samples), self.dampening_frac, leader)
            for target in served:
                sparsity = self._sparsity_of(target)

                def prune(
                    W: torch.Tensor, sparsity: float = sparsity, factor: InverseFactor = factor
                ) -> tuple[torch.Tensor, float]:
                    return sparsify_weight(W, factor, sparsity, self._structure, block_size=self.block_size)

                self._replace_weight(target, prune)

"""Sink-aware SparseGPT as an llm-compressor modifier."""

import torch
from pydantic import Field

from sinkprune_plugin.modifiers.base import Solver
from sinkprune_plugin.modifiers.hessian_base import HessianModifierBase
from sinkprune_plugin.pruning.sparsegpt import invert_hessian, sparsify_weight

__all__ = ["SinkAwareSparseGPTModifier"]


class SinkAwareSparseGPTModifier(HessianModifierBase):
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

    Further fields: see :class:`HessianModifierBase` and :class:`SinkAwareFields`. Error is always propagated from block
    to block.

    :param block_size: columns in a lazy-update block
    """

    block_size: int = Field(default=128, gt=0)

    def _solver(self, leader: str, statistics: list[torch.Tensor], device: torch.device) -> Solver:
        H, drift = self._second_moments(statistics, device)
        factor = invert_hessian(H, self.dampening_frac, leader)
        self._report_dampening(leader, factor.dampening_frac)

        def solve(W: torch.Tensor, sparsity: float) -> tuple[torch.Tensor, float]:
            target = W if drift is None else factor.dense_output_target(W, drift)
            pruned, loss = sparsify_weight(
                target,
                factor,
                sparsity,
                self._structure,
                block_size=self.block_size,
                fixed_zeros=self._fixed_zeros(W),
            )
            return pruned.to(W.dtype), loss

        return solve

"""Masks and weights solved together, as an llm-compressor modifier."""

from typing import Literal, Self

import torch
from pydantic import Field, PrivateAttr, model_validator

from sinkprune_plugin.modifiers.base import Solver
from sinkprune_plugin.modifiers.hessian_base import HessianModifierBase
from sinkprune_plugin.pruning.admm import ADMMOptions, solve
from sinkprune_plugin.pruning.hessian import prepare_hessian

__all__ = ["SinkAwareADMMModifier"]


class SinkAwareADMMModifier(HessianModifierBase):
    """Prune a diffusion LM with ADMM on Hessians that leave out attention sinks, toward the dense model's outputs.

    Masks and weights are solved for together, with a mask that grows over the iterations. Sources: the solver is that
    of arXiv 2401.02938 with the conjugate gradients of ALPS (arXiv 2406.07831) at the end; sinks and trajectory are
    those of arXiv 2602.17664.

    Sample yaml:

    ```yaml
    prune_stage:
      prune_modifiers:
        SinkAwareADMMModifier:
          sparsity: 0.75
          targets: ["Linear"]
    ```

    Lifecycle: as of :class:`SinkAwareSparseGPTModifier`. Further fields: see :class:`HessianModifierBase` and
    :class:`SinkAwareFields`.

    :param target: ``dense`` unless ``within_block: parallel``, where ``current`` was measured to be better
    :param within_block: ``sequential``, the better one, or ``parallel``, the faster one
    :param iterations: ADMM iterations, each one matrix product of a weight
    :param gradual_iterations: iterations in which the mask grows and is chosen again
    :param penalty: ρ of ADMM, in units of the root of the Hessian's spectral flatness
    :param refine: ``conjugate_gradient`` solves for the weights on the final mask, ``none`` keeps those of ADMM
    :param mask_swaps: after that, exchange a kept and a removed weight of a row as long as it lowers the row's error,
        so many times at most
    """

    within_block: Literal["sequential", "parallel"] = "sequential"
    target: Literal["dense", "current"] | None = None  # type: ignore[assignment]
    iterations: int = 20
    gradual_iterations: int = 15
    penalty: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    refine: Literal["none", "conjugate_gradient"] = "conjugate_gradient"
    mask_swaps: int = Field(default=0, ge=0)

    _options: ADMMOptions = PrivateAttr()

    @model_validator(mode="after")
    def _check_solver(self) -> Self:
        if self.target is None:
            self.__dict__["target"] = "dense" if self.within_block == "sequential" else "current"
        self._options = ADMMOptions(
            iterations=self.iterations,
            gradual_iterations=self.gradual_iterations,
            penalty=self.penalty,
            mask_swaps=self.mask_swaps,
            **({} if self.refine == "conjugate_gradient" else {"refine_iterations": 0}),
        )
        return self

    def _solver(self, leader: str, statistics: list[torch.Tensor], device: torch.device) -> Solver:
        H, drift = self._second_moments(statistics, device)
        prepared = prepare_hessian(H, self.dampening_frac, leader, drift=drift)
        self._report_dampening(leader, prepared.dampening_frac)
        return lambda W, sparsity: solve(
            W, prepared, sparsity, self._structure, self._options, fixed_zeros=self._fixed_zeros(W)
        )

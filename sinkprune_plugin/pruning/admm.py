"""Masks and weights solved together: ADMM with a gradual mask. Torch only.

The alternating direction method of multipliers for pruning with a gradual mask is that of "Fast and Effective Weight
Update for Pruned Large Language Models" (arXiv 2401.02938); conjugate gradients at the end as in ALPS
(arXiv 2406.07831).
"""

from dataclasses import dataclass

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.mask_structure import MaskStructure
from sinkprune_plugin.pruning.hessian import PreparedHessian, row_chunks
from sinkprune_plugin.pruning.reconstruct import conjugate_gradient
from sinkprune_plugin.pruning.selection import mark_smallest

__all__ = ["ADMMOptions", "solve"]


@dataclass(frozen=True)
class ADMMOptions:
    """How the solver iterates.

    :param iterations: ADMM iterations, each one matrix product
    :param gradual_iterations: iterations over which the mask grows to its final size; later ones keep it as it is
    :param penalty: ρ, weight of the agreement between dense and pruned variables; the Hessian's diagonal is 1
    :param refine_iterations: steps of conjugate gradients on the final mask, 0 for none
    :raises UsageError: if a number is out of range
    """

    iterations: int = 20
    gradual_iterations: int = 15
    penalty: float = 1.0
    refine_iterations: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.gradual_iterations <= self.iterations:
            raise UsageError(
                f"gradual_iterations is {self.gradual_iterations} and iterations {self.iterations}; the mask must be "
                "complete before the iterations end, so 1 ≤ gradual_iterations ≤ iterations"
            )
        if not self.penalty > 0:
            raise UsageError(f"penalty is {self.penalty:g}; it must be positive, for instance 1")
        if self.refine_iterations < 0:
            raise UsageError(f"refine_iterations is {self.refine_iterations}; it can't be negative")


def solve(
    W: torch.Tensor,
    hessian: PreparedHessian,
    sparsity: float,
    structure: MaskStructure,
    options: ADMMOptions | None = None,
    *,
    fixed_zeros: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Find a mask and the weights on it that come closest to the target's outputs.

    Unstructured: floor(numel · sparsity) weights of the whole matrix go. N:M: N of every M consecutive columns. Fixed
    zeros and the columns of dead features go first and count; only if they alone exceed the share, more go.

    Memory beside W and the prepared Hessian, float32: target and state, a byte or two per weight for masks, and up to
    four chunks of rows (``hessian.CHUNK_BYTES``). For 4096 × 12288 that is 0.5 GB and half a GB of chunks; with its
    Hessian, drift and resolvent 3.4 GB.

    :param W: (rows, C) dense weight, any floating dtype, left untouched
    :param hessian: prepared Hessian of W's input; its target is W, or the dense output where it has a drift
    :param sparsity: share of zeros for the unstructured case
    :param structure: mask structure; N:M overrides ``sparsity``
    :param options: iterations; None takes the defaults
    :param fixed_zeros: (rows, C) bool, weights that must stay zero, for instance those of a pruned model
    :return: pruned weight in W's dtype, and half its squared output error
    """
    options = options or ADMMOptions()
    target = hessian.target(W)
    gone = hessian.dead.expand(W.shape) if fixed_zeros is None else fixed_zeros | hessian.dead
    fixed = gone if bool(gone.any()) else None
    num_fixed = 0 if fixed is None else int(fixed.sum())
    R = hessian.resolvent(options.penalty)
    chunks = row_chunks(*W.shape)

    # V = X + U holds both other variables: the projection splits it into Z (outside the mask) and U (on the mask).
    V = target.clone()
    mask = torch.zeros_like(V, dtype=torch.bool)

    def unstructured_scores(rows: slice) -> torch.Tensor:
        magnitudes = V[rows].abs()
        return magnitudes if fixed is None else magnitudes.masked_fill_(fixed[rows], torch.inf)

    def group_scores(rows: slice) -> torch.Tensor:
        magnitudes = V[rows].abs()
        ranks = magnitudes if fixed is None else magnitudes.masked_fill(fixed[rows], -1.0)
        stays = ~structure.lowest_in_groups(ranks)
        return magnitudes.masked_fill_(stays if fixed is None else stays | fixed[rows], torch.inf)

    scores = unstructured_scores if structure.unstructured else group_scores
    # The small addend keeps 0.7 · 10 = 7 from flooring to 6 in floating point.
    wanted = int(V.numel() * sparsity + 1e-9) if structure.unstructured else V.numel() // structure.m * structure.n

    for iteration in range(1, options.iterations + 1):
        if iteration > 1:
            for rows in chunks:
                _minimise_quadratic(V[rows], mask[rows], target[rows], R, options.penalty)
        if iteration <= options.gradual_iterations:
            share = 1.0 - (1.0 - iteration / options.gradual_iterations) ** 3
            if structure.unstructured:
                available = V.numel() - num_fixed
            else:
                available = sum(int(scores(rows).isfinite().sum()) for rows in chunks) if fixed is not None else wanted
            if iteration == options.gradual_iterations and not structure.unstructured:
                count = available
            else:
                count = min(max(int(wanted * share + 1e-9) - num_fixed, 0), available)
            mark_smallest(scores, chunks, count, mask)
            if fixed is not None:
                mask |= fixed
    Z = V.masked_fill_(mask, 0.0)
    if options.refine_iterations:
        conjugate_gradient(Z, target, mask, hessian.normalised, options.refine_iterations)
    loss = hessian.error(target.sub_(Z))
    return Z.div_(hessian.scale).to(W.dtype), loss


def _minimise_quadratic(
    V: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, R: torch.Tensor, penalty: float
) -> None:
    """V ← X + U with X = argmin ½ tr((X − target) Hn (X − target)ᵀ) + ρ/2 ‖X − Z + U‖², in place, for some rows.

    X = (target Hn + ρ (Z − U)) R; with Hn R = I − ρ R this is target + ρ (Z − U − target) R, one product.
    """
    # Z and U have disjoint support, so Z − U is V with the sign turned on the mask.
    difference = torch.where(mask, -V, V).sub_(target)
    V.mul_(mask).add_(target).addmm_(difference, R, alpha=penalty)

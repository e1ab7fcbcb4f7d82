"""Masks and weights solved together: ADMM with a mask that grows and is chosen again. Torch only.

The alternating direction method of multipliers for pruning with a gradual mask is that of "Fast and Effective Weight
Update for Pruned Large Language Models" (arXiv 2401.02938); conjugate gradients at the end as in ALPS
(arXiv 2406.07831); over-relaxation as in Boyd et al., "Distributed Optimization and Statistical Learning via the
Alternating Direction Method of Multipliers" (2011), section 3.4.3.

Ours are the penalty, which follows the spectrum of the Hessian, and the steep growth of the mask: decision 0008.
"""

from dataclasses import dataclass

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.pruning import hessian as hessian_module
from sinkprune_plugin.pruning.hessian import PreparedHessian, row_chunks
from sinkprune_plugin.pruning.patterns import MaskStructure
from sinkprune_plugin.pruning.precision import steering_dtype
from sinkprune_plugin.pruning.reconstruct import conjugate_gradient
from sinkprune_plugin.pruning.selection import mark_smallest
from sinkprune_plugin.pruning.swaps import exchange

__all__ = ["ADMMOptions", "solve", "solver_bytes"]

# Of a row, before its weights are solved for again: weights that fit the new mask make further exchanges pay.
_EXCHANGES_AT_ONCE = 5

# α of over-relaxation, for which Boyd et al. name 1.5 to 1.8.
RELAXATION = 1.7
# The mask has the share 1 − (1 − k/n)^GROWTH of its final size in iteration k of n: with n = 15 three quarters at once,
# 99 % in the third iteration. The iterations left choose it again, which pays more than growing slowly.
GROWTH = 20


@dataclass(frozen=True)
class ADMMOptions:
    """How the solver iterates.

    :param iterations: ADMM iterations, each one matrix product in :func:`.steering_dtype`
    :param gradual_iterations: iterations in which the mask grows and is chosen again; later ones keep it as it is
    :param penalty: ρ, weight of the agreement between dense and pruned variables, in units of the root of the Hessian's
        spectral flatness (:class:`PreparedHessian`)
    :param refine_iterations: steps of conjugate gradients on the final mask in float32, 0 for none
    :param mask_swaps: exchanges of a kept and a removed weight in each row, at most; see :mod:`.swaps`
    :raises UsageError: if a number is out of range
    """

    iterations: int = 20
    gradual_iterations: int = 15
    penalty: float = 1.0
    refine_iterations: int = 4
    mask_swaps: int = 0

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
        if self.mask_swaps < 0:
            raise UsageError(f"mask_swaps is {self.mask_swaps}; it can't be negative, and 0 makes none")


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

    Unstructured: floor(numel · sparsity) weights of the whole matrix are removed. N:M: N of every M consecutive
    columns. Fixed zeros and the columns of dead features are removed first and count toward that; only if they alone
    exceed the share, more are removed.

    Memory: see :func:`solver_bytes`; 3.0 GB for 4096 × 12288 with a drift, its Hessian included.

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
    fixed = hessian.dead.expand(W.shape) if fixed_zeros is None else fixed_zeros | hessian.dead
    R = hessian.resolvent(options.penalty * hessian.flatness**0.5, steering_dtype(W.device))
    chunks = row_chunks(*W.shape)

    # V = X + U holds both other variables: the projection splits it into Z (outside the mask) and U (on the mask).
    V = target.clone()
    mask = torch.zeros_like(V, dtype=torch.bool)
    selection = _Selection(V, fixed, sparsity, structure, chunks)
    for iteration in range(1, options.iterations + 1):
        if iteration > 1:
            for rows in chunks:
                _minimise_quadratic(V[rows], mask[rows], target[rows], R)
        if iteration <= options.gradual_iterations:
            selection.update(mask, 1.0 - (1.0 - iteration / options.gradual_iterations) ** GROWTH)
    Z = V.masked_fill_(mask, 0.0)
    loss = conjugate_gradient(Z, target, mask, hessian.normalised, options.refine_iterations)
    for made in range(0, options.mask_swaps, _EXCHANGES_AT_ONCE):
        most = min(_EXCHANGES_AT_ONCE, options.mask_swaps - made)
        if not exchange(Z, mask, target, hessian.normalised, structure, fixed, most):
            break
        loss = conjugate_gradient(Z, target, mask, hessian.normalised, options.refine_iterations)
    return Z.div_(hessian.scale).to(W.dtype), loss


def solver_bytes(rows: int, columns: int, *, dense_target: bool) -> int:
    """Most memory that preparing a Hessian and solving for one weight take, Hessian and drift included.

    :param rows: output features
    :param columns: input features
    :param dense_target: whether there is a drift
    :return: bytes of the phase that takes most. With squares of the columns and weights in float32 these are:
        preparing for a drift 5 squares (Hessian, drift, factor, solution and its transpose); factoring the resolvent 3
        squares, 4 with a drift, and the target; iterating a square less, target and state, up to five masks of a byte
        per weight, and four chunks of rows
    """
    square, weight = 4 * columns**2, 4 * rows * columns
    chunk = min(hessian_module.CHUNK_BYTES, weight)
    held = 2 if dense_target else 1
    preparing = 5 * square if dense_target else square
    factoring = (held + 2) * square + 1.5 * weight
    iterating = (held + 1) * square + 3.25 * weight + 4 * chunk
    # In addition a few vectors, such as the Hessian's scale.
    return int(max(preparing, factoring, iterating)) + 32 * columns


class _Selection:
    """Which entries of V are removed at a share of the final sparsity.

    :param V: (rows, C) float32, read at every update
    :param fixed: (rows, C) bool, entries that are removed at every share
    :param sparsity: share of zeros for the unstructured case
    :param structure: mask structure
    :param chunks: slices of rows
    """

    def __init__(
        self,
        V: torch.Tensor,
        fixed: torch.Tensor,
        sparsity: float,
        structure: MaskStructure,
        chunks: list[slice],
    ) -> None:
        self._V = V
        self._fixed = fixed
        self._num_fixed = int(fixed.sum())
        self._structure = structure
        self._chunks = chunks
        # The small addend keeps 0.7 · 10 = 7 from flooring to 6 in floating point.
        self._wanted = (
            int(V.numel() * sparsity + 1e-9) if structure.unstructured else V.numel() // structure.m * structure.n
        )
        # Entries that can't be chosen now: the fixed ones, which are chosen already, and those that stay in their
        # group.
        self._excluded = fixed
        if not structure.unstructured:
            self._excluded = torch.empty_like(V, dtype=torch.bool)

    def update(self, mask: torch.Tensor, share: float) -> None:
        """Choose again for the current V.

        :param mask: (rows, C) bool, overwritten
        :param share: part of the final number of zeros, 1 at the end
        """
        if not self._structure.unstructured:
            for rows in self._chunks:
                ranks = self._V[rows].abs()
                if self._num_fixed:
                    ranks.masked_fill_(self._fixed[rows], -1.0)
                self._excluded[rows] = ~self._structure.lowest_in_groups(ranks) | self._fixed[rows]
        count = max(round(self._wanted * share) - self._num_fixed, 0)
        if not self._structure.unstructured:
            candidates = self._wanted
            if self._num_fixed:
                # A group may have more fixed zeros than N, so what is left to choose is counted, not computed.
                candidates = int((~self._excluded).sum())
            if share == 1.0 or count >= candidates:
                # Every candidate goes: nothing is left to choose.
                torch.logical_not(self._excluded, out=mask)
                mask |= self._fixed
                return
        mark_smallest(self._scores, self._chunks, count, mask)
        if self._num_fixed:
            mask |= self._fixed

    def _scores(self, rows: slice) -> torch.Tensor:
        scores = self._V[rows].abs()
        if self._num_fixed or not self._structure.unstructured:
            scores.masked_fill_(self._excluded[rows], torch.inf)
        return scores


def _minimise_quadratic(V: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, R: torch.Tensor) -> None:
    """V ← αX + (1 − α)Z + U with X = argmin ½ tr((X − target) Hn (X − target)ᵀ) + ρ/2 ‖X − Z + U‖², in place.

    X = (target Hn + ρ (Z − U)) (Hn + ρI)⁻¹; with R = ρ (Hn + ρI)⁻¹ and D = Z − U − target this is target + D R.

    :param V: (rows, C) float32
    :param mask: (rows, C) bool
    :param target: (rows, C) float32
    :param R: (C, C) in the dtype of the product; bfloat16 moves X by 2⁻⁹ of D, whatever the Hessian
    """
    # Z and U have disjoint support, so Z − U is V with its sign flipped on the mask. Multiplying by a mask without a
    # pattern is three times as fast on a CPU as `where`.
    D = V * mask
    torch.sub(V, D, alpha=2.0, out=D)
    D.sub_(target)
    # (1 − α)Z + U = (1 − α/2)V − α/2 (Z − U), and Z − U = D + target.
    V.lerp_(target, RELAXATION / 2).sub_(D, alpha=RELAXATION / 2)
    if R.dtype == D.dtype:
        V.addmm_(D, R, alpha=RELAXATION)
    else:
        V.add_(D.to(R.dtype) @ R, alpha=RELAXATION)

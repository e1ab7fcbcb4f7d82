"""Mathematics of (sink-aware) SparseGPT: token-weighted Hessian and the column sweep. Torch only.

SparseGPT: arXiv 2301.00774; token weights: "Sink-Aware Pruning for Diffusion Language Models" (arXiv 2602.17664).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sinkprune_plugin.pruning.hessian import raise_dampening
from sinkprune_plugin.pruning.patterns import MaskStructure, lowest_in_rows

__all__ = ["InverseFactor", "accumulate_hessian", "invert_hessian", "product_precision", "sparsify_weight"]

SGPT_PRECISION = torch.float32


def accumulate_hessian(H: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, scale: float = 1.0) -> None:
    """H += s Σ_k (w_k x_k)(w_k x_k)ᵀ, in place.

    On CUDA the product of rows in bfloat16 or float16 runs in TF32, whose eleven significant bits hold theirs (eight
    and eleven): with weights of 0 and 1 every product is exact, as in float32, and sums are float32 in both. The weight
    of a soft mask between 0 and 1 is rounded to TF32 with its row, a relative error of at most 2⁻¹¹ for that token.
    The scale is applied to the sum, where it rounds nothing.

    :param H: (C, C) float32
    :param x: (B, T, C) input of a Linear, any floating dtype
    :param weights: (B, T) float32 token weights w, 0 on padding
    :param scale: weight s of the timestep
    """
    # float32 whatever the model's dtype: thousands of bfloat16 outer products would lose the small eigenvalues.
    rows = (x.to(SGPT_PRECISION) * weights.unsqueeze(-1)).reshape(-1, x.shape[-1])
    with _product_precision(product_precision(x.dtype, x.device.type)):
        H.addmm_(rows.T, rows, alpha=scale)


def product_precision(dtype: torch.dtype, device_type: str) -> str | None:
    """How the rows of an input are multiplied, in the words of ``torch.backends.cuda.matmul.fp32_precision``.

    :param dtype: dtype of the input
    :param device_type: where it is, for instance ``cuda``
    :return: ``tf32`` where that is exact for the dtype, ``ieee`` for other dtypes, None on other devices, where there
        is no choice
    """
    if device_type != "cuda":
        return None
    return "tf32" if dtype in (torch.bfloat16, torch.float16) else "ieee"


@contextlib.contextmanager
def _product_precision(precision: str | None) -> Iterator[None]:
    if precision is None:
        yield
        return
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


@dataclass(frozen=True)
class InverseFactor:
    """What the column sweep needs of a Hessian.

    :param upper: (C, C) float32, upper Cholesky factor of the inverse of the dampened Hessian
    :param dead: (C,) bool, features that were never active
    :param dampening_frac: share of the mean diagonal that was added, larger than asked for if that was too little
    """

    upper: torch.Tensor
    dead: torch.Tensor
    dampening_frac: float

    def dense_output_target(self, W: torch.Tensor, drift: torch.Tensor) -> torch.Tensor:
        """The weight whose output on the current inputs comes closest to the dense one: W + W D (H + λI)⁻¹.

        :param W: (rows, C) dense weight, any floating dtype, left untouched
        :param drift: (C, C) float32 D = Σ w² (x̄ − x) xᵀ, scaled as the Hessian was
        :return: (rows, C) float32
        """
        W = W.to(SGPT_PRECISION)
        # (H + λI)⁻¹ = Uᵀ U for its upper Cholesky factor U.
        return W + (W @ drift) @ self.upper.T @ self.upper


def invert_hessian(H: torch.Tensor, dampening_frac: float, name: str) -> InverseFactor:
    """Factor the inverse of the dampened Hessian; once for all weights that share it.

    :param H: (C, C) float32, overwritten
    :param dampening_frac: share of the mean diagonal that is added to the diagonal
    :param name: module name for the message
    :return: the factor and the dead features
    :raises UsageError: if the Hessian stays indefinite with the largest dampening
    """
    diagonal = H.diagonal()
    dead = diagonal == 0
    # A feature that is never active leaves its row and column empty; the 1 keeps H invertible.
    diagonal[dead] = 1.0
    mean = diagonal.mean()
    added = 0.0
    while True:
        diagonal.add_((dampening_frac - added) * mean)
        added = dampening_frac
        lower, info = torch.linalg.cholesky_ex(H)
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0:
                return InverseFactor(upper, dead, dampening_frac)
        dampening_frac = raise_dampening(dampening_frac, name)


def sparsify_weight(
    W: torch.Tensor,
    factor: InverseFactor,
    sparsity: float,
    structure: MaskStructure,
    *,
    block_size: int,
    fixed_zeros: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Prune a weight column by column and let the remaining columns make up for the error.

    Unstructured: in each block of columns the floor(numel · sparsity) weights with the smallest W² / diag(U)² are
    removed. N:M: at every group of M columns the N smallest of each row are removed, chosen when the sweep arrives
    there, with all updates made so far.

    :param W: (rows, C) weight, any floating dtype, left untouched
    :param factor: inverse factor U of the Hessian of W's input
    :param sparsity: share of zeros for the unstructured case
    :param structure: mask structure
    :param block_size: columns in a lazy-update block; for N:M widened to a multiple of M
    :param fixed_zeros: (rows, C) bool, weights that must stay zero, for instance those of a pruned model: they go first
        and count, and where they alone are more than the share, more go
    :return: pruned weight in W's dtype, and Σ (error)² / 2 in the Hessian's metric
    """
    dtype = W.dtype
    W = W.to(SGPT_PRECISION, copy=True)
    U = factor.upper
    columns = W.shape[1]
    # The weights of dead features are removed: nothing is known about them and nothing depends on them.
    W[:, factor.dead] = 0.0

    if not structure.unstructured:
        block_size = -(-block_size // structure.m) * structure.m
    loss = torch.zeros((), dtype=SGPT_PRECISION, device=W.device)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block = W[:, start:stop]
        U_block = U[start:stop, start:stop]
        diagonal = U_block.diagonal()
        fixed = None if fixed_zeros is None else fixed_zeros[:, start:stop]
        if structure.unstructured:
            scores = _first(block.square() / diagonal.square(), fixed)
            # The small addend keeps 0.7 · 10 = 7 from flooring to 6 in floating point.
            count = int(scores.numel() * sparsity + 1e-9)
            mask = lowest_in_rows(scores.reshape(1, -1), count).reshape(scores.shape)
            mask = mask if fixed is None else mask | fixed
        else:
            mask = torch.zeros_like(block, dtype=torch.bool)

        errors = torch.zeros_like(block)
        for column in range(stop - start):
            if not structure.unstructured and column % structure.m == 0:
                group = slice(column, column + structure.m)
                scores = block[:, group].square() / diagonal[group].square()
                if fixed is None:
                    mask[:, group] = structure.lowest_in_groups(scores)
                else:
                    mask[:, group] = structure.lowest_in_groups(_first(scores, fixed[:, group])) | fixed[:, group]
            error = torch.where(mask[:, column], block[:, column], 0.0) / diagonal[column]
            block[:, column:].addr_(error, U_block[column, column:], alpha=-1.0)
            errors[:, column] = error
        # Exact zeros: the update above leaves rounding residue at the pruned positions.
        block.masked_fill_(mask, 0.0)
        loss += errors.square().sum() / 2
        W[:, stop:].addmm_(errors, U[start:stop, stop:], alpha=-1.0)
    return W.to(dtype), float(loss)


def _first(scores: torch.Tensor, fixed: torch.Tensor | None) -> torch.Tensor:
    """Put fixed zeros before everything else: updates of earlier columns have filled them meanwhile."""
    return scores if fixed is None else scores.masked_fill(fixed, -1.0)

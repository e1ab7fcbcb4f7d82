"""Weights solved on a fixed mask: preconditioned conjugate gradients, each output row independent. Torch only.

The last step of ALPS (arXiv 2406.07831). In the coordinates of :class:`PreparedHessian` the diagonal preconditioner is
the identity, so plain conjugate gradients are the preconditioned ones.
"""

import torch

from sinkprune_plugin.pruning.hessian import PreparedHessian, row_chunks

__all__ = ["conjugate_gradient", "reconstruct"]

# A row is solved once its squared residual fell by this factor, beyond what float32 resolves. Steps after that divide
# rounding errors by each other; within a few hundred of them a row can grow without bound.
_SOLVED = 1e-16


def reconstruct(
    W: torch.Tensor, mask: torch.Tensor, hessian: PreparedHessian, *, iterations: int = 20
) -> tuple[torch.Tensor, float]:
    """Solve for the weights that stay, given which ones are removed.

    :param W: (rows, C) dense weight, any floating dtype, left untouched
    :param mask: (rows, C) bool, True where the weight is removed; columns of dead features always are
    :param hessian: prepared Hessian of W's input
    :param iterations: steps of conjugate gradients
    :return: pruned weight in W's dtype, and half its squared output error
    """
    target = hessian.target(W)
    mask = mask | hessian.dead
    Z = target.masked_fill(mask, 0.0)
    loss = conjugate_gradient(Z, target, mask, hessian.normalised, iterations)
    return Z.div_(hessian.scale).to(W.dtype), loss


def conjugate_gradient(
    Z: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, Hn: torch.Tensor, iterations: int
) -> float:
    """Lower ½ tr((Z − target) Hn (Z − target)ᵀ) over the entries of Z outside the mask, in place.

    Each step lowers the error of every row. Temporaries: four chunks of rows, see ``row_chunks``.

    :param Z: (rows, C) float32 starting point, zero on the mask
    :param target: (rows, C) float32
    :param mask: (rows, C) bool, True where Z stays zero
    :param Hn: (C, C) float32, positive definite with unit diagonal
    :param iterations: steps, each one product with Hn; one more gives the first residual
    :return: the error that is left
    """
    error = torch.zeros((), dtype=torch.float64, device=Z.device)
    for rows in row_chunks(*Z.shape):
        difference = target[rows] - Z[rows]
        residual = difference @ Hn
        error += difference.mul_(residual).sum(dtype=torch.float64) / 2
        del difference
        # Multiplying is three times as fast on a CPU as filling under a mask without a pattern.
        kept = ~mask[rows]
        direction = residual.mul_(kept).clone()
        squares = _row_sums(residual, residual)
        solved = squares * _SOLVED
        for _ in range(iterations):
            step = (direction @ Hn).mul_(kept)
            curvature = _row_sums(direction, step)
            alpha = torch.where((squares > solved) & (curvature > 0), squares / curvature, 0.0)
            Z[rows].addcmul_(alpha, direction)
            residual.addcmul_(alpha, step, value=-1.0)
            # A step along the direction d gains ½ α rᵀd, and rᵀd = rᵀr: r is orthogonal to the directions before.
            error -= (alpha * squares).sum(dtype=torch.float64) / 2
            before, squares = squares, _row_sums(residual, residual)
            direction.mul_(torch.where(squares > solved, squares / before, 0.0)).add_(residual)
    return max(0.0, float(error))


def _row_sums(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(left, right).unsqueeze(1)

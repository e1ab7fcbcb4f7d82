"""Weights solved on a fixed mask: preconditioned conjugate gradients, each output row independent. Torch only.

The last step of ALPS (arXiv 2406.07831). In the coordinates of :class:`PreparedHessian` the diagonal preconditioner is
the identity, so plain conjugate gradients are the preconditioned ones.
"""

import torch

from sinkprune_plugin.pruning.hessian import PreparedHessian, row_chunks

__all__ = ["conjugate_gradient", "reconstruct"]


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
    conjugate_gradient(Z, target, mask, hessian.normalised, iterations)
    loss = hessian.error(target.sub_(Z))
    return Z.div_(hessian.scale).to(W.dtype), loss


def conjugate_gradient(
    Z: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, Hn: torch.Tensor, iterations: int
) -> None:
    """Lower ½ tr((Z − target) Hn (Z − target)ᵀ) over the entries of Z outside the mask, in place.

    Each step lowers the error of every row. Temporaries: four chunks of rows, see ``row_chunks``.

    :param Z: (rows, C) float32 starting point, zero on the mask
    :param target: (rows, C) float32
    :param mask: (rows, C) bool, True where Z stays zero
    :param Hn: (C, C) float32, positive definite with unit diagonal
    :param iterations: steps
    """
    for rows in row_chunks(*Z.shape):
        pruned = mask[rows]
        residual = ((target[rows] - Z[rows]) @ Hn).masked_fill_(pruned, 0.0)
        direction = residual.clone()
        squares = residual.square().sum(dim=1, keepdim=True)
        for _ in range(iterations):
            step = (direction @ Hn).masked_fill_(pruned, 0.0)
            curvature = (direction * step).sum(dim=1, keepdim=True)
            # A solved row has neither residual nor curvature left and stays as it is.
            alpha = torch.where(curvature > 0, squares / curvature, 0.0)
            Z[rows].addcmul_(alpha, direction)
            residual.addcmul_(alpha, step, value=-1.0)
            before, squares = squares, residual.square().sum(dim=1, keepdim=True)
            direction.mul_(torch.where(before > 0, squares / before, 0.0)).add_(residual)

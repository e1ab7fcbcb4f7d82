"""Random layers with correlated inputs, and plain references for the solvers."""

import torch

from sinkprune_plugin.pruning.hessian import prepare_hessian

DAMPENING = 0.01


def make_layer(seed, rows, columns, tokens=None):
    """W (rows, columns), x (tokens, columns) with strongly correlated features, H = xᵀx."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens or 4 * columns, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), x, x.T @ x


def prepared(H, drift=None, dampening=DAMPENING, *, invertible=False):
    drift = None if drift is None else drift.clone()
    return prepare_hessian(H.clone(), dampening, "proj", drift=drift, invertible=invertible)


def dampened(H, dampening=DAMPENING):
    """H + λI in float64, dead features with a 1 on the diagonal."""
    H = H.double().clone()
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    return H + dampening * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def error_of(pruned, target, H, dampening=DAMPENING):
    """½ tr((pruned − target) (H + λI) (pruned − target)ᵀ) in float64."""
    E = pruned.double() - target.double()
    return float((E @ dampened(H, dampening) * E).sum() / 2)


def least_squares(target, mask, H, dampening=DAMPENING):
    """Exact weights on a mask, row by row, in float64."""
    H = dampened(H, dampening)
    result = torch.zeros_like(target, dtype=torch.float64)
    for row in range(len(target)):
        kept = (~mask[row]).nonzero().flatten()
        if len(kept):
            right = H[kept] @ target[row].double()
            result[row, kept] = torch.linalg.solve(H[kept][:, kept], right)
    return result

"""Exchanges of one kept and one removed weight of a row, as long as they lower the row's error. Torch only.

The idea is that of "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale", here with the weight that comes in
set to its best value. In the coordinates of :class:`PreparedHessian`, whose diagonal is one, with the gradient
g = (z − t) Hn of a row's error ½ (z − t) Hn (z − t)ᵀ, taking out z_p and putting in the best value at q changes it by

    Δ(p, q) = ½ z_p² − z_p g_p − ½ (g_q − z_p Hn_pq)².
"""

import torch

from sinkprune_plugin.pruning import hessian as hessian_module
from sinkprune_plugin.pruning.patterns import MaskStructure

__all__ = ["exchange"]

# Kept weights of a row that are looked at: those whose removal alone costs least. All of them where there are no more.
CANDIDATES = 64
# An exchange that lowers a row's error by less than this share isn't made: float32 can't tell it from none.
LEAST_GAIN = 1e-5


def exchange(
    Z: torch.Tensor,
    mask: torch.Tensor,
    target: torch.Tensor,
    Hn: torch.Tensor,
    structure: MaskStructure,
    fixed: torch.Tensor,
    most: int,
) -> int:
    """Make the best exchange of every row, again and again, in place. Zeros in a row, or in a group, stay as many.

    Temporaries: at most four chunks, see ``row_chunks``.

    :param Z: (rows, C) float32, zero on the mask
    :param mask: (rows, C) bool, True where Z is zero
    :param target: (rows, C) float32
    :param Hn: (C, C) float32, positive definite with unit diagonal
    :param structure: N:M exchanges within groups of M columns only
    :param fixed: (rows, C) bool, zeros that stay
    :param most: exchanges of a row
    :return: exchanges of all rows
    """
    rows, columns = Z.shape
    pairs = columns * (min(CANDIDATES, columns) if structure.unstructured else structure.m)
    at_once = max(1, hessian_module.CHUNK_BYTES // (4 * pairs))
    made = 0
    for first in range(0, rows, at_once):
        part = slice(first, first + at_once)
        z, removed, free = Z[part], mask[part], ~fixed[part]
        difference = z - target[part]
        g = difference @ Hn
        for _ in range(most):
            errors = 0.5 * (difference * g).sum(dim=1)
            cost = (0.5 * z.square() - z * g).masked_fill_(removed, torch.inf)
            find = _best_anywhere if structure.unstructured else _best_in_groups
            change, p, q = find(z, g, cost, removed & free, Hn, structure.m)
            # A row without error has nothing to gain.
            better = torch.nonzero(change < -LEAST_GAIN * errors).flatten()
            if not len(better):
                break
            p, q = p[better], q[better]
            out = z[better, p]
            come = out * Hn[p, q] - g[better, q]
            z[better, p], z[better, q] = 0.0, come
            removed[better, p], removed[better, q] = True, False
            difference[better, p] -= out
            difference[better, q] += come
            g[better] += come[:, None] * Hn[q] - out[:, None] * Hn[p]
            made += len(better)
    return made


def _best_anywhere(
    z: torch.Tensor, g: torch.Tensor, cost: torch.Tensor, can_come: torch.Tensor, Hn: torch.Tensor, _: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best exchange of each row, and its change: (rows,) float32, (rows,) p and (rows,) q."""
    lowest, candidates = cost.topk(min(CANDIDATES, cost.shape[1]), dim=1, largest=False)
    coming = Hn[candidates].mul_(-z.gather(1, candidates)[:, :, None]).add_(g[:, None, :])
    change = coming.square_().mul_(-0.5).add_(lowest[:, :, None])
    change.masked_fill_(~can_come[:, None, :], torch.inf)
    best, place = change.flatten(1).min(dim=1)
    width = cost.shape[1]
    return best, candidates.gather(1, (place // width)[:, None]).flatten(), place % width


def _best_in_groups(
    z: torch.Tensor, g: torch.Tensor, cost: torch.Tensor, can_come: torch.Tensor, Hn: torch.Tensor, m: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`_best_anywhere`, with both of a group of ``m`` columns."""
    blocks = Hn.unflatten(0, (-1, m)).unflatten(2, (-1, m)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    z, g, cost, can_come = (each.unflatten(1, (-1, m)) for each in (z, g, cost, can_come))
    coming = (blocks * -z[..., None]).add_(g[..., None, :])
    change = coming.square_().mul_(-0.5).add_(cost[..., None])
    change.masked_fill_(~can_come[..., None, :], torch.inf)
    best, place = change.flatten(1).min(dim=1)
    group, pair = place // (m * m) * m, place % (m * m)
    return best, group + pair // m, group + pair % m

"""Groups of input columns removed from a weight, and the rest adapted: optimal brain surgeon for groups. Torch only.

With H the second moments of the weight's input, removing the columns g of W and adapting the others raises the squared
output error by tr(W_g (H⁻¹_gg)⁻¹ W_gᵀ). The group with the smallest rise goes, W and H⁻¹ are updated, and so on: ZipLM
(arXiv 2302.04089, equations 3 and 4), also used by DarwinLM (arXiv 2502.07780).

All of that needs the weight only through its Gram matrix G = WᵀW, so that both H⁻¹ and G are (C, C) and are brought up
to date many removals at a time, by matrix products, while every single choice is still the exact one.
"""

from dataclasses import dataclass

import torch

from sinkprune_plugin.pruning.hessian import PRECISION, PreparedHessian
from sinkprune_plugin.pruning.reconstruct import conjugate_gradient

__all__ = ["RemovalPath", "obs_path", "score_path", "solve_kept"]

# Removed columns that wait until H⁻¹ and G are brought up to date. A choice reads one row of both, corrected for those
# that wait: 2·C·LAZY_COLUMNS multiplications instead of the 3·C² that write both matrices. With 12288 channels both
# matrices have 1.2 GB, which a removal on its own would read and write each time.
LAZY_COLUMNS = 128

# Steps of conjugate gradients where single weights must stay zero.
_REFINE_ITERATIONS = 20


@dataclass(frozen=True)
class RemovalPath:
    """Units in the order of their removal, each one the best choice given those before it.

    :param order: (K,) int64 on CPU, indices of units
    :param errors: (K + 1,) float64 on CPU, half the squared output error after 0 … K removals with the rest adapted
    """

    order: torch.Tensor
    errors: torch.Tensor

    def kept(self, count: int, remaining: int) -> torch.Tensor:
        """What is left when only so many units remain.

        :param count: units at the beginning
        :param remaining: units to keep, at least count − K
        :return: (remaining,) int64, ascending
        """
        alive = torch.ones(count, dtype=torch.bool)
        alive[self.order[: count - remaining]] = False
        return alive.nonzero().flatten()


def obs_path(W: torch.Tensor, hessian: PreparedHessian, width: int, number: int) -> RemovalPath:
    """Remove units one at a time, each time the one whose removal raises the output error least.

    Memory in addition to W and the prepared Hessian: its inverse, the Gram matrix and one more while it is inverted,
    each (C, C) float32: 1.8 GB at 12288 columns.

    :param W: (rows, C) dense weight, any floating dtype, left untouched
    :param hessian: prepared Hessian of W's input; its target is W, or the dense output where it has a drift
    :param width: columns of a unit; unit u has the columns u · width … (u + 1) · width − 1
    :param number: units to remove, at most C / width
    :return: the units and the error after each
    """
    target = _live_target(W, hessian)
    state = _Removals(target.T @ target, hessian.inverse(), width)
    del target
    steps = [state.remove_best() for _ in range(number)]
    if not steps:
        return RemovalPath(torch.empty(0, dtype=torch.int64), torch.zeros(1, dtype=torch.float64))
    order = torch.stack([unit for unit, _ in steps]).to("cpu")
    rises = torch.stack([rise for _, rise in steps]).to(device="cpu", dtype=torch.float64)
    return RemovalPath(order, torch.cat([torch.zeros(1, dtype=torch.float64), rises.cumsum(0) / 2]))


def score_path(W: torch.Tensor, hessian: PreparedHessian | None, width: int, number: int) -> torch.Tensor:
    """Order units by a score of their own columns, computed once.

    :param W: (rows, C) dense weight, any floating dtype, left untouched
    :param hessian: prepared Hessian: the score is Σ_j ‖W_:j‖² H_jj over the unit's columns j, as in Wanda-sp of FLAP
        (arXiv 2312.11983); None: their squared norm, Σ_j ‖W_:j‖²
    :param width: columns of a unit
    :param number: units to remove
    :return: (number,) int64 on CPU, units in ascending order of their scores
    """
    squares = W.to(PRECISION).square().sum(dim=0)
    if hessian is not None:
        squares = (squares * hessian.scale.square()).masked_fill_(hessian.dead, 0.0)
    scores = squares.view(-1, width).sum(dim=1)
    return scores.sort(stable=True).indices[:number].to("cpu")


def solve_kept(
    W: torch.Tensor, kept: torch.Tensor, hessian: PreparedHessian, *, fixed_zeros: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """The weight on some of its columns whose outputs come closest to the target's: least squares, solved directly.

    What one-at-a-time removal of the other columns ends at, without its rounding.

    :param W: (rows, C) dense weight, any floating dtype, left untouched
    :param kept: (K,) int64, ascending, columns that stay
    :param hessian: prepared Hessian of W's input
    :param fixed_zeros: (rows, C) bool, single weights that must stay zero; their rows are solved by conjugate gradients
        from there
    :return: (rows, C) in W's dtype, zero in all other columns, and half its squared output error
    """
    target = _live_target(W, hessian)
    Hn = hessian.normalised
    kept = kept.to(W.device)
    # (target Hn)_S (Hn_SS)⁻¹
    lower = torch.linalg.cholesky(Hn[kept][:, kept])
    Z = torch.zeros_like(target)
    Z[:, kept] = torch.cholesky_solve((target @ Hn[:, kept]).T, lower).T
    mask = torch.ones(W.shape[1], dtype=torch.bool, device=W.device).index_fill_(0, kept, False)
    if fixed_zeros is not None and bool((fixed_zeros & ~mask).any()):
        zeros = fixed_zeros | mask
        loss = conjugate_gradient(Z.masked_fill_(zeros, 0.0), target, zeros, Hn, _REFINE_ITERATIONS)
    else:
        loss = hessian.error(target.sub_(Z))
    return Z.div_(hessian.scale).to(W.dtype), loss


def _live_target(W: torch.Tensor, hessian: PreparedHessian) -> torch.Tensor:
    target = hessian.target(W)
    # Nothing is lost with a feature that was never active.
    return target.masked_fill_(hessian.dead, 0.0)


class _Removals:
    """H⁻¹ and G while units leave; the device never waits for the host.

    A removal of the columns g changes, with R = H⁻¹[g], U = (H⁻¹_gg)⁻¹ R and V = G[g] − ½ G_gg U,

        H⁻¹ by −Rᵀ U        and        G by −Vᵀ U − Uᵀ V.

    :param G: (C, C) float32 Gram matrix of the weight, overwritten
    :param inverse: (C, C) float32 H⁻¹, overwritten
    :param width: columns of a unit
    """

    def __init__(self, G: torch.Tensor, inverse: torch.Tensor, width: int) -> None:
        columns = len(G)
        self._G, self._inverse, self._width = G, inverse, width
        self._units = columns // width
        # What every choice looks at: the diagonal blocks of both, (units, width, width), always up to date.
        self._G_blocks, self._inverse_blocks = self._diagonal_blocks(G), self._diagonal_blocks(inverse)
        self._gone = torch.zeros(self._units, dtype=torch.bool, device=G.device)
        room = max(width, LAZY_COLUMNS // width * width)
        self._R, self._U, self._V = (torch.empty(room, columns, dtype=PRECISION, device=G.device) for _ in range(3))
        self._waiting = 0
        self._eye = torch.eye(width, dtype=PRECISION, device=G.device).unsqueeze(0)

    def remove_best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Remove the unit with the smallest rise of the error.

        :return: its index and the rise, both without dimensions
        """
        # A block that is gone may be anything, also singular.
        blocks = self._inverse_blocks
        K = blocks.reciprocal() if self._width == 1 else torch.cholesky_inverse(torch.linalg.cholesky_ex(blocks)[0])
        rises = (K * self._G_blocks).sum(dim=(1, 2)).masked_fill_(self._gone, torch.inf)
        rise, unit = rises.min(dim=0)
        self._remove(unit, K.index_select(0, unit.unsqueeze(0))[0])
        return unit, rise

    def _remove(self, unit: torch.Tensor, K: torch.Tensor) -> None:
        g = unit * self._width + torch.arange(self._width, device=unit.device)
        R_before, U_before, V_before = (each[: self._waiting] for each in (self._R, self._U, self._V))
        U_at_g = U_before.index_select(1, g).T
        R = self._inverse.index_select(0, g).addmm_(R_before.index_select(1, g).T, U_before, alpha=-1.0)
        G = self._G.index_select(0, g).addmm_(V_before.index_select(1, g).T, U_before, alpha=-1.0)
        G.addmm_(U_at_g, V_before, alpha=-1.0)
        U = K @ R
        V = G.addmm(G.index_select(1, g), U, alpha=-0.5)
        self._inverse_blocks -= self._blocks_of_product(R, U)
        change = self._blocks_of_product(V, U)
        self._G_blocks -= change + change.transpose(1, 2)
        self._gone.index_fill_(0, unit.unsqueeze(0), True)
        # Later choices invert it.
        self._inverse_blocks.index_copy_(0, unit.unsqueeze(0), self._eye)
        rows = slice(self._waiting, self._waiting + self._width)
        self._R[rows], self._U[rows], self._V[rows] = R, U, V
        self._waiting += self._width
        if self._waiting == len(self._R):
            self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        self._inverse.addmm_(self._R.T, self._U, alpha=-1.0)
        self._G.addmm_(self._V.T, self._U, alpha=-1.0)
        self._G.addmm_(self._U.T, self._V, alpha=-1.0)
        self._waiting = 0

    def _diagonal_blocks(self, matrix: torch.Tensor) -> torch.Tensor:
        blocks = matrix.view(self._units, self._width, self._units, self._width)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def _blocks_of_product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Diagonal blocks of leftᵀ right, for two (width, C) matrices."""
        left, right = (each.view(self._width, self._units, self._width).transpose(0, 1) for each in (left, right))
        return left.transpose(1, 2) @ right

"""Second moments of a Linear's input, and what the solvers need from them. Torch only.

With x the input that a Linear gets from the model as pruned so far, x̄ the one that the dense model gives it in the same
pass and w the token weights, a calibration gathers

    H = Σ w² x xᵀ        and, for dense-output targets,        D = Σ w² (x̄ − x) xᵀ.

The drift D takes the place of C = Σ w² x̄ xᵀ = H + D: it is exactly zero as long as both models agree, and where they
differ little it keeps the digits that the difference C − H would lose in float32.
"""

import math
from dataclasses import dataclass, field

import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["PreparedHessian", "accumulate_drift", "prepare_hessian", "raise_dampening", "row_chunks", "square_matrix"]

PRECISION = torch.float32

# Bytes of one float32 temporary of a solver. A solver holds up to four at a time in addition to its state: half a GB.
CHUNK_BYTES = 2**27

# Dampening is raised until the factorisation succeeds, but not beyond the mean diagonal itself.
_DAMPENING_GROWTH = 10.0
_DAMPENING_LIMIT = 1.0


def accumulate_drift(
    D: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, weights: torch.Tensor, scale: float = 1.0
) -> None:
    """D += s Σ_k w_k² (x̄_k − x_k) x_kᵀ, in place.

    :param D: (C, C) float32
    :param x: (B, T, C) input in the model as pruned so far, any floating dtype
    :param dense: (B, T, C) input in the dense model, same pass
    :param weights: (B, T) float32 token weights w, 0 on padding
    :param scale: weight s of the timestep
    """
    rows = (x.to(PRECISION) * weights.unsqueeze(-1)).reshape(-1, x.shape[-1])
    difference = (dense.to(PRECISION) - x.to(PRECISION)) * weights.unsqueeze(-1)
    D.addmm_(difference.reshape(-1, x.shape[-1]).T, rows, alpha=scale)


@dataclass
class PreparedHessian:
    """A dampened Hessian with its diagonal scaled to one, shared by all Linears that have the same input.

    In scaled coordinates, weights times ``scale``, the diagonal preconditioner is the identity and the magnitude of a
    weight is its Wanda score. Memory: two (C, C) float32 matrices, a third with a drift and one more while a
    resolvent is factored: 2.4 GB for the 12288 inputs of the widest Linear of an 8 B model.

    :param scale: (C,) float32, root of the dampened Hessian's diagonal
    :param normalised: (C, C) float32, the dampened Hessian over ``scale`` on both sides
    :param dead: (C,) bool, features that were never active
    :param dampening_frac: share of the mean diagonal that was added, larger than asked for if that was too little
    :param flatness: spectral flatness of ``normalised``: geometric over arithmetic mean of its eigenvalues, dead
        features aside; 1 for inputs that don't correlate, near 0 where few directions hold all of their energy
    :param shift: (C, C) float32, D (H + λI)⁻¹ for dense-output targets; None for the weight itself as target
    """

    scale: torch.Tensor
    normalised: torch.Tensor
    dead: torch.Tensor
    dampening_frac: float
    flatness: float
    shift: torch.Tensor | None = None
    _lower: torch.Tensor | None = field(default=None, repr=False)
    _resolvent: tuple[float, torch.Tensor] | None = field(default=None, repr=False)

    def target(self, W: torch.Tensor) -> torch.Tensor:
        """The weight that a solver should approximate: W + W D (H + λI)⁻¹, or W itself.

        It minimises Σ ‖W* x − W x̄‖² + λ ‖W* − W‖², so dampening pulls toward the dense weight, not toward zero.

        :param W: (rows, C) dense weight, any floating dtype
        :return: (rows, C) float32, a new tensor in scaled coordinates
        """
        target = W.to(PRECISION, copy=True)
        if self.shift is not None:
            target.addmm_(target.clone(), self.shift)
        return target.mul_(self.scale)

    def resolvent(self, penalty: float, dtype: torch.dtype = PRECISION) -> torch.Tensor:
        """ρ (Hn + ρI)⁻¹, computed in float32 once and kept. Its eigenvalues lie between 0 and 1.

        :param penalty: ρ > 0
        :param dtype: of the result
        :return: (C, C)
        """
        if self._resolvent is None or self._resolvent[0] != penalty or self._resolvent[1].dtype != dtype:
            self._resolvent = None
            shifted = self.normalised.clone()
            shifted.diagonal().add_(penalty)
            lower = torch.linalg.cholesky(shifted)
            del shifted
            inverse = torch.cholesky_inverse(lower)
            del lower
            self._resolvent = penalty, inverse.mul_(penalty).to(dtype)
        return self._resolvent[1]

    def inverse(self) -> torch.Tensor:
        """Hn⁻¹; once, since the factor that ``prepare_hessian(…, invertible=True)`` kept for it is given up.

        :return: (C, C) float32, a new tensor
        """
        assert self._lower is not None
        lower, self._lower = self._lower, None
        return torch.cholesky_inverse(lower)

    def error(self, difference: torch.Tensor) -> float:
        """Half the squared output error of a weight.

        :param difference: (rows, C) float32, pruned minus target weight in scaled coordinates
        :return: ½ tr(E Hn Eᵀ), dampening included
        """
        total = torch.zeros((), dtype=torch.float64, device=difference.device)
        for rows in row_chunks(*difference.shape):
            E = difference[rows]
            total += (E @ self.normalised).mul_(E).sum(dtype=torch.float64)
        return float(total) / 2


def prepare_hessian(
    H: torch.Tensor, dampening_frac: float, name: str, *, drift: torch.Tensor | None = None, invertible: bool = False
) -> PreparedHessian:
    """Dampen, scale and factor a Hessian; once for all weights that share it.

    :param H: (C, C) float32, any overall factor; overwritten, it becomes ``normalised``
    :param dampening_frac: share of the mean diagonal that is added to the diagonal
    :param name: module name for the message
    :param drift: (C, C) float32 D with the same overall factor as H, overwritten; makes the dense output the target
    :param invertible: :meth:`PreparedHessian.inverse` will be asked for; takes one more (C, C) float32 until then
    :return: the prepared Hessian
    :raises UsageError: if H isn't finite, or stays indefinite with the largest dampening
    """
    if not bool(H.diagonal().isfinite().all()):
        raise UsageError(f"the Hessian of {name} has NaN or Inf; check the checkpoint or load it with dtype float32")
    diagonal = H.diagonal()
    dead = diagonal == 0
    # A feature that is never active leaves its row and column empty; the 1 keeps H invertible.
    diagonal[dead] = 1.0
    mean = float(diagonal.mean())
    added = 0.0
    scale = torch.ones_like(diagonal)
    while True:
        diagonal.add_((dampening_frac - added) * mean / scale.square())
        added = dampening_frac
        factor = diagonal.sqrt()
        H.div_(factor).div_(factor.unsqueeze(1))
        diagonal.fill_(1.0)
        scale.mul_(factor)
        lower, info = torch.linalg.cholesky_ex(H)
        if int(info) == 0:
            break
        dampening_frac = raise_dampening(dampening_frac, name)
    # log det Hn = 2 Σ log Lᵢᵢ; the trace is C, so the arithmetic mean is 1. A dead feature's eigenvalue, 1, adds 0.
    alive = max(1, len(dead) - int(dead.sum()))
    flatness = math.exp(2 * float(lower.diagonal().log().sum(dtype=torch.float64)) / alive)
    kept_lower = lower if invertible else None
    if drift is None:
        return PreparedHessian(scale, H, dead, dampening_frac, flatness, _lower=kept_lower)
    # (D (H + λI)⁻¹)ᵀ = s⁻¹ Hn⁻¹ s⁻¹ Dᵀ, for H + λI = s Hn s with s the diagonal matrix of scales.
    drift.div_(scale)
    shift = torch.cholesky_solve(drift.T, lower).div_(scale.unsqueeze(1)).T
    return PreparedHessian(scale, H, dead, dampening_frac, flatness, shift, kept_lower)


def raise_dampening(dampening_frac: float, name: str) -> float:
    """The share of the mean diagonal to try next where a factorisation failed.

    :param dampening_frac: share that was too little
    :param name: module name for the message
    :return: ten times as much
    :raises UsageError: if that would be more than the mean diagonal itself
    """
    raised = dampening_frac * _DAMPENING_GROWTH
    if raised > _DAMPENING_LIMIT:
        raise UsageError(
            f"the Hessian of {name} is not positive definite even with dampening_frac {dampening_frac:g}; calibrate on "
            "more samples"
        )
    return raised


def square_matrix(matrices: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """The matrix that gathers second moments under a name, made of zeros at its first input.

    :param matrices: name → (C, C) float32
    :param name: the name
    :param x: (…, C) input; the matrix is made on its device
    :return: (C, C) float32
    """
    if name not in matrices:
        matrices[name] = torch.zeros(x.shape[-1], x.shape[-1], dtype=PRECISION, device=x.device)
    return matrices[name]


def row_chunks(num_rows: int, num_columns: int) -> list[slice]:
    """Split a weight into chunks of rows of at most ``CHUNK_BYTES`` in float32.

    :param num_rows: output features
    :param num_columns: input features
    :return: slices that cover all rows
    """
    size = max(1, CHUNK_BYTES // (4 * num_columns))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

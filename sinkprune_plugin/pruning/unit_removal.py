"""Which units go, by any score, and what the weight that reads them becomes. Torch only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sinkprune_plugin.pruning.hessian import PreparedHessian
from sinkprune_plugin.pruning.obs import obs_path, score_path, solve_kept
from sinkprune_plugin.pruning.units import UnitGroup

__all__ = ["Score", "SolvedLevels", "choose_units", "solve_levels", "without_columns"]

Score = Literal["obs", "magnitude", "wanda"]


@dataclass(frozen=True)
class SolvedLevels:
    """One weight at several widths.

    :param errors: squared output error over the output's energy, of each width
    :param columns: (K,) int64 on CPU, columns that stay, of each width
    :param weights: (rows, K) on CPU in the weight's dtype, of each width; empty where only errors were wanted
    """

    errors: tuple[float, ...]
    columns: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]


def choose_units(W: torch.Tensor, hessian: PreparedHessian, group: UnitGroup, kept: int, score: Score) -> torch.Tensor:
    """Choose the units that stay.

    :param W: (rows, C) dense weight that reads the units
    :param hessian: prepared Hessian of its input, invertible for ``obs``
    :param group: its units
    :param kept: channels or heads that stay
    :param score: ``obs`` removes one unit at a time; the others rank them once
    :return: (units,) int64 on CPU, ascending
    """
    return _kept(_path(W, hessian, group, kept, score)[0], group, kept)


def solve_levels(
    W: torch.Tensor,
    hessian: PreparedHessian,
    group: UnitGroup,
    widths: Sequence[int],
    score: Score,
    *,
    compensate: bool,
    fixed_zeros: torch.Tensor | None = None,
    with_weights: bool = True,
) -> SolvedLevels:
    """One weight at several widths: the units are put in order once, as a smaller set is what stays of a larger one.

    :param W: (rows, C) dense weight that reads the units
    :param hessian: prepared Hessian of its input, invertible for ``obs``
    :param group: its units
    :param widths: channels or heads that stay, ascending
    :param score: see :func:`choose_units`
    :param compensate: see :func:`without_columns`
    :param fixed_zeros: see :func:`without_columns`
    :param with_weights: solve for the weights as well, not only for the errors where these come without
    :return: errors and weights
    """
    order, errors = _path(W, hessian, group, min(widths), score)
    energy = hessian.error(hessian.target(W))
    found, columns, weights = [], [], []
    for width in widths:
        columns.append(group.columns(_kept(order, group, width)))
        if with_weights or errors is None:
            weight, error = without_columns(W, columns[-1], hessian, compensate=compensate, fixed_zeros=fixed_zeros)
            weights.append(weight[:, columns[-1].to(W.device)].to("cpu"))
        else:
            error = float(errors[group.units - width // group.together])
        found.append(error / energy if energy else 0.0)
    return SolvedLevels(tuple(found), tuple(columns), tuple(weights) if with_weights else ())


def _path(
    W: torch.Tensor, hessian: PreparedHessian, group: UnitGroup, kept: int, score: Score
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Units in the order of their removal until ``kept`` stay, and the error after each where it is known."""
    number = group.units - kept // group.together
    if score == "obs":
        path = obs_path(W, hessian, group.unit_columns, number)
        return path.order, path.errors
    return score_path(W, hessian if score == "wanda" else None, group.unit_columns, number), None


def _kept(order: torch.Tensor, group: UnitGroup, kept: int) -> torch.Tensor:
    alive = torch.ones(group.units, dtype=torch.bool)
    alive[order[: group.units - kept // group.together]] = False
    return alive.nonzero().flatten()


def without_columns(
    W: torch.Tensor,
    columns: torch.Tensor,
    hessian: PreparedHessian,
    *,
    compensate: bool,
    fixed_zeros: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Empty all other columns of a weight.

    :param W: (rows, C) dense weight, any floating dtype, left untouched
    :param columns: (K,) int64, ascending, columns that stay
    :param hessian: prepared Hessian of its input
    :param compensate: adapt the columns that stay, see :func:`solve_kept`
    :param fixed_zeros: (rows, C) bool, single weights that must stay zero
    :return: (rows, C) in W's dtype, and half its squared output error
    """
    if compensate:
        return solve_kept(W, columns, hessian, fixed_zeros=fixed_zeros)
    pruned = torch.zeros_like(W)
    kept = columns.to(W.device)
    pruned[:, kept] = W[:, kept]
    return pruned, hessian.error(hessian.target(W) - pruned * hessian.scale)

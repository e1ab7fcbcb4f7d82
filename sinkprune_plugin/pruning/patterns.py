"""Which weights a sparsity pattern removes: unstructured per row, or N of every M consecutive input columns."""

import re
from dataclasses import dataclass
from fractions import Fraction

import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["MaskStructure", "lowest_in_rows", "parse_mask_structure", "resolve_sparsity"]

_PATTERN = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class MaskStructure:
    """``n`` weights of every ``m`` consecutive input columns become zero; ``0:0`` is unstructured.

    :param n: weights removed in each group
    :param m: group width in columns
    """

    n: int
    m: int

    @property
    def unstructured(self) -> bool:
        """Whether any weight of an output row may be removed."""
        return self.m == 0

    @property
    def implies_2_of_4(self) -> bool:
        """Whether every four consecutive columns are left with at most two weights: 2:4, 3:4 and 1:2."""
        return self.m in (2, 4) and 2 * self.n >= self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def check_columns(self, name: str, num_columns: int) -> None:
        """Refuse a weight that can't be divided into whole groups.

        :param name: module name for the message
        :param num_columns: input features of the weight
        :raises UsageError: if ``num_columns`` is not a multiple of ``m``
        """
        if not self.unstructured and num_columns % self.m:
            raise UsageError(
                f"{name} has {num_columns} input columns, which mask_structure {self} can't divide into groups of "
                f"{self.m}; add the module to `ignore` or choose a width that divides {num_columns}"
            )

    def lowest_in_groups(self, metric: torch.Tensor) -> torch.Tensor:
        """Mark the ``n`` smallest entries of every group.

        A stable sort rather than a top-k: equal metrics (dead features, already pruned weights) are then always removed
        in column order, on every device.

        :param metric: (rows, columns) scores, columns a multiple of ``m``
        :return: (rows, columns) bool, True where the weight is removed
        """
        rows, columns = metric.shape
        groups = metric.reshape(rows, columns // self.m, self.m)
        order = groups.argsort(dim=-1, stable=True)[..., : self.n]
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).reshape(rows, columns)


def lowest_in_rows(metric: torch.Tensor, count: int) -> torch.Tensor:
    """Mark exactly ``count`` smallest entries of every row; of equal ones the first in the row.

    The same as a stable sort of the rows at a quarter of its cost: a selection finds the threshold, and only where
    several entries equal it does their order matter.

    :param metric: (rows, columns) scores without NaN
    :param count: entries to mark in each row, at most ``columns``
    :return: (rows, columns) bool
    """
    if count == 0:
        return torch.zeros_like(metric, dtype=torch.bool)
    threshold = metric.topk(count, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    below, equal = metric < threshold, metric == threshold
    wanted = count - below.sum(dim=1, keepdim=True)
    if bool((equal.sum(dim=1, keepdim=True) > wanted).any()):
        equal &= equal.cumsum(dim=1) <= wanted
    return below | equal


def parse_mask_structure(text: str) -> MaskStructure:
    """Read ``"N:M"``; ``"0:0"`` means unstructured.

    :param text: the recipe's ``mask_structure``
    :return: the parsed structure
    :raises UsageError: if the text isn't ``N:M`` with 0 < N < M, nor ``0:0``
    """
    match = _PATTERN.fullmatch(str(text).strip())
    if match is None:
        raise UsageError(
            f'mask_structure "{text}" is not of the form "N:M"; use for instance "2:4", or "0:0" for unstructured'
        )
    n, m = int(match[1]), int(match[2])
    if (n, m) != (0, 0) and not 0 < n < m:
        raise UsageError(
            f'mask_structure "{text}" removes {n} of every {m} weights; N must be at least 1 and below M (for '
            'instance "2:4"), or use "0:0" for unstructured'
        )
    return MaskStructure(n, m)


def resolve_sparsity(sparsity: float | list[float] | None, structure: MaskStructure) -> float | list[float]:
    """Check ``sparsity`` against its range and against the N:M structure.

    :param sparsity: share of zeros wanted, one value or one per decoder block; None takes N/M
    :param structure: the mask structure
    :return: the sparsity to use
    :raises UsageError: if a value is outside (0, 1) or contradicts N:M, or if it is missing and the pattern doesn't
        imply it
    """
    if sparsity is None:
        if structure.unstructured:
            raise UsageError("sparsity is missing; give a value between 0 and 1, for instance `sparsity: 0.5`")
        return structure.n / structure.m
    values = sparsity if isinstance(sparsity, list) else [sparsity]
    if not values:
        raise UsageError("sparsity is an empty list; give one value, or one value for each decoder block")
    for value in values:
        if not 0.0 < value < 1.0:
            raise UsageError(f"sparsity {value:g} is outside (0, 1); give the share of zeros, for instance 0.5")
        if not structure.unstructured and abs(value - structure.n / structure.m) > 1e-6:
            raise UsageError(
                f"sparsity {value:g} contradicts mask_structure {structure}, which removes "
                f"{Fraction(structure.n, structure.m)} of the weights; set sparsity to "
                f"{structure.n / structure.m:g} or leave it out"
            )
    return sparsity

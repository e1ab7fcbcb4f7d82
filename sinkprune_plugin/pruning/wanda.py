"""Mathematics of sink-aware Wanda: weighted activation norms and the pruning mask. Torch only.

Paper: "Sink-Aware Pruning for Diffusion Language Models" (arXiv 2602.17664), section 3; Wanda: arXiv 2306.11695.
"""

from typing import Literal

import torch

from sinkprune_plugin.pruning.patterns import MaskStructure, lowest_in_rows

__all__ = ["ActivationNorms", "NormAggregation", "sparsify_weight", "weighted_square_sums"]

WANDA_PRECISION = torch.float32

NormAggregation = Literal["sum_of_norms", "sum_of_squares"]


class ActivationNorms:
    """Activation norm a_j of each input feature, gathered over samples and timesteps.

    With w the token weights and s the weight of the timestep, ``sum_of_norms`` is the published Σ √(s Σ_k (w_k x_kj)²),
    one norm for each sample and timestep; ``sum_of_squares`` is √(Σ s Σ_k (w_k x_kj)²). The sums are kept in float64,
    so that their order doesn't show in float32: equal for one and for many processes.

    :param aggregation: which of the two
    """

    def __init__(self, aggregation: NormAggregation) -> None:
        self.aggregation = aggregation
        # (C,) float64 on the device of the inputs
        self.total: torch.Tensor | None = None

    def add(self, x: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
        """Add one input.

        :param x: (B, T, C) input of a Linear, any floating dtype
        :param weights: (B, T) float32 token weights w, 0 on padding
        :param scale: weight s of the timestep
        :return: (B, C) float32, what was added; not finite if x isn't
        """
        terms = weighted_square_sums(x, weights).mul_(scale)
        if self.aggregation == "sum_of_norms":
            terms = terms.sqrt_()
        # MPS has no float64.
        added = (terms.cpu() if terms.device.type == "mps" else terms).to(torch.float64).sum(dim=0)
        self.total = added if self.total is None else self.total.add_(added)
        return terms

    def norms(self) -> torch.Tensor:
        """The norms a_j.

        :return: (C,) float64
        """
        assert self.total is not None
        return self.total if self.aggregation == "sum_of_norms" else self.total.sqrt()


def weighted_square_sums(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ_k (w_k x_kj)² in float32, the plain formulation.

    :param x: (B, T, C) input of a Linear
    :param weights: (B, T) float32 token weights
    :return: (B, C) float32
    """
    # As a matrix product over the positions, so that no weighted copy of x is made in addition to its squares.
    squares = x.to(WANDA_PRECISION).square()
    return torch.bmm(weights.square().unsqueeze(1), squares).squeeze(1)


def sparsify_weight(W: torch.Tensor, norms: torch.Tensor, sparsity: float, structure: MaskStructure) -> torch.Tensor:
    """Zero the weights with the smallest |W_ij| · a_j: per output row, or per group of M columns.

    :param W: (rows, columns) weight, any floating dtype, left untouched
    :param norms: (columns,) activation norms a_j
    :param sparsity: share of zeros for the unstructured case; floor(columns · sparsity) are removed in each row
    :param structure: mask structure; N:M overrides ``sparsity``
    :return: the pruned weight in W's dtype
    """
    metric = W.to(WANDA_PRECISION).abs() * norms.to(device=W.device, dtype=WANDA_PRECISION)
    if structure.unstructured:
        # The small addend keeps 0.7 · 10 = 7 from flooring to 6 in floating point.
        count = int(W.shape[1] * sparsity + 1e-9)
        mask = lowest_in_rows(metric, count)
    else:
        mask = structure.lowest_in_groups(metric)
    return W.masked_fill(mask, 0.0)

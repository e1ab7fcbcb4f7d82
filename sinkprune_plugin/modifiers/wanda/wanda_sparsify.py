"""Mathematics of sink-aware Wanda: weighted activation norms in one pass, and the pruning mask. Torch only.

Paper: "Sink-Aware Pruning for Diffusion Language Models" (arXiv 2602.17664), section 3; Wanda: arXiv 2306.11695.
"""

from dataclasses import dataclass

import torch

from sinkprune_plugin.modifiers.mask_structure import MaskStructure, lowest_in_rows

__all__ = [
    "NEGLIGIBLE_MASK",
    "InputStatistics",
    "observe_input",
    "sparsify_weight",
    "weighted_square_sums",
]

WANDA_PRECISION = torch.float32

# A soft mask below this changes a squared row weight (1 − m)² by less than half a float32 unit in the last place,
# so such a position is as good as unmasked.
NEGLIGIBLE_MASK = 2.0**-25


@dataclass
class InputStatistics:
    """What is kept of one Linear input until the sink mask is known.

    :param rest: (B, C) float32, sums of squares over the real positions that were not set aside
    :param rows: (B, K, C) rows set aside, in the input's own dtype
    :param positions: (B, K) int64, where those rows stood in the sequence
    :param version: torch's version counter of ``rows`` where they are the input itself, not a copy
    """

    rest: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    version: int | None = None

    def covers(self, mask: torch.Tensor) -> bool:
        """Whether the norms can be had from what was kept.

        :param mask: (B, T) float32 soft sink mask
        :return: False if a position with a noticeable mask was not set aside, or if the model has meanwhile written
            into the input that was kept
        """
        if self.version is not None and self.rows._version != self.version:
            return False
        missing = (mask > NEGLIGIBLE_MASK).scatter(1, self.positions, False)
        return not bool(missing.any())

    def square_sums(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ_k (w_k x_kj)² over all positions.

        Rows are set aside before summing rather than subtracted afterwards: a massive activation would leave nothing
        but rounding error of the small ones in float32.

        :param weights: (B, T) float32 token weights w, 0 on padding; 1 wherever a real row was not set aside
        :return: (B, C) float32
        """
        return self.rest + weighted_square_sums(self.rows, weights.gather(1, self.positions))

    def keep_only(self, mask: torch.Tensor, valid: torch.Tensor | None) -> "InputStatistics":
        """Drop the set-aside rows whose mask is negligible, so that many timesteps can wait side by side.

        :param mask: (B, T) float32 soft sink mask
        :param valid: (B, T) bool, False on padding; None if there is none
        :return: equivalent statistics with at most as many rows as the sample with most sinks has
        """
        kept = mask.gather(1, self.positions) > NEGLIGIBLE_MASK
        released = ~kept if valid is None else ~kept & valid.gather(1, self.positions)
        rest = self.rest + weighted_square_sums(self.rows, released.to(WANDA_PRECISION))
        width = int(kept.sum(dim=1).max())
        # True sorts before False; a sample with fewer sinks keeps zero rows at its surplus places.
        order = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        rows = self.rows.gather(1, order.unsqueeze(-1).expand(-1, -1, self.rows.shape[-1]))
        rows = rows * kept.gather(1, order).unsqueeze(-1)
        return InputStatistics(rest, rows, self.positions.gather(1, order))


def observe_input(
    x: torch.Tensor, running_mass: torch.Tensor, valid: torch.Tensor | None, num_rows: int
) -> InputStatistics:
    """Sum the squares of an input, with the rows of the likely sinks set aside.

    :param x: (B, T, C) input of a Linear, any floating dtype
    :param running_mass: (B, T) float32 attention mass of the layers seen so far: the likeliest sinks lead it
    :param valid: (B, T) bool, False on padding; None if there is none
    :param num_rows: rows to set aside; from T on the input itself is kept and nothing is summed yet
    :return: the statistics, in float32
    """
    batch, tokens, columns = x.shape
    if num_rows >= tokens:
        positions = torch.arange(tokens, device=x.device).expand(batch, tokens)
        return InputStatistics(x.new_zeros(batch, columns, dtype=WANDA_PRECISION), x, positions, x._version)
    positions = running_mass.topk(num_rows, dim=1).indices
    rows = x.gather(1, positions.unsqueeze(-1).expand(-1, -1, columns))
    summed = torch.ones_like(running_mass) if valid is None else valid.to(running_mass.dtype)
    return InputStatistics(weighted_square_sums(x, summed.scatter(1, positions, 0.0)), rows, positions)


def weighted_square_sums(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ_k (w_k x_kj)² in float32, the plain formulation.

    :param x: (B, T, C) input of a Linear
    :param weights: (B, T) float32 token weights
    :return: (B, C) float32
    """
    # As a matrix product over the positions, so that no weighted copy of x is made beside its squares.
    squares = x.to(WANDA_PRECISION).square()
    return torch.bmm(weights.square().unsqueeze(1), squares).squeeze(1)


def sparsify_weight(W: torch.Tensor, norms: torch.Tensor, sparsity: float, structure: MaskStructure) -> torch.Tensor:
    """Zero the weights of least |W_ij| · a_j: per output row, or per group of M columns.

    :param W: (rows, columns) weight, any floating dtype, left untouched
    :param norms: (columns,) activation norms a_j
    :param sparsity: share of zeros for the unstructured case; floor(columns · sparsity) go in each row
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

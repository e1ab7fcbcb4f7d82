"""Which masked positions of each block are unmasked in a step."""

import torch

__all__ = ["select_unmask"]


def select_unmask(
    confidence: torch.Tensor, count: torch.Tensor, threshold: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Choose the positions with the highest confidence.

    Fast-dLLM (arXiv 2505.22618, section 3.3) has two rules in place of a fixed number. Threshold: all positions with a
    higher confidence. Factor f: the largest n for which (n + 1) (1 - c_n) < f, c_n being the n-th highest confidence;
    the left side never falls with n, so each position can be decided by its own rank. Both choose at least one.

    :param confidence: (B, W) float64; -inf where nothing can be unmasked. NaN counts as the highest: otherwise a broken
        model's position would stay masked, and its request would never end
    :param count: (B,) int64, how many to choose where there is neither threshold nor factor
    :param threshold: (B,) float64; infinite for none
    :param factor: (B,) float64; 0 for none
    :return: (B, W) bool; of positions with equal confidence the first are chosen
    """
    eligible = confidence != -torch.inf
    order = confidence.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    sure = confidence.nan_to_num(torch.inf, torch.inf, -torch.inf)
    by_threshold = sure > threshold[:, None]
    by_factor = (rank + 2) * (1.0 - sure) < factor[:, None]
    by_rule = torch.where(factor[:, None] > 0, by_factor, by_threshold) | (rank == 0)
    ruled = torch.isfinite(threshold) | (factor > 0)
    return eligible & torch.where(ruled[:, None], by_rule, rank < count[:, None])

"""Which masked positions of each block are unmasked in a step."""

import torch

__all__ = ["select_unmask"]


def select_unmask(confidence: torch.Tensor, count: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Choose the positions with the highest confidence.

    :param confidence: (B, W) float64; -inf where nothing can be unmasked. NaN counts as the highest: otherwise a broken
        model's position would stay masked, and its request would never end
    :param count: (B,) int64, how many to choose where there is no threshold
    :param threshold: (B,) float64; positions with higher confidence are chosen, at least one (Fast-dLLM, arXiv
        2505.22618, section 3.3); infinite for none
    :return: (B, W) bool; of positions with equal confidence the first are chosen
    """
    eligible = confidence != -torch.inf
    order = confidence.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    by_threshold = (confidence > threshold[:, None]) | (rank == 0)
    by_count = rank < count[:, None]
    return eligible & torch.where(torch.isfinite(threshold)[:, None], by_threshold, by_count)

"""Which positions are attention sinks: threshold, soft mask, and the scope that keeps persistent sinks."""

import math

import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["sink_threshold", "soft_sink_mask", "transient_sink_mask"]


def sink_threshold(mass: torch.Tensor, sink_std: float = 2.0, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Attention mass above which a position is a sink: mean + ``sink_std`` · std over the positions of a sequence.

    Source: "Sink-Aware Pruning for Diffusion Language Models" (arXiv 2602.17664), section 3 (sink detection);
    population standard deviation, as in its published program.

    :param mass: (..., T) attention mass
    :param sink_std: number of standard deviations, at least 0
    :param valid: (..., T) bool, False on padding, which doesn't enter the statistics
    :return: (...) float32
    :raises UsageError: if ``sink_std`` is negative or shapes differ
    """
    if not (math.isfinite(sink_std) and sink_std >= 0):
        raise UsageError(f"sink_std is {sink_std}; it must be a number of standard deviations, at least 0")
    mass = mass.to(torch.float32)
    if valid is None:
        return mass.mean(dim=-1) + sink_std * mass.std(dim=-1, correction=0)
    valid = _checked_valid(valid, mass)
    count = valid.sum(dim=-1).clamp(min=1)
    mean = mass.where(valid, 0.0).sum(dim=-1) / count
    variance = (mass - mean.unsqueeze(-1)).square().where(valid, 0.0).sum(dim=-1) / count
    return mean + sink_std * variance.sqrt()


def soft_sink_mask(
    mass: torch.Tensor, sink_std: float = 2.0, sink_alpha: float = 5.0, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """How much of a sink each position is: sigmoid(``sink_alpha`` · (mass − threshold)).

    Source: as :func:`sink_threshold`. Masses are large (they add up to layers · heads · T), so nearly every value is 0
    or 1. NaN in the mass appears in the mask.

    :param mass: (..., T) attention mass
    :param sink_std: see :func:`sink_threshold`
    :param sink_alpha: steepness, per unit of mass, above 0
    :param valid: (..., T) bool, False on padding: neither in the statistics nor ever a sink
    :return: (..., T) float32 in [0, 1], 0 on padding
    :raises UsageError: if a number is out of range or shapes differ
    """
    if not (math.isfinite(sink_alpha) and sink_alpha > 0):
        raise UsageError(f"sink_alpha is {sink_alpha}; it must be a finite number above 0")
    threshold = sink_threshold(mass, sink_std, valid)
    # Float32 also where the mass is not: near the threshold the difference of two large numbers decides.
    mask = torch.sigmoid(sink_alpha * (mass.to(torch.float32) - threshold.unsqueeze(-1)))
    return mask if valid is None else mask.where(_checked_valid(valid, mass), 0.0)


def transient_sink_mask(masks: torch.Tensor, sink_persistence: float = 0.5) -> torch.Tensor:
    """Keep transient sinks only: a position that is a sink at most timesteps is removed from the mask.

    The abstract of arXiv 2602.17664 calls them *unstable* sinks. Persistence is the mean of a position's soft mask over
    the sampled timesteps; at ``sink_persistence`` or above the position counts as stable.

    :param masks: (S, T) or (B, S, T) soft masks at S timesteps
    :param sink_persistence: in (0, 1]
    :return: same shape, 0 at persistent positions
    :raises UsageError: if the shape or the number is wrong
    """
    if masks.dim() not in (2, 3):
        raise UsageError(f"masks have shape {tuple(masks.shape)}; they must be (timesteps, T) or (batch, timesteps, T)")
    if not 0 < sink_persistence <= 1:
        raise UsageError(f"sink_persistence is {sink_persistence}; it must be in (0, 1]")
    persistent = masks.mean(dim=-2, keepdim=True) >= sink_persistence
    return masks.masked_fill(persistent, 0.0)


def _checked_valid(valid: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    if valid.shape != mass.shape:
        raise UsageError(f"valid has shape {tuple(valid.shape)} and the mass {tuple(mass.shape)}; they must be equal")
    return valid.to(device=mass.device, dtype=torch.bool)

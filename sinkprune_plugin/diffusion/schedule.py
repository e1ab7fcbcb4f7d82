"""The grid of denoising timesteps that calibration visits, and the weight of each."""

import math

from sinkprune_plugin.errors import UsageError

__all__ = ["timestep_grid", "timestep_weight"]

# Exponent e of the weight t**-e that sums of squares get.
_WEIGHT_EXPONENTS = {"uniform": 0, "inverse": 1, "inverse_square": 2}


def timestep_grid(diffusion_steps: int, sample_interval: int) -> tuple[float, ...]:
    """Every k-th step of an S-step denoising grid, as fractions of full corruption.

    Source: "Sink-Aware Pruning for Diffusion Language Models" (arXiv 2602.17664), experimental settings: S = 50, k = 5.

    :param diffusion_steps: S, steps of the whole grid
    :param sample_interval: k, distance between visited steps
    :return: t = s / S for s = k, 2k, … ≤ S, ascending, in (0, 1]
    :raises UsageError: if a number is not positive or the interval exceeds the steps
    """
    if diffusion_steps <= 0:
        raise UsageError(f"diffusion_steps is {diffusion_steps}; it must be at least 1")
    if sample_interval <= 0:
        raise UsageError(f"sample_interval is {sample_interval}; it must be at least 1")
    if sample_interval > diffusion_steps:
        raise UsageError(
            f"sample_interval {sample_interval} exceeds diffusion_steps {diffusion_steps}, so no timestep is left; "
            "lower the interval"
        )
    return tuple(step / diffusion_steps for step in range(sample_interval, diffusion_steps + 1, sample_interval))


def timestep_weight(timestep: float, weighting: str) -> float:
    """Weight of a timestep in sums of squares: 1, 1/t or 1/t².

    :param timestep: t in (0, 1]
    :param weighting: "uniform", "inverse" or "inverse_square"
    :return: the weight, at least 1
    :raises UsageError: if the weighting is unknown or t is outside (0, 1]
    """
    if weighting not in _WEIGHT_EXPONENTS:
        raise UsageError(f"timestep_weighting is {weighting!r}; it must be one of {', '.join(_WEIGHT_EXPONENTS)}")
    if not 0 < timestep <= 1:
        raise UsageError(f"timestep is {timestep}; it must be in (0, 1]")
    return math.pow(timestep, -_WEIGHT_EXPONENTS[weighting])

"""Perplexities of two models on the same text and the same noise, and their difference with a confidence interval."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from sinkprune_plugin.diffusion import DiffusionSpec, RowScores, estimate_likelihood, score_windows

__all__ = ["NoiseLevel", "PairedPerplexity", "compare_perplexity", "paired_difference"]

# Two-sided 95 % of the normal distribution; with 16 windows or more Student's t is within 9 % of it.
QUANTILE = 1.96


@dataclass(frozen=True)
class NoiseLevel:
    """Mean loss at one stratum of the timestep.

    :param p_mask: mean mask probability in it
    :param dense: nats per corrupted token
    :param pruned: the same of the pruned model
    """

    p_mask: float
    dense: float
    pruned: float


@dataclass(frozen=True)
class PairedPerplexity:
    """Both perplexities of both models.

    :param elbo_dense: Monte-Carlo ELBO perplexity
    :param elbo_dense_error: its standard error, over windows and noise
    :param elbo_pruned: of the pruned model
    :param elbo_pruned_error: its standard error
    :param ratio: pruned to dense; text and noise are shared, so it is much better known than either
    :param ratio_low: lower end of its 95 % confidence interval
    :param ratio_high: upper end
    :param masked_dense: masked-token perplexity
    :param masked_pruned: of the pruned model
    :param curve: losses by noise level, least noise first
    :param windows: number of windows
    :param samples: noise samples for each
    """

    elbo_dense: float
    elbo_dense_error: float
    elbo_pruned: float
    elbo_pruned_error: float
    ratio: float
    ratio_low: float
    ratio_high: float
    masked_dense: float
    masked_pruned: float
    curve: tuple[NoiseLevel, ...]
    windows: int
    samples: int

    @property
    def increase(self) -> float:
        """By how much the ELBO perplexity is higher, in percent."""
        return 100 * (self.ratio - 1)


def compare_perplexity(
    dense: Any,
    pruned: Any,
    windows: torch.Tensor,
    spec: DiffusionSpec,
    *,
    num_samples: int = 8,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> PairedPerplexity:
    """Measure two models on the same corruption.

    :param dense: transformers model
    :param pruned: another one with the same vocabulary
    :param windows: (N, T) int64 clean text
    :param spec: family and mask token
    :param num_samples: noise samples for each window, stratified over the timestep
    :param seed: seed of the noise
    :param batch_size: corrupted windows in a forward pass
    :param progress: show progress bars
    :return: perplexities, their ratio with an interval, and losses by noise level
    :raises UsageError: if a model's logits aren't finite
    """
    scores = [
        score_windows(
            model, windows, spec, num_samples=num_samples, seed=seed, batch_size=batch_size, progress=progress
        )
        for model in (dense, pruned)
    ]
    first, second = (estimate_likelihood(each, control_variate=True) for each in scores)
    difference, low, high = paired_difference(*scores)
    return PairedPerplexity(
        elbo_dense=first.elbo.perplexity,
        elbo_dense_error=first.elbo.standard_error,
        elbo_pruned=second.elbo.perplexity,
        elbo_pruned_error=second.elbo.standard_error,
        ratio=math.exp(difference),
        ratio_low=math.exp(low),
        ratio_high=math.exp(high),
        masked_dense=first.masked_token.perplexity,
        masked_pruned=second.masked_token.perplexity,
        curve=_curve(*scores),
        windows=len(windows),
        samples=num_samples,
    )


def paired_difference(dense: RowScores, pruned: RowScores) -> tuple[float, float, float]:
    """Difference of the negative log-likelihoods per token, pruned minus dense.

    Windows are the independent units: each gives one difference of its Monte-Carlo ELBO, in which the text's
    difficulty and most of the noise cancel. The interval is that of a ratio of sums (differences over tokens).

    :param dense: losses of one model
    :param pruned: losses of the other on the same noise
    :return: difference in nats per token, and both ends of its 95 % confidence interval (infinite for one window)
    """
    samples = dense.nll.shape[1]
    losses = ((pruned.nll - dense.nll) / dense.p_mask).sum(dim=1)
    counts = dense.tokens * samples
    total = counts.sum().item()
    difference = losses.sum().item() / total
    number = len(losses)
    if number < 2:
        return difference, -math.inf, math.inf
    residual = losses - difference * counts
    error = math.sqrt(number / (number - 1) * residual.square().sum().item()) / total
    return difference, difference - QUANTILE * error, difference + QUANTILE * error


def _curve(dense: RowScores, pruned: RowScores) -> tuple[NoiseLevel, ...]:
    # Sample k of every window lies in the same stratum of the timestep.
    levels = []
    for stratum in range(dense.nll.shape[1]):
        corrupted = dense.corrupted[:, stratum].sum().item()
        if corrupted:
            levels.append(
                NoiseLevel(
                    dense.p_mask[:, stratum].mean().item(),
                    dense.nll[:, stratum].sum().item() / corrupted,
                    pruned.nll[:, stratum].sum().item() / corrupted,
                )
            )
    return tuple(sorted(levels, key=lambda level: level.p_mask))

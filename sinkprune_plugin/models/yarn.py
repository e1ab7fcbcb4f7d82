"""Rotary frequencies for contexts longer than those of pre-training: YaRN (arXiv 2309.00071)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError, short

__all__ = ["YarnScaling"]


@dataclass(frozen=True)
class YarnScaling:
    """ "NTK-by-parts" interpolation (section 3.2): fast frequencies stay, slow ones are divided by a factor.

    :param factor: s, by how much slow frequencies are divided
    :param original_length: positions in pre-training
    :param beta_fast: a frequency with at least this many turns over the original length stays
    :param beta_slow: one with at most this many is divided by s
    :param attention_factor: factor on cos and sin (section 3.4)
    """

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    attention_factor: float

    @classmethod
    def read(cls, parameters: Mapping[str, Any], longest: int) -> "YarnScaling":
        """Read a configuration's ``rope_parameters``, with transformers' names and defaults.

        :param parameters: the mapping
        :param longest: ``max_position_embeddings``
        :return: the scaling
        :raises UsageError: naming the number that is wrong
        """
        original = parameters.get("original_max_position_embeddings") or longest
        factor = parameters.get("factor")
        numbers: dict[str, Any] = {
            "factor": longest / original if factor is None and type(original) is int and original > 0 else factor,
            "original_max_position_embeddings": original,
            "beta_fast": parameters.get("beta_fast") or 32.0,
            "beta_slow": parameters.get("beta_slow") or 1.0,
        }
        own = parameters.get("attention_factor")
        if own is not None:
            numbers["attention_factor"] = own
        for name, value in numbers.items():
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise UsageError(
                    f"{name}={short(repr(value))} in rope_parameters must be a number above 0; correct config.json"
                )
        scale = float(numbers["factor"])
        if own is None:
            own = _magnitude(scale, parameters.get("mscale"), parameters.get("mscale_all_dim"))
        return cls(scale, int(original), float(numbers["beta_fast"]), float(numbers["beta_slow"]), float(own))

    def frequencies(self, frequency: torch.Tensor, theta: float) -> torch.Tensor:
        """Scale frequencies.

        :param frequency: (head_dim / 2,) float32, theta^(-2i / head_dim)
        :param theta: their base
        :return: (head_dim / 2,) float32
        """
        width = 2 * len(frequency)

        def dimension(turns: float) -> float:
            # Of the frequency that makes this many turns over the original length.
            return width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(dimension(self.beta_fast)), 0)
        high = min(math.ceil(dimension(self.beta_slow)), width - 1)
        span = high - low if high != low else 0.001
        slow = ((torch.arange(len(frequency), device=frequency.device) - low) / span).clamp(0, 1)
        return frequency / self.factor * slow + frequency * (1 - slow)


def _magnitude(scale: float, over: Any, under: Any) -> float:
    # Temperature of the softmax as a factor on cos and sin; some checkpoints name the factors of a quotient.
    if over and under:
        return _one(scale, float(over)) / _one(scale, float(under))
    return _one(scale, 1.0)


def _one(scale: float, slope: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * slope * math.log(scale) + 1.0

"""vLLM's rotary embedding with frequencies scaled as in :mod:`sinkprune_plugin.models.yarn`.

vLLM has YaRN too, but its factor on cos and sin follows from the scale alone, where checkpoints may name it otherwise.
"""

import functools

import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from sinkprune_plugin.models.yarn import YarnScaling

__all__ = ["yarn_rotary"]


class YarnRotary(RotaryEmbedding):
    """Rotary embedding with scaled frequencies.

    :param head_dim: width of a head
    :param positions: rows of the table
    :param theta: base of the frequencies
    :param yarn: their scaling
    :param dtype: of the table
    """

    yarn: YarnScaling

    def __init__(self, head_dim: int, positions: int, theta: float, yarn: YarnScaling, dtype: torch.dtype) -> None:
        # Read by the table's computation, which the base class begins.
        self.__dict__["yarn"] = yarn
        super().__init__(head_dim, head_dim, positions, theta, True, dtype)

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        return self.yarn.frequencies(super()._compute_inv_freq(base), base)

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        return super()._compute_cos_sin_cache() * self.yarn.attention_factor


@functools.lru_cache(maxsize=8)
def yarn_rotary(head_dim: int, positions: int, theta: float, yarn: YarnScaling, dtype: torch.dtype) -> YarnRotary:
    """The rotary embedding of all layers: one table for each set of arguments, which :class:`YarnRotary` explains."""
    return YarnRotary(head_dim, positions, theta, yarn, dtype)

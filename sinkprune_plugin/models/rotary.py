"""Rotary position embedding (RoFormer, arXiv 2104.09864): tables for one forward pass, and their application."""

import torch
from torch import nn

from sinkprune_plugin.models.yarn import YarnScaling

__all__ = ["RotaryTables", "apply_rotary"]


class RotaryTables(nn.Module):
    """cos and sin of position × frequency, frequency i = theta^(-2i / head_dim).

    Computed again in each forward pass: that costs T × head_dim per pass, and a module without parameters and buffers
    has nothing that loading through the meta device or casting the model to bfloat16 could corrupt. It is a module
    rather than a function so that llm-compressor's tracer, which doesn't enter modules that hold no decoder block,
    treats it as one operation.

    :param head_dim: width of one attention head, even
    :param theta: base of the frequencies
    :param full_precision: tables in float32; otherwise in the dtype of the hidden states
    :param yarn: scaling of the frequencies for long contexts, if there is one
    """

    def __init__(self, head_dim: int, theta: float, *, full_precision: bool, yarn: YarnScaling | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.full_precision = full_precision
        self.yarn = yarn

    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables for the positions of one batch.

        :param hidden_states: (B, T, d), gives length, device and dtype
        :param position_ids: (B, T) or (1, T) integer positions; 0 … T - 1 without them
        :return: cos and sin, each (B, 1, T, head_dim), or (1, 1, T, head_dim) where all rows share their positions
        """
        device = hidden_states.device
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=device)[None]
        # Angles reach thousands of radians: bfloat16 would lose whole turns.
        exponent = torch.arange(0, self.head_dim, 2, device=device, dtype=torch.float32) / self.head_dim
        frequency = 1.0 / self.theta**exponent
        if self.yarn is not None:
            frequency = self.yarn.frequencies(frequency, self.theta)
        angle = position_ids.to(device=device, dtype=torch.float32)[:, None, :, None] * frequency
        angle = torch.cat((angle, angle), dim=-1)
        dtype = torch.float32 if self.full_precision else hidden_states.dtype
        if self.yarn is None:
            return angle.cos().to(dtype), angle.sin().to(dtype)
        factor = self.yarn.attention_factor
        return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.head_dim}, theta={self.theta}, full_precision={self.full_precision}"


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys; element i pairs with element i + R / 2 (not with its neighbour).

    :param x: (B, H, T, head_dim)
    :param cos: (B or 1, 1, T, R), in the dtype to rotate in; elements of a head beyond its first R stay as they are
    :param sin: as ``cos``
    :return: (B, H, T, head_dim) in the dtype of ``x``
    """
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
        return torch.cat((apply_rotary(turned, cos, sin), rest), dim=-1)
    y = x.to(cos.dtype)
    first, second = y.chunk(2, dim=-1)
    return (y * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

"""The gated MLP of Llama-like decoder layers."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

__all__ = ["GatedMLP"]


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj x) ⊙ up_proj x).

    :param width: of the hidden states
    :param channels: between the projections
    :param activation: transformers' name of the activation
    :param bias: whether the projections have a bias
    """

    def __init__(self, width: int, channels: int, activation: str, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, channels, bias=bias)
        self.up_proj = nn.Linear(width, channels, bias=bias)
        self.down_proj = nn.Linear(channels, width, bias=bias)
        self.act_fn: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (…, width) to (…, width)."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))

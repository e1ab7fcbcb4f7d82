"""Mixture-of-experts layers of the native models: a router, small gated MLPs, and the sum of those it chooses.

Each expert is a module of three Linears with the names of the checkpoint's tensors, so whatever prunes, quantizes or
observes Linears finds them. The router isn't a Linear: no target such as ``Linear`` ever selects it.

What observers may rely on: in each forward pass a layer calls its router once, which returns its :class:`Routing`;
then it calls each expert that a token chose once, in ascending order, with the rows :meth:`Routing.rows_of` names.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

__all__ = ["GatedMLP", "MoELayer", "Router", "Routing", "SoftmaxRouter"]


class Routing(NamedTuple):
    """Which experts each token chose; N tokens, k experts each.

    :param weights: (N, k), factors of the experts' outputs, in the dtype of the hidden states
    :param experts: (N, k) int64, numbers of the experts, different ones in each row
    """

    weights: torch.Tensor
    experts: torch.Tensor

    def rows_of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of one expert.

        :param expert: its number
        :return: (n,) int64 numbers of its tokens, ascending, and (n,) their weights
        """
        rows, slots = torch.where(self.experts == expert)
        return rows, self.weights[rows, slots]


class Router(nn.Module):
    """Base class of routers: one row of weights per expert, and a rule that makes a choice of their products.

    :param width: of the hidden states
    :param experts: how many there are
    :param chosen: how many each token goes to, at most ``experts``
    """

    def __init__(self, width: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.weight = nn.Parameter(torch.empty(experts, width))

    @property
    def experts(self) -> int:
        """How many experts there are, by the weights."""
        return self.weight.shape[0]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.weight.shape[1]} to {self.chosen} of {self.experts}"


class SoftmaxRouter(Router):
    """The experts of the largest probability; its softmax runs over all experts, and the weights don't sum to one."""

    def forward(self, hidden_states: torch.Tensor) -> Routing:
        """Choose the experts of each token.

        :param hidden_states: (N, d)
        :return: the choice
        """
        logits = nn.functional.linear(hidden_states, self.weight)
        weights, experts = logits.softmax(-1, dtype=torch.float32).topk(self.chosen, dim=-1)
        return Routing(weights.to(hidden_states.dtype), experts)


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj x) ⊙ up_proj x).

    :param width: of the hidden states
    :param channels: between the projections
    :param activation: transformers' name of the activation
    """

    def __init__(self, width: int, channels: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, channels, bias=False)
        self.up_proj = nn.Linear(width, channels, bias=False)
        self.down_proj = nn.Linear(channels, width, bias=False)
        self.act_fn: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (…, width) to (…, width)."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MoELayer(nn.Module):
    """Σ weight · expert(x) over the experts that the router chooses for x.

    :param router: chooses among as many experts as are made
    :param width: of the hidden states
    :param channels: of each expert
    :param activation: transformers' name of the activation
    """

    def __init__(self, router: Router, width: int, channels: int, activation: str) -> None:
        super().__init__()
        self.gate = router
        self.experts = nn.ModuleList(GatedMLP(width, channels, activation) for _ in range(router.experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, T, width) to (B, T, width)."""
        tokens = hidden_states.flatten(0, -2)
        routing: Routing = self.gate(tokens)
        output = torch.zeros_like(tokens)
        for number in routing.experts.unique().tolist():
            rows, weights = routing.rows_of(number)
            output.index_add_(0, rows, (self.experts[number](tokens[rows]) * weights[:, None]).to(output.dtype))
        return output.view_as(hidden_states)

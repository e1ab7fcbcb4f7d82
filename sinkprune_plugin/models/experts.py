"""Mixture-of-experts layers of the native models: a router, small gated MLPs, and the sum of those it chooses.

Each expert is a module of three Linears with the names of the checkpoint's tensors, so whatever prunes, quantizes or
observes Linears finds them. The router isn't a Linear: no target such as ``Linear`` ever selects it.

What observers may rely on: in each forward pass a layer calls its router once, which returns its :class:`Routing`;
then it calls each expert that a token chose once, in ascending order, with the rows :meth:`Routing.rows_of` names.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.models.catalogue import native_model
from sinkprune_plugin.models.diffusion_lm import DiffusionLM
from sinkprune_plugin.models.fused_loading import register_fused_experts
from sinkprune_plugin.models.gated_mlp import GatedMLP

__all__ = ["GroupedSigmoidRouter", "MixtureModel", "MoELayer", "Router", "Routing", "SoftmaxRouter"]


class Routing(NamedTuple):
    """Which experts each token chose; N tokens, k experts each.

    :param weights: (N, k), factors of the experts' outputs, in the dtype that the router's model gives them
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


class GroupedSigmoidRouter(Router):
    """DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2): sigmoid scores, and a bias that only the choice sees.

    Experts stand in groups of neighbours. A group's rank is the sum of its two best biased scores; a token goes to the
    best experts of its best groups, and their scores without the bias are scaled to a sum of ``scaling``.

    :param width: of the hidden states
    :param experts: how many there are, a multiple of ``groups`` with at least two in each
    :param chosen: how many each token goes to
    :param groups: groups of experts
    :param chosen_groups: groups that a token's experts are in
    :param scaling: sum of a token's weights; the factor of its one score where only one expert is chosen
    """

    expert_bias: torch.Tensor

    def __init__(
        self, width: int, experts: int, chosen: int, *, groups: int, chosen_groups: int, scaling: float
    ) -> None:
        super().__init__(width, experts, chosen)
        self.groups = groups
        self.chosen_groups = chosen_groups
        self.scaling = scaling
        self.register_buffer("expert_bias", torch.zeros(experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> Routing:
        """Choose the experts of each token, in float32.

        :param hidden_states: (N, d)
        :return: the choice, its weights in float32
        """
        scores = nn.functional.linear(hidden_states.float(), self.weight.float()).sigmoid()
        biased = (scores + self.expert_bias.float()).unflatten(-1, (self.groups, -1))
        best = biased.topk(2, dim=-1).values.sum(-1).topk(self.chosen_groups, dim=-1).indices
        others = torch.ones_like(biased[..., 0], dtype=torch.bool).scatter(-1, best, False)
        experts = biased.masked_fill(others[..., None], float("-inf")).flatten(-2).topk(self.chosen, dim=-1).indices
        weights = scores.gather(-1, experts)
        if self.chosen > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(weights * self.scaling, experts)


class MixtureModel(DiffusionLM):
    """Base class of models with routers, which transformers doesn't know how to initialise."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, see ``PreTrainedModel.from_pretrained``; experts may be fused (``fused_experts``).

        :raises UsageError: if experts are in a layout that isn't understood, or weights of experts are missing, which
            transformers would replace by random ones with a warning
        """
        native = native_model(cls.config_class)
        if native is not None and native.experts is not None:
            register_fused_experts(native.model_type, native.experts)
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        _refuse_missing_experts(model, pretrained_model_name_or_path, info)
        _forget_fused_code(model.config)
        return (model, info) if wanted else model

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


def _forget_fused_code(config: Any) -> None:
    """Drop the names of official classes for fused experts: a saved checkpoint has a module for each."""
    places = getattr(config, "auto_map", None)
    if isinstance(places, dict):
        own = {key: place for key, place in places.items() if f"{place}".rpartition(".")[2][:5] != "Fused"}
        if own != places:
            config.auto_map = own


def _refuse_missing_experts(model: nn.Module, source: Any, info: dict[str, Any]) -> None:
    layers = [f"{name}." for name, module in model.named_modules() if isinstance(module, MoELayer)]
    missing = sorted(name for name in info["missing_keys"] if name.startswith(tuple(layers)))
    # Whoever lets sizes differ reports them, and the router's say more about another number of experts.
    if not missing or info["mismatched_keys"]:
        return
    others = sorted(info["unexpected_keys"])
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    instead = f", which has {short(others[0])} that config.json doesn't ask for" if others else ""
    raise UsageError(
        f"{short(missing[0])}{more} of the experts that config.json asks for are in no file of {short(source)}"
        f"{instead}; correct config.json, or fetch both again"
    )


class MoELayer(nn.Module):
    """Σ weight · expert(x) over the experts that the router chooses for x, and the shared expert(x) if there is one.

    :param router: chooses among as many experts as are made
    :param width: of the hidden states
    :param channels: of each expert
    :param activation: transformers' name of the activation
    :param shared_channels: of the expert that all tokens go to; 0: there is none
    """

    def __init__(self, router: Router, width: int, channels: int, activation: str, *, shared_channels: int = 0) -> None:
        super().__init__()
        self.gate = router
        self.shared_experts = GatedMLP(width, shared_channels, activation) if shared_channels else None
        self.experts = nn.ModuleList(GatedMLP(width, channels, activation) for _ in range(router.experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, T, width) to (B, T, width)."""
        tokens = hidden_states.flatten(0, -2)
        routing: Routing = self.gate(tokens)
        # Summed in the dtype of the weights, as in the official code of both families.
        output = torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, routing.weights.dtype))
        for number in routing.experts.unique().tolist():
            rows, weights = routing.rows_of(number)
            output.index_add_(0, rows, (self.experts[number](tokens[rows]) * weights[:, None]).to(output.dtype))
        output = output.to(tokens.dtype)
        if self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        return output.view_as(hidden_states)

"""Mixture-of-experts layers on vLLM's own fused kernels."""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.sizes_in_config import BlockSizes

__all__ = ["MoELayer", "check_experts", "expert_names"]

# transformers' names → those of vLLM's fused kernels.
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class MoELayer(nn.Module):
    """Σ weight · expert(x) over the experts of the largest probability; the weights don't sum to one.

    The mathematics is that of :class:`sinkprune_plugin.models.experts.MoELayer` with a ``SoftmaxRouter``.

    :param vllm_config: configuration of the engine
    :param sizes: of this layer, which has experts
    :param prefix: the module's full name
    :raises UsageError: for an activation that the kernels don't have
    """

    def __init__(self, vllm_config: VllmConfig, sizes: BlockSizes, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        if config.hidden_act not in _ACTIVATIONS:
            raise UsageError(
                f"hidden_act={config.hidden_act!r}: vLLM's kernels for experts have {', '.join(_ACTIVATIONS)} only; "
                "evaluate this model with transformers"
            )
        self.count = sizes.experts
        self.gate = GateLinear(config.hidden_size, sizes.experts, prefix=f"{prefix}.gate")
        self.experts = FusedMoEFactory(
            num_experts=sizes.experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=sizes.mlp_channels,
            renormalize=False,
            quant_config=vllm_config.quant_config,
            activation=_ACTIVATIONS[config.hidden_act],
            prefix=f"{prefix}.experts",
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (T, hidden_size) to (T, hidden_size)."""
        logits, _ = self.gate(hidden_states)
        return self.experts(hidden_states=hidden_states, router_logits=logits)


def expert_names(model: nn.Module) -> Iterator[str]:
    """Names that the weights of a model's experts have in a checkpoint.

    :param model: a model with any number of layers of experts
    """
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            for expert in range(module.global_num_experts):
                for linear in ("gate_proj", "up_proj", "down_proj"):
                    yield f"{module.layer_name}.{expert}.{linear}.weight"


def check_experts(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass tensors on, and check that the checkpoint's routers have the numbers of experts of the configuration.

    vLLM on its own skips experts beyond that number.

    :param model: a model with any number of layers of experts
    :param weights: name in the checkpoint → tensor
    :return: the same
    :raises UsageError: naming the router
    """
    routers = {
        f"{name}.gate.weight": module.count for name, module in model.named_modules() if isinstance(module, MoELayer)
    }
    for name, tensor in weights:
        experts = routers.get(name)
        if experts is not None and tensor.shape[0] != experts:
            raise UsageError(
                f"{name} is for {tensor.shape[0]} experts, and config.json says {experts}; correct config.json, or "
                "fetch both again"
            )
        yield name, tensor

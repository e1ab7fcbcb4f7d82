"""Mixture-of-experts layers on vLLM's own fused kernels."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.sizes_in_config import BlockSizes

__all__ = ["GroupedMoELayer", "MoELayer", "check_experts", "expert_names"]

# transformers' names → those of vLLM's fused kernels.
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class _FusedMoELayer(nn.Module):
    """Σ weight · expert(x) over the experts that the gate's logits choose.

    :param vllm_config: configuration of the engine
    :param sizes: of this layer, which has experts
    :param prefix: the module's full name
    :param gate: logits of the experts
    :param routing: what the logits mean, as vLLM's factory takes it
    :raises UsageError: for an activation that the kernels don't have
    """

    def __init__(
        self, vllm_config: VllmConfig, sizes: BlockSizes, prefix: str, *, gate: GateLinear, **routing: Any
    ) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        if config.hidden_act not in _ACTIVATIONS:
            raise UsageError(
                f"hidden_act={config.hidden_act!r}: vLLM's kernels for experts have {', '.join(_ACTIVATIONS)} only; "
                "evaluate this model with transformers"
            )
        self.count = sizes.experts
        self.gate = gate
        # Before the layer that also holds it, so that parameters are named as in the checkpoint.
        self.shared_experts: nn.Module | None = routing.get("shared_experts")
        self.experts = FusedMoEFactory(
            num_experts=sizes.experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=sizes.mlp_channels,
            quant_config=vllm_config.quant_config,
            activation=_ACTIVATIONS[config.hidden_act],
            prefix=f"{prefix}.experts",
            **routing,
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (T, hidden_size) to (T, hidden_size)."""
        logits, _ = self.gate(hidden_states)
        return self.experts(hidden_states=hidden_states, router_logits=logits)


class MoELayer(_FusedMoELayer):
    """Σ weight · expert(x) over the experts of the largest probability; the weights don't sum to one.

    The mathematics is that of :class:`sinkprune_plugin.models.experts.MoELayer` with a ``SoftmaxRouter``; parameters
    are those of the base class.
    """

    def __init__(self, vllm_config: VllmConfig, sizes: BlockSizes, prefix: str) -> None:
        gate = GateLinear(vllm_config.model_config.hf_config.hidden_size, sizes.experts, prefix=f"{prefix}.gate")
        super().__init__(vllm_config, sizes, prefix, gate=gate, renormalize=False)


class GroupedMoELayer(_FusedMoELayer):
    """Sigmoid scores, experts chosen within groups by biased scores, and an expert that all tokens go to.

    The mathematics is that of :class:`sinkprune_plugin.models.experts.MoELayer` with a ``GroupedSigmoidRouter``; this
    is vLLM's own DeepSeek-V3 routing.

    :param vllm_config: configuration of the engine; the model's names ``n_group``, ``topk_group`` and
        ``routed_scaling_factor``
    :param sizes: of this layer, which has experts, as many in each group
    :param prefix: the module's full name
    :param shared: maps (T, hidden_size) to the same, without adding up the ranks' parts; None: there is none
    """

    def __init__(self, vllm_config: VllmConfig, sizes: BlockSizes, prefix: str, shared: nn.Module | None) -> None:
        config = vllm_config.model_config.hf_config
        # In float32 like the native router: scores that differ in the eighth bit choose other experts.
        gate = GateLinear(
            config.hidden_size,
            sizes.experts,
            out_dtype=torch.float32,
            force_fp32_compute=True,
            prefix=f"{prefix}.gate",
        )
        gate.expert_bias = nn.Parameter(torch.empty(sizes.experts, dtype=torch.float32), requires_grad=False)
        super().__init__(
            vllm_config,
            sizes,
            prefix,
            gate=gate,
            shared_experts=shared,
            use_grouped_topk=True,
            num_expert_group=config.n_group,
            topk_group=config.topk_group,
            scoring_func="sigmoid",
            e_score_correction_bias=gate.expert_bias,
            # One score alone would become 1 whatever it was.
            renormalize=config.num_experts_per_tok > 1,
            routed_scaling_factor=config.routed_scaling_factor,
            router_logits_dtype=torch.float32,
        )


def expert_names(model: nn.Module) -> Iterator[str]:
    """Names that the weights of a model's experts and the biases of its routers have in a checkpoint.

    :param model: a model with any number of layers of experts
    """
    for name, module in model.named_modules():
        if isinstance(module, GroupedMoELayer):
            yield f"{name}.gate.expert_bias"
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
        f"{name}.gate.{tensor}": module.count
        for name, module in model.named_modules()
        if isinstance(module, _FusedMoELayer)
        for tensor in ("weight", "expert_bias")
    }
    for name, tensor in weights:
        experts = routers.get(name)
        if experts is not None and tensor.shape[0] != experts:
            raise UsageError(
                f"{name} is for {tensor.shape[0]} experts, and config.json says {experts}; correct config.json, or "
                "fetch both again"
            )
        yield name, tensor

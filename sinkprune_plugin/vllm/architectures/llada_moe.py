"""LLaDA-MoE as vLLM modules; modules have the names of the official tensors, except those that are fused."""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from sinkprune_plugin.models.llada_moe.configuration_llada_moe import LLaDAMoEConfig
from sinkprune_plugin.models.sizes_in_config import BlockSizes
from sinkprune_plugin.vllm.architectures.experts import MoELayer, check_experts, expert_names
from sinkprune_plugin.vllm.architectures.layers import BlockLinears
from sinkprune_plugin.vllm.architectures.llama_layout import (
    DecoderLayer,
    DecoderLM,
    DecoderModel,
    GatedMLP,
    GroupedQueryAttention,
)

__all__ = ["LLaDAMoEModelLM"]


class LLaDAMoEDecoderLayer(DecoderLayer):
    """Attention with queries and keys normalised head by head, and a mixture of experts or a dense MLP.

    :param vllm_config: configuration of the engine
    :param sizes: of this layer; without experts it is dense
    :param prefix: the module's full name
    """

    def __init__(self, vllm_config: VllmConfig, sizes: BlockSizes, prefix: str) -> None:
        config: LLaDAMoEConfig = vllm_config.model_config.hf_config
        make = BlockLinears(vllm_config, sizes)
        attention = GroupedQueryAttention(
            vllm_config,
            make,
            f"{prefix}.self_attn",
            theta=config.rope_theta,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            head_norms=bool(config.qk_layernorm),
        )
        mlp: nn.Module
        if sizes.experts:
            mlp = MoELayer(vllm_config, sizes, f"{prefix}.mlp")
        else:
            mlp = GatedMLP(make, config.hidden_act, f"{prefix}.mlp")
        super().__init__(vllm_config, attention, mlp)


@support_torch_compile
class LLaDAMoEModel(DecoderModel):
    """Embedding, decoder layers and final norm; see the base class."""

    layer_class = LLaDAMoEDecoderLayer


class LLaDAMoEModelLM(DecoderLM):
    """LLaDA-MoE with its vocabulary projection; hidden state i predicts token i itself."""

    decoder_class = LLaDAMoEModel

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            # Of dense layers; the experts' projections are stacked by vLLM's own layer.
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        }
    )

    def checkpoint_names(self) -> set[str]:
        """See :meth:`DenoisingLM.checkpoint_names`; experts are each a module there."""
        return super().checkpoint_names() | set(expert_names(self))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """See :meth:`DenoisingLM.load_weights`.

        :raises UsageError: also for a router of another number of experts than the configuration's
        """
        return super().load_weights(check_experts(self, weights))

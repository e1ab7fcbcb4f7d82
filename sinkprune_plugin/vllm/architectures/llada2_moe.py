"""LLaDA2 as vLLM modules; modules have the names of the official tensors, except those that are fused.

That its context is read block by block is the model state's to say, in each step.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from sinkprune_plugin.models.llada2_moe.configuration_llada2_moe import LLaDA2MoeConfig
from sinkprune_plugin.models.sizes_in_config import BlockSizes
from sinkprune_plugin.vllm.architectures.experts import GroupedMoELayer, check_experts, expert_names
from sinkprune_plugin.vllm.architectures.layers import BlockLinears, RotaryAttention, make_norm
from sinkprune_plugin.vllm.architectures.llama_layout import DecoderLayer, DecoderLM, DecoderModel, GatedMLP

__all__ = ["LLaDA2MoeModelLM"]


class LLaDA2MoeAttention(nn.Module):
    """Attention from one projection, queries and keys normalised head by head, a part of each head rotated.

    :param vllm_config: configuration of the engine
    :param make: makes the layer's Linears
    :param prefix: the module's full name
    """

    def __init__(self, vllm_config: VllmConfig, make: BlockLinears, prefix: str) -> None:
        super().__init__()
        config: LLaDA2MoeConfig = vllm_config.model_config.hf_config
        self.query_key_value = make.qkv(f"{prefix}.query_key_value", bias=config.use_qkv_bias)
        self.attn = RotaryAttention(
            vllm_config,
            self.query_key_value,
            theta=config.rope_theta,
            full_precision=False,
            prefix=f"{prefix}.attn",
            rotated=config.partial_rotary_factor,
        )
        self.dense = make.attention_output(f"{prefix}.dense", bias=config.use_bias)
        self.query_layernorm = make_norm(make.head_dim, config.rms_norm_eps)
        self.key_layernorm = make_norm(make.head_dim, config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (T, hidden_size) to (T, hidden_size).

        :param positions: (T,) int64
        :param hidden_states: (T, hidden_size)
        """
        qkv, _ = self.query_key_value(hidden_states)
        output, _ = self.dense(self.attn.attend(positions, qkv, (self.query_layernorm, self.key_layernorm)))
        return output


class LLaDA2MoeDecoderLayer(DecoderLayer):
    """Attention, and a mixture of experts or a dense MLP.

    :param vllm_config: configuration of the engine
    :param sizes: of this layer; without experts it is dense
    :param prefix: the module's full name
    """

    attention_name = "attention"

    def __init__(self, vllm_config: VllmConfig, sizes: BlockSizes, prefix: str) -> None:
        config: LLaDA2MoeConfig = vllm_config.model_config.hf_config
        make = BlockLinears(vllm_config, sizes)
        attention = LLaDA2MoeAttention(vllm_config, make, f"{prefix}.attention")
        mlp: nn.Module
        if sizes.experts:
            shared = None
            if sizes.shared_channels:
                wide = BlockLinears(vllm_config, replace(sizes, mlp_channels=sizes.shared_channels))
                # vLLM's layer of experts adds the ranks' parts up, after it has added the routed experts' output.
                shared = GatedMLP(wide, config.hidden_act, f"{prefix}.mlp.shared_experts", reduced=False)
            mlp = GroupedMoELayer(vllm_config, sizes, f"{prefix}.mlp", shared)
        else:
            mlp = GatedMLP(make, config.hidden_act, f"{prefix}.mlp")
        super().__init__(vllm_config, attention, mlp)


@support_torch_compile
class LLaDA2MoeModel(DecoderModel):
    """Embedding, decoder layers and final norm; see the base class."""

    layer_class = LLaDA2MoeDecoderLayer
    embedding_name = "word_embeddings"


class LLaDA2MoeModelLM(DecoderLM):
    """LLaDA2 with its vocabulary projection; hidden state i predicts token i itself."""

    decoder_class = LLaDA2MoeModel

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            # Of dense layers and shared experts; the experts' projections are stacked by vLLM's own layer.
            f"{mlp}.{projection}_proj": (f"{mlp}.gate_up_proj", place)
            for mlp in (".mlp", ".shared_experts")
            for place, projection in enumerate(("gate", "up"))
        }
    )
    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012 - see the base class

    def checkpoint_names(self) -> set[str]:
        """See :meth:`DenoisingLM.checkpoint_names`; experts are each a module there."""
        return super().checkpoint_names() | set(expert_names(self))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """See :meth:`DenoisingLM.load_weights`.

        :raises UsageError: also for a router of another number of experts than the configuration's
        """
        return super().load_weights(check_experts(self, weights))

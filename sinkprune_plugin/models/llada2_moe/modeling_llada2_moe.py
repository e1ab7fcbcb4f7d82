"""LLaDA2 (arXiv 2512.15745) as native transformers classes: a mixture of experts that denoises blocks in their context.

Names of modules are names of tensors in the official checkpoints: ``model.word_embeddings``,
``model.layers.N.attention.query_key_value``, ``model.layers.N.mlp.gate`` with ``expert_bias``, ``mlp.experts.M``,
``mlp.shared_experts``. The formulas are those of the published modelling code, as inclusionAI/dInfer carries them
(python/dinfer/model/modeling_llada2_moe.py), in which the caller gives the mask.
"""

import torch
from torch import nn

from sinkprune_plugin.models.bidirectional_attention import attend, split_heads
from sinkprune_plugin.models.block_attention import BlockAttentionMask
from sinkprune_plugin.models.decoder import DecoderLayer, DecoderLM, DecoderModel, Positions
from sinkprune_plugin.models.experts import GroupedSigmoidRouter, MixtureModel, MoELayer
from sinkprune_plugin.models.gated_mlp import GatedMLP
from sinkprune_plugin.models.llada2_moe.configuration_llada2_moe import LLaDA2MoeConfig
from sinkprune_plugin.models.rms_norm import RMSNorm
from sinkprune_plugin.models.rotary import RotaryTables, apply_rotary
from sinkprune_plugin.models.sizes_in_config import BlockSizes

__all__ = ["LLaDA2MoeDecoderLayer", "LLaDA2MoeModel", "LLaDA2MoeModelLM"]


class LLaDA2MoeAttention(nn.Module):
    """Grouped-query attention from one projection, with queries and keys normalised head by head.

    :param config: the model's configuration, checked
    :param sizes: of this layer
    """

    def __init__(self, config: LLaDA2MoeConfig, sizes: BlockSizes) -> None:
        super().__init__()
        assert config.head_dim is not None  # check_supported
        self.head_dim = config.head_dim
        self.attention_dropout = config.attention_dropout
        q_width, kv_width = sizes.attention_heads * self.head_dim, sizes.key_value_heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, q_width + 2 * kv_width, bias=config.use_qkv_bias)
        self.dense = nn.Linear(q_width, config.hidden_size, bias=config.use_bias)
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, position_embeddings: Positions
    ) -> torch.Tensor:
        """Attention of one layer; arguments as in :meth:`DecoderLayer.forward`."""
        cos, sin = position_embeddings
        projected = self.query_key_value(hidden_states)
        # By the tensors, which may have lost heads: what isn't queries is keys and as many values.
        q_width = self.dense.in_features
        q, k, v = projected.tensor_split([q_width, (q_width + projected.shape[-1]) // 2], dim=-1)
        q = apply_rotary(self.query_layernorm(split_heads(q, self.head_dim)), cos, sin)
        k = apply_rotary(self.key_layernorm(split_heads(k, self.head_dim)), cos, sin)
        v = split_heads(v, self.head_dim)
        return self.dense(attend(q, k, v, attention_mask, self.attention_dropout if self.training else 0.0))


class LLaDA2MoeDecoderLayer(DecoderLayer):
    """Attention, and a mixture of experts or a dense MLP.

    :param config: the model's configuration, checked
    :param sizes: of this layer; without experts it is dense
    """

    attention_name = "attention"

    def __init__(self, config: LLaDA2MoeConfig, sizes: BlockSizes) -> None:
        width, channels = config.hidden_size, sizes.mlp_channels
        attention = LLaDA2MoeAttention(config, sizes)
        mlp: nn.Module
        if sizes.experts:
            router = GroupedSigmoidRouter(
                width,
                sizes.experts,
                config.num_experts_per_tok,
                groups=config.n_group,
                chosen_groups=config.topk_group,
                scaling=config.routed_scaling_factor,
            )
            mlp = MoELayer(router, width, channels, config.hidden_act, shared_channels=sizes.shared_channels)
        else:
            mlp = GatedMLP(width, channels, config.hidden_act)
        super().__init__(config, attention, mlp)


class _LLaDA2Moe(MixtureModel):
    """What both classes with a configuration have in common."""

    config_class = LLaDA2MoeConfig
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]  # noqa: RUF012 - transformers reads a list and sets a set per instance
    # A bfloat16 bias would choose other experts.
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012


class LLaDA2MoeModel(_LLaDA2Moe, DecoderModel):
    """Embedding, decoder layers and final norm.

    :param config: the model's configuration
    """

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        config.check_supported()
        rotary = RotaryTables(config.rotary_width, config.rope_theta, full_precision=False)
        mask = BlockAttentionMask(config.block_length, "block_causal")
        super().__init__(config, LLaDA2MoeDecoderLayer, rotary, mask)


class LLaDA2MoeModelLM(_LLaDA2Moe, DecoderLM):
    """LLaDA2 with its vocabulary projection; ``logits[b, i]`` predicts the token at position i.

    :param config: the model's configuration
    :raises UsageError: if the configuration has an option that this class doesn't compute
    """

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config, LLaDA2MoeModel(config))

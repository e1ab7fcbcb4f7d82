"""LLaDA2 (arXiv 2512.15745) as native transformers classes: a mixture of experts that denoises blocks in their context.

Names of modules are names of tensors in the official checkpoints: ``model.word_embeddings``,
``model.layers.N.attention.query_key_value``, ``model.layers.N.mlp.gate`` with ``expert_bias``, ``mlp.experts.M``,
``mlp.shared_experts``. The formulas are those of the published modelling code, as inclusionAI/dInfer carries them
(python/dinfer/model/modeling_llada2_moe.py), in which the caller gives the mask.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sinkprune_plugin.models.bidirectional_attention import attend, split_heads
from sinkprune_plugin.models.block_attention import BlockAttentionMask
from sinkprune_plugin.models.diffusion_lm import DiffusionLM, HiddenStates, check_call, kept_positions, lm_output
from sinkprune_plugin.models.experts import GatedMLP, GroupedSigmoidRouter, MoELayer, Router
from sinkprune_plugin.models.llada2_moe.configuration_llada2_moe import LLaDA2MoeConfig
from sinkprune_plugin.models.rms_norm import RMSNorm
from sinkprune_plugin.models.rotary import RotaryTables, apply_rotary
from sinkprune_plugin.models.sizes_in_config import BlockSizes, sizes_in_config

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
        self.widths = (q_width, kv_width, kv_width)
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.widths), bias=config.use_qkv_bias)
        self.dense = nn.Linear(q_width, config.hidden_size, bias=config.use_bias)
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Attention of one layer; arguments as in :meth:`LLaDA2MoeDecoderLayer.forward`."""
        cos, sin = position_embeddings
        q, k, v = self.query_key_value(hidden_states).split(self.widths, dim=-1)
        q = apply_rotary(self.query_layernorm(split_heads(q, self.head_dim)), cos, sin)
        k = apply_rotary(self.key_layernorm(split_heads(k, self.head_dim)), cos, sin)
        v = split_heads(v, self.head_dim)
        return self.dense(attend(q, k, v, attention_mask, self.attention_dropout if self.training else 0.0))


class LLaDA2MoeDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + MLP(norm(x)), where the MLP is a mixture of experts or a dense one.

    :param config: the model's configuration, checked
    :param sizes: of this layer; without experts it is dense
    """

    def __init__(self, config: LLaDA2MoeConfig, sizes: BlockSizes) -> None:
        super().__init__()
        width, channels = config.hidden_size, sizes.mlp_channels
        self.attention = LLaDA2MoeAttention(config, sizes)
        self.mlp: nn.Module
        if sizes.experts:
            router = GroupedSigmoidRouter(
                width,
                sizes.experts,
                config.num_experts_per_tok,
                groups=config.n_group,
                chosen_groups=config.topk_group,
                scaling=config.routed_scaling_factor,
            )
            self.mlp = MoELayer(router, width, channels, config.hidden_act, shared_channels=config.shared_channels)
        else:
            self.mlp = GatedMLP(width, channels, config.hidden_act)
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """One decoder layer.

        :param hidden_states: (B, T, hidden_size)
        :param attention_mask: as :class:`BlockAttentionMask` gives it
        :param position_embeddings: cos and sin as :class:`RotaryTables` gives them
        :return: (B, T, hidden_size)
        """
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.attention(normed, attention_mask, position_embeddings)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class _LLaDA2Moe(DiffusionLM):
    """What both classes with a configuration have in common."""

    config_class = LLaDA2MoeConfig
    _no_split_modules = ["LLaDA2MoeDecoderLayer"]  # noqa: RUF012 - transformers reads a list and sets a set per instance
    # A bfloat16 bias would choose other experts.
    _keep_in_fp32_modules_strict = ["expert_bias"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class LLaDA2MoeModel(_LLaDA2Moe):
    """Embedding, decoder layers and final norm.

    :param config: the model's configuration
    """

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        config.check_supported()
        self.word_embeddings: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDA2MoeDecoderLayer(config, sizes) for sizes in sizes_in_config(config))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTables(config.rotary_width, config.rope_theta, full_precision=False)
        self.attention_mask = BlockAttentionMask(config.block_length, "block_causal")
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        states: HiddenStates | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm.

        :param input_ids: (B, T) token ids, or
        :param attention_mask: see :class:`BlockAttentionMask`
        :param position_ids: (B, T) positions; 0 … T - 1 without them
        :param inputs_embeds: (B, T, hidden_size)
        :param states: collects the hidden states on the way
        :return: (B, T, hidden_size)
        """
        states = states or HiddenStates(False, False)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        hidden_states = inputs_embeds
        tables = self.rotary(hidden_states, position_ids)
        mask = self.attention_mask(attention_mask, hidden_states)
        for layer in self.layers:
            states.add(hidden_states)
            hidden_states = layer(hidden_states, attention_mask=mask, position_embeddings=tables)
        hidden_states = self.norm(hidden_states)
        states.add(hidden_states)
        return hidden_states

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.word_embeddings = value


class LLaDA2MoeModelLM(_LLaDA2Moe):
    """LLaDA-MoE with its vocabulary projection; ``logits[b, i]`` predicts the token at position i.

    :param config: the model's configuration
    :raises UsageError: if the configuration has an option that this class doesn't compute
    """

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> Any:
        """Logits for every position.

        :param input_ids: (B, T) token ids, or ``inputs_embeds``
        :param attention_mask: (B, T) with 0 for padding, or four-dimensional, see :class:`BlockAttentionMask`
        :param position_ids: (B, T) positions; 0 … T - 1 without them
        :param past_key_values: must be None
        :param inputs_embeds: (B, T, hidden_size)
        :param use_cache: must not be True
        :param output_attentions: refused; see ``sinkprune_plugin.sinks`` for where attention goes
        :param output_hidden_states: also return the hidden states
        :param return_dict: False for a tuple
        :param output_router_logits: refused; a hook on a router sees what it chose
        :param logits_to_keep: logits of the last so many positions only, or of these (n,) positions; 0 for all
        :return: ``CausalLMOutputWithPast`` with ``logits`` (B, T or n, vocab_size)
        :raises UsageError: for an argument that a diffusion LM can't honour
        """
        check_call(
            self,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
        )
        states = HiddenStates(output_hidden_states, self.config.output_hidden_states)
        hidden_states = self.model(input_ids, attention_mask, position_ids, inputs_embeds, states)
        return lm_output(self, self.lm_head(kept_positions(hidden_states, logits_to_keep)), states.states, return_dict)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table."""
        return self.model.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.model.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the vocabulary projection."""
        self.lm_head = value

"""LLaDA-MoE (arXiv 2509.24389) as native transformers classes: OLMoE's network with attention in both directions.

Names of modules are names of tensors in the official checkpoints: ``model.layers.N.mlp.gate`` is the router and
``model.layers.N.mlp.experts.M`` the experts. Against OLMoE, queries and keys are normalised head by head. The formulas
are those of the published modelling code, as inclusionAI/dInfer carries them (tools/modeling_fused_lladamoe.py).
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sinkprune_plugin.models.bidirectional_attention import AttentionMask, attend, split_heads
from sinkprune_plugin.models.diffusion_lm import DiffusionLM, HiddenStates, check_call, kept_positions, lm_output
from sinkprune_plugin.models.experts import GatedMLP, MoELayer, Router, SoftmaxRouter
from sinkprune_plugin.models.llada_moe.configuration_llada_moe import LLaDAMoEConfig
from sinkprune_plugin.models.rms_norm import RMSNorm
from sinkprune_plugin.models.rotary import RotaryTables, apply_rotary
from sinkprune_plugin.models.sizes_in_config import BlockSizes, sizes_in_config

__all__ = ["LLaDAMoEDecoderLayer", "LLaDAMoEModel", "LLaDAMoEModelLM"]


class LLaDAMoEAttention(nn.Module):
    """Attention in both directions, with queries and keys normalised head by head.

    :param config: the model's configuration, checked
    :param sizes: of this layer
    """

    def __init__(self, config: LLaDAMoEConfig, sizes: BlockSizes) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention_dropout = config.attention_dropout
        width, bias = config.hidden_size, config.attention_bias
        q_width, kv_width = sizes.attention_heads * self.head_dim, sizes.key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, q_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, width, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_layernorm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_layernorm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Attention of one layer; arguments as in :meth:`LLaDAMoEDecoderLayer.forward`."""
        cos, sin = position_embeddings
        q = apply_rotary(self.q_norm(split_heads(self.q_proj(hidden_states), self.head_dim)), cos, sin)
        k = apply_rotary(self.k_norm(split_heads(self.k_proj(hidden_states), self.head_dim)), cos, sin)
        v = split_heads(self.v_proj(hidden_states), self.head_dim)
        return self.o_proj(attend(q, k, v, attention_mask, self.attention_dropout if self.training else 0.0))


class LLaDAMoEDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + MLP(norm(x)), where the MLP is a mixture of experts or a dense one.

    :param config: the model's configuration, checked
    :param sizes: of this layer; without experts it is dense
    """

    def __init__(self, config: LLaDAMoEConfig, sizes: BlockSizes) -> None:
        super().__init__()
        width, channels = config.hidden_size, sizes.mlp_channels
        self.self_attn = LLaDAMoEAttention(config, sizes)
        self.mlp: nn.Module
        if sizes.experts:
            router = SoftmaxRouter(width, sizes.experts, config.num_experts_per_tok)
            self.mlp = MoELayer(router, width, channels, config.hidden_act)
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
        :param attention_mask: as :class:`AttentionMask` gives it
        :param position_embeddings: cos and sin as :class:`RotaryTables` gives them
        :return: (B, T, hidden_size)
        """
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, attention_mask, position_embeddings)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class _LLaDAMoE(DiffusionLM):
    """What both classes with a configuration have in common."""

    config_class = LLaDAMoEConfig
    _no_split_modules = ["LLaDAMoEDecoderLayer"]  # noqa: RUF012 - transformers reads a list and sets a set per instance

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class LLaDAMoEModel(_LLaDAMoE):
    """Embedding, decoder layers and final norm.

    :param config: the model's configuration
    """

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        config.check_supported()
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LLaDAMoEDecoderLayer(config, sizes) for sizes in sizes_in_config(config))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # The official code rotates in the model's dtype, unlike dense LLaDA's.
        self.rotary = RotaryTables(config.head_dim, config.rope_theta, full_precision=False)
        self.attention_mask = AttentionMask()
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
        :param attention_mask: see :class:`AttentionMask`
        :param position_ids: (B, T) positions; 0 … T - 1 without them
        :param inputs_embeds: (B, T, hidden_size)
        :param states: collects the hidden states on the way
        :return: (B, T, hidden_size)
        """
        states = states or HiddenStates(False, False)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
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
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.embed_tokens = value


class LLaDAMoEModelLM(_LLaDAMoE):
    """LLaDA-MoE with its vocabulary projection; ``logits[b, i]`` predicts the token at position i.

    :param config: the model's configuration
    :raises UsageError: if the configuration has an option that this class doesn't compute
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config)
        self.model = LLaDAMoEModel(config)
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
        :param attention_mask: (B, T) with 0 for padding, or four-dimensional, see :class:`AttentionMask`
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
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the vocabulary projection."""
        self.lm_head = value

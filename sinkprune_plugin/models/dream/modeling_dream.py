"""Dream 7B (arXiv 2508.15487) as native transformers classes: Qwen2 with attention in both directions.

Names of modules are names of tensors in the official checkpoints. ``logits[b, i]`` predicts the token at position
i + 1, as in the autoregressive model that Dream was adapted from.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from sinkprune_plugin.models.bidirectional_attention import AttentionMask, attend, split_heads
from sinkprune_plugin.models.diffusion_lm import DiffusionLM, HiddenStates, check_call, kept_positions, lm_output
from sinkprune_plugin.models.dream.configuration_dream import DreamConfig
from sinkprune_plugin.models.rms_norm import RMSNorm
from sinkprune_plugin.models.rotary import RotaryTables, apply_rotary
from sinkprune_plugin.models.sizes_in_config import BlockSizes, sizes_in_config

__all__ = ["DreamBaseModel", "DreamDecoderLayer", "DreamModel"]


class DreamAttention(nn.Module):
    """Grouped-query attention in both directions; q, k and v have a bias, the output projection has none.

    :param config: the model's configuration, checked
    :param sizes: of this layer
    """

    def __init__(self, config: DreamConfig, sizes: BlockSizes) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention_dropout = config.attention_dropout
        width = config.hidden_size
        q_width, kv_width = sizes.attention_heads * self.head_dim, sizes.key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, q_width, bias=True)
        self.k_proj = nn.Linear(width, kv_width, bias=True)
        self.v_proj = nn.Linear(width, kv_width, bias=True)
        self.o_proj = nn.Linear(q_width, width, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Attention of one layer; arguments as in :meth:`DreamDecoderLayer.forward`."""
        cos, sin = position_embeddings
        q = apply_rotary(split_heads(self.q_proj(hidden_states), self.head_dim), cos, sin)
        k = apply_rotary(split_heads(self.k_proj(hidden_states), self.head_dim), cos, sin)
        v = split_heads(self.v_proj(hidden_states), self.head_dim)
        return self.o_proj(attend(q, k, v, attention_mask, self.attention_dropout if self.training else 0.0))


class DreamMLP(nn.Module):
    """down_proj(act(gate_proj x) ⊙ up_proj x).

    :param config: the model's configuration
    :param sizes: of this layer
    """

    def __init__(self, config: DreamConfig, sizes: BlockSizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, sizes.mlp_channels, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, sizes.mlp_channels, bias=False)
        self.down_proj = nn.Linear(sizes.mlp_channels, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, T, hidden_size) to (B, T, hidden_size)."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DreamDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    :param config: the model's configuration, checked
    :param sizes: of this layer
    """

    def __init__(self, config: DreamConfig, sizes: BlockSizes) -> None:
        super().__init__()
        self.self_attn = DreamAttention(config, sizes)
        self.mlp = DreamMLP(config, sizes)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

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


class DreamBaseModel(DiffusionLM):
    """Embedding, decoder layers and final norm.

    :param config: the model's configuration
    """

    config_class = DreamConfig
    _no_split_modules = ["DreamDecoderLayer"]  # noqa: RUF012 - transformers reads a list and sets a set per instance

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        config.check_supported()
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamDecoderLayer(config, sizes) for sizes in sizes_in_config(config))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # The official code rotates in the model's dtype, unlike LLaDA's.
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


class DreamModel(DiffusionLM):
    """Dream with its vocabulary projection; ``logits[b, i]`` predicts the token at position i + 1.

    :param config: the model's configuration
    :raises UsageError: if the configuration has an option that this class doesn't compute
    """

    config_class = DreamConfig
    _no_split_modules = ["DreamDecoderLayer"]  # noqa: RUF012 - see DreamBaseModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.model = DreamBaseModel(config)
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
        logits_to_keep: int | torch.Tensor = 0,
    ) -> Any:
        """Logits for every position.

        :param input_ids: (B, T) token ids, or ``inputs_embeds``
        :param attention_mask: (B, T) with 0 for padding, or four-dimensional, or "full", see :class:`AttentionMask`
        :param position_ids: (B, T) positions; 0 … T - 1 without them
        :param past_key_values: must be None
        :param inputs_embeds: (B, T, hidden_size)
        :param use_cache: must not be True
        :param output_attentions: refused; see ``sinkprune_plugin.sinks`` for where attention goes
        :param output_hidden_states: also return the hidden states
        :param return_dict: False for a tuple
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

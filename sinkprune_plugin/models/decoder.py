"""What the families with Llama's layout have in common: embedding, pre-norm decoder layers, final norm, projection.

LLaDA's own layout differs (``models/llada``).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sinkprune_plugin.models.bidirectional_attention import attend, split_heads
from sinkprune_plugin.models.diffusion_lm import DiffusionLM, HiddenStates, check_call, kept_positions, lm_output
from sinkprune_plugin.models.rms_norm import RMSNorm
from sinkprune_plugin.models.rotary import RotaryTables, apply_rotary
from sinkprune_plugin.models.sizes_in_config import BlockSizes, sizes_in_config

__all__ = ["DecoderLM", "DecoderLayer", "DecoderModel", "GroupedQueryAttention", "Positions"]

# cos and sin as RotaryTables gives them, (B or 1, 1, T, head_dim); where queries are scaled also their scale,
# (B or 1, 1, T, 1).
Positions = tuple[torch.Tensor, ...]


class GroupedQueryAttention(nn.Module):
    """Attention from projections of their own.

    :param config: the model's configuration, checked
    :param sizes: of this layer
    :param bias: whether q, k and v have a bias
    :param output_bias: whether the output projection has one
    :param head_norms: normalise queries and keys head by head, before rotation
    """

    def __init__(
        self, config: Any, sizes: BlockSizes, *, bias: bool, output_bias: bool, head_norms: bool = False
    ) -> None:
        super().__init__()
        self.head_dim: int = config.head_dim
        self.attention_dropout: float = config.attention_dropout
        width = config.hidden_size
        q_width, kv_width = sizes.attention_heads * self.head_dim, sizes.key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, q_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, width, bias=output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if head_norms else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if head_norms else None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, position_embeddings: Positions
    ) -> torch.Tensor:
        """Attention of one layer; arguments as in :meth:`DecoderLayer.forward`."""
        cos, sin, *scale = position_embeddings
        q = split_heads(self.q_proj(hidden_states), self.head_dim)
        k = split_heads(self.k_proj(hidden_states), self.head_dim)
        v = split_heads(self.v_proj(hidden_states), self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if scale:
            q = q * scale[0]
        return self.o_proj(attend(q, k, v, attention_mask, self.attention_dropout if self.training else 0.0))


class DecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    :param config: the model's configuration, checked
    :param attention: called with hidden states, mask and positions
    :param mlp: maps (B, T, hidden_size) to the same
    """

    attention_name: ClassVar[str] = "self_attn"
    """Name of the attention module, as in the family's tensors."""

    def __init__(self, config: Any, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.add_module(self.attention_name, attention)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, position_embeddings: Positions
    ) -> torch.Tensor:
        """One decoder layer.

        :param hidden_states: (B, T, hidden_size)
        :param attention_mask: as the model's mask module gives it
        :param position_embeddings: see :data:`Positions`
        :return: (B, T, hidden_size)
        """
        normed = self.input_layernorm(hidden_states)
        attention = getattr(self, self.attention_name)
        hidden_states = hidden_states + attention(normed, attention_mask, position_embeddings)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DecoderModel(DiffusionLM):
    """Embedding, decoder layers and final norm; the embedding's name is ``_input_embed_layer``, as in transformers.

    :param config: the model's configuration, checked
    :param layer: makes a decoder layer of the configuration and of the layer's sizes
    :param rotary: gives cos and sin
    :param attention_mask: gives the layers' mask from the call's
    """

    def __init__(
        self,
        config: Any,
        layer: Callable[[Any, BlockSizes], nn.Module],
        rotary: RotaryTables,
        attention_mask: nn.Module,
    ) -> None:
        super().__init__(config)
        self.add_module(self._input_embed_layer, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(layer(config, sizes) for sizes in sizes_in_config(config))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = rotary
        self.attention_mask = attention_mask
        self.post_init()

    def position_embeddings(self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None) -> Positions:
        """What the layers need to know of positions.

        :param hidden_states: (B, T, hidden_size)
        :param position_ids: (B, T) or (1, T); 0 … T - 1 without them
        :return: see :data:`Positions`
        """
        tables: Positions = self.rotary(hidden_states, position_ids)
        return tables

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
        :param attention_mask: see the family's mask module
        :param position_ids: (B, T) or (1, T) positions; 0 … T - 1 without them
        :param inputs_embeds: (B, T, hidden_size)
        :param states: collects the hidden states on the way
        :return: (B, T, hidden_size)
        """
        states = states or HiddenStates(False, False)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        hidden_states = inputs_embeds
        positions = self.position_embeddings(hidden_states, position_ids)
        mask = self.attention_mask(attention_mask, hidden_states)
        for layer in self.layers:
            states.add(hidden_states)
            hidden_states = layer(hidden_states, attention_mask=mask, position_embeddings=positions)
        hidden_states = self.norm(hidden_states)
        states.add(hidden_states)
        return hidden_states


class DecoderLM(DiffusionLM):
    """A :class:`DecoderModel`, under its ``base_model_prefix``, with its vocabulary projection.

    :param config: the model's configuration
    :param model: what gives the hidden states
    """

    head_name: ClassVar[str] = "lm_head"
    """Name of the vocabulary projection, as in the family's tensors."""

    def __init__(self, config: Any, model: DecoderModel) -> None:
        super().__init__(config)
        self.add_module(self.base_model_prefix, model)
        self.add_module(self.head_name, nn.Linear(config.hidden_size, config.vocab_size, bias=False))
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
        :param attention_mask: (B, T) with 0 for padding, or four-dimensional, see the family's mask module
        :param position_ids: (B, T) or (1, T) positions of the tokens; 0 … T - 1 without them
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
        hidden_states = self.base_model(input_ids, attention_mask, position_ids, inputs_embeds, states)
        logits = self.get_output_embeddings()(kept_positions(hidden_states, logits_to_keep))
        return lm_output(self, logits, states.states, return_dict)

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        head: nn.Module = getattr(self, self.head_name)
        return head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the vocabulary projection."""
        setattr(self, self.head_name, value)

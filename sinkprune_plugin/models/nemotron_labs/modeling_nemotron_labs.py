"""Nemotron-Labs-Diffusion as native transformers classes: Ministral 3 that denoises blocks after a causal context.

Names of modules are names of tensors in the official checkpoints: ``encoder.layers.N.self_attn.q_proj``, …,
``diffusion_head``. Facts are from the official code as published with the checkpoints (Hugging Face,
nvidia/Nemotron-Labs-Diffusion-8B) and from NVIDIA-NeMo/Megatron-Bridge, ``nemotron_labs_diffusion``.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from sinkprune_plugin.models.bidirectional_attention import attend, split_heads
from sinkprune_plugin.models.block_attention import BlockAttentionMask
from sinkprune_plugin.models.diffusion_lm import DiffusionLM, HiddenStates, check_call, kept_positions, lm_output
from sinkprune_plugin.models.nemotron_labs.configuration_nemotron_labs import NemotronLabsDiffusionConfig
from sinkprune_plugin.models.rms_norm import RMSNorm
from sinkprune_plugin.models.rotary import RotaryTables, apply_rotary
from sinkprune_plugin.models.sizes_in_config import BlockSizes, sizes_in_config

__all__ = ["NemotronLabsDecoderLayer", "NemotronLabsDiffusionModel", "NemotronLabsEncoder"]

# cos, sin, and the scale of the queries or None.
Positions = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class NemotronLabsAttention(nn.Module):
    """Grouped-query attention; queries far beyond the pre-training length are scaled up.

    :param config: the model's configuration, checked
    :param sizes: of this layer
    """

    def __init__(self, config: NemotronLabsDiffusionConfig, sizes: BlockSizes) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention_dropout = config.attention_dropout
        width, bias = config.hidden_size, config.attention_bias
        q_width, kv_width = sizes.attention_heads * self.head_dim, sizes.key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, q_width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.o_proj = nn.Linear(q_width, width, bias=bias)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, position_embeddings: Positions
    ) -> torch.Tensor:
        """Attention of one layer; arguments as in :meth:`NemotronLabsDecoderLayer.forward`."""
        cos, sin, scale = position_embeddings
        q = apply_rotary(split_heads(self.q_proj(hidden_states), self.head_dim), cos, sin)
        k = apply_rotary(split_heads(self.k_proj(hidden_states), self.head_dim), cos, sin)
        v = split_heads(self.v_proj(hidden_states), self.head_dim)
        if scale is not None:
            q = q * scale
        return self.o_proj(attend(q, k, v, attention_mask, self.attention_dropout if self.training else 0.0))


class NemotronLabsMLP(nn.Module):
    """down_proj(act(gate_proj x) ⊙ up_proj x).

    :param config: the model's configuration
    :param sizes: of this layer
    """

    def __init__(self, config: NemotronLabsDiffusionConfig, sizes: BlockSizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, sizes.mlp_channels, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, sizes.mlp_channels, bias=config.mlp_bias)
        self.down_proj = nn.Linear(sizes.mlp_channels, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, T, hidden_size) to (B, T, hidden_size)."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class NemotronLabsDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    :param config: the model's configuration, checked
    :param sizes: of this layer
    """

    def __init__(self, config: NemotronLabsDiffusionConfig, sizes: BlockSizes) -> None:
        super().__init__()
        self.self_attn = NemotronLabsAttention(config, sizes)
        self.mlp = NemotronLabsMLP(config, sizes)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, position_embeddings: Positions
    ) -> torch.Tensor:
        """One decoder layer.

        :param hidden_states: (B, T, hidden_size)
        :param attention_mask: as :class:`BlockAttentionMask` gives it
        :param position_embeddings: cos and sin as :class:`RotaryTables` gives them, and the queries' scale, (B or 1, 1,
            T, 1) or None
        :return: (B, T, hidden_size)
        """
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, attention_mask, position_embeddings)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class QueryScale(nn.Module):
    """Scale of the queries by position, 1 + beta · ln(1 + ⌊p / step⌋): 1 within the pre-training length.

    A module without parameters, like :class:`RotaryTables` and for the same reason.

    :param scaling: beta and step; None for no scale
    """

    def __init__(self, scaling: tuple[float, int] | None) -> None:
        super().__init__()
        self.scaling = scaling

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor | None:
        """Scale for the positions of one batch.

        :param hidden_states: (B, T, d), gives length, device and dtype
        :param position_ids: (B, T) or (1, T); None for 0 … T - 1
        :return: (B or 1, 1, T, 1) in the dtype of the hidden states, or None
        """
        if self.scaling is None:
            return None
        beta, step = self.scaling
        if position_ids is None:
            position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        steps = torch.floor(position_ids.to(hidden_states.device).float() / step)
        return (1 + beta * torch.log(1 + steps))[:, None, :, None].to(hidden_states.dtype)


class NemotronLabsEncoder(DiffusionLM):
    """Embedding, decoder layers and final norm.

    :param config: the model's configuration
    """

    config_class = NemotronLabsDiffusionConfig
    base_model_prefix = "encoder"
    _no_split_modules = ["NemotronLabsDecoderLayer"]  # noqa: RUF012 - transformers reads a list and sets a set per instance

    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__(config)
        config.check_supported()
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NemotronLabsDecoderLayer(config, sizes) for sizes in sizes_in_config(config))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # The official code rotates in the model's dtype.
        self.rotary = RotaryTables(config.head_dim, config.rotary_theta, full_precision=False, yarn=config.yarn)
        self.query_scale = QueryScale(config.query_scaling)
        self.attention_mask = BlockAttentionMask(config.block_size, "causal")
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
        :param position_ids: (B, T) or (1, T) positions; 0 … T - 1 without them
        :param inputs_embeds: (B, T, hidden_size)
        :param states: collects the hidden states on the way
        :return: (B, T, hidden_size)
        """
        states = states or HiddenStates(False, False)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        hidden_states = inputs_embeds
        cos, sin = self.rotary(hidden_states, position_ids)
        tables = (cos, sin, self.query_scale(hidden_states, position_ids))
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


class NemotronLabsDiffusionModel(DiffusionLM):
    """Nemotron-Labs-Diffusion with its vocabulary projection; ``logits[b, i]`` predicts the token at position i itself.

    The last ``config.block_size`` tokens of the input are the open block, denoised in both directions; those before it
    are a causal context. Another arrangement takes a four-dimensional ``attention_mask``.

    :param config: the model's configuration
    :raises UsageError: if the configuration has an option that this class doesn't compute
    """

    config_class = NemotronLabsDiffusionConfig
    base_model_prefix = "encoder"
    _no_split_modules = ["NemotronLabsDecoderLayer"]  # noqa: RUF012 - see NemotronLabsEncoder
    _tied_weights_keys = {"diffusion_head.weight": "encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__(config)
        self.encoder = NemotronLabsEncoder(config)
        self.diffusion_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        :param attention_mask: (B, T) with 0 for padding, or four-dimensional, see :class:`BlockAttentionMask`
        :param position_ids: (B, T) or (1, T) positions of the tokens; 0 … T - 1 without them
        :param past_key_values: must be None
        :param inputs_embeds: (B, T, hidden_size)
        :param use_cache: must not be True
        :param output_attentions: refused; see ``sinkprune_plugin.sinks`` for where attention goes
        :param output_hidden_states: also return the hidden states
        :param return_dict: False for a tuple
        :param logits_to_keep: logits of the last so many positions only, or of these (n,) positions; 0 for all
        :return: ``CausalLMOutputWithPast`` with ``logits`` (B, T or n, V)
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
        hidden_states = self.encoder(input_ids, attention_mask, position_ids, inputs_embeds, states)
        logits = self.diffusion_head(kept_positions(hidden_states, logits_to_keep))
        return lm_output(self, logits, states.states, return_dict)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.encoder.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self.diffusion_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the vocabulary projection."""
        self.diffusion_head = value

"""LLaDA (arXiv 2502.09992) as native transformers classes: a Llama-like network that attends in both directions.

Names of modules are names of tensors in the official checkpoints: ``model.transformer.wte``,
``model.transformer.blocks.N.q_proj``, … The vocabulary projection ``model.transformer.ff_out`` is next to the blocks.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from sinkprune_plugin.models.bidirectional_attention import AttentionMask, attend, split_heads
from sinkprune_plugin.models.diffusion_lm import DiffusionLM, HiddenStates, check_call, kept_positions, lm_output
from sinkprune_plugin.models.llada.configuration_llada import LLaDAConfig, MMaDAConfig
from sinkprune_plugin.models.rms_norm import RMSNorm
from sinkprune_plugin.models.rotary import RotaryTables, apply_rotary
from sinkprune_plugin.models.sizes_in_config import BlockSizes, sizes_in_config

__all__ = ["LLaDALlamaBlock", "LLaDAModel", "LLaDAModelLM", "MMaDAModelLM"]


def _norm(config: LLaDAConfig) -> RMSNorm:
    bias = config.include_bias if config.bias_for_layer_norm is None else config.bias_for_layer_norm
    return RMSNorm(config.d_model, config.rms_norm_eps, affine=config.layer_norm_with_affine, bias=bias)


class LLaDALlamaBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + MLP(norm(x)) with MLP(x) = ff_out(act(ff_proj x) ⊙ up_proj x).

    :param config: the model's configuration, checked
    :param sizes: of this block
    """

    def __init__(self, config: LLaDAConfig, sizes: BlockSizes) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention_dropout = config.attention_dropout
        width, channels = config.d_model, sizes.mlp_channels
        q_width, kv_width = sizes.attention_heads * self.head_dim, sizes.key_value_heads * self.head_dim
        bias, qkv_bias = bool(config.include_bias), bool(config.include_bias or config.include_qkv_bias)
        self.attn_norm = _norm(config)
        self.q_proj = nn.Linear(width, q_width, bias=qkv_bias)
        self.k_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.v_proj = nn.Linear(width, kv_width, bias=qkv_bias)
        self.attn_out = nn.Linear(q_width, width, bias=bias)
        self.ff_norm = _norm(config)
        self.ff_proj = nn.Linear(width, channels, bias=bias)
        self.up_proj = nn.Linear(width, channels, bias=bias)
        self.ff_out = nn.Linear(channels, width, bias=bias)
        self.act = ACT2FN[config.activation_type]
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """One decoder block.

        :param hidden_states: (B, T, d_model)
        :param attention_mask: as :class:`AttentionMask` gives it
        :param position_embeddings: cos and sin as :class:`RotaryTables` gives them
        :return: (B, T, d_model)
        """
        cos, sin = position_embeddings
        x = self.attn_norm(hidden_states)
        q = apply_rotary(split_heads(self.q_proj(x), self.head_dim), cos, sin)
        k = apply_rotary(split_heads(self.k_proj(x), self.head_dim), cos, sin)
        v = split_heads(self.v_proj(x), self.head_dim)
        heads = attend(q, k, v, attention_mask, self.attention_dropout if self.training else 0.0)
        hidden_states = hidden_states + self.dropout(self.attn_out(heads))
        x = self.ff_norm(hidden_states)
        return hidden_states + self.dropout(self.ff_out(self.act(self.ff_proj(x)) * self.up_proj(x)))


class LLaDATransformer(nn.Module):
    """Embedding, decoder blocks and final norm; holds the vocabulary projection without applying it.

    :param config: the model's configuration
    """

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        rows = config.embedding_rows
        self.wte: nn.Module = nn.Embedding(rows, config.d_model)
        self.emb_drop = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(LLaDALlamaBlock(config, sizes) for sizes in sizes_in_config(config))
        self.ln_f = _norm(config)
        # The official code has no bias here if the weight is the embedding's.
        bias = bool(config.include_bias and not config.weight_tying)
        self.ff_out: nn.Module = nn.Linear(config.d_model, rows, bias=bias)
        self.rotary = RotaryTables(config.head_dim, config.rope_theta, full_precision=config.rope_full_precision)
        self.attention_mask = AttentionMask()

    def forward(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: Any,
        states: HiddenStates,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm.

        :param input_ids: (B, T) token ids, or
        :param inputs_embeds: (B, T, d_model)
        :param attention_mask: see :class:`AttentionMask`
        :param states: collects the hidden states on the way
        :param position_ids: (B, T) or (1, T); None for 0 … T - 1
        :return: (B, T, d_model)
        """
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        hidden_states = self.emb_drop(inputs_embeds)
        tables = self.rotary(hidden_states, position_ids)
        mask = self.attention_mask(attention_mask, hidden_states)
        for block in self.blocks:
            states.add(hidden_states)
            hidden_states = block(hidden_states, attention_mask=mask, position_embeddings=tables)
        hidden_states = self.ln_f(hidden_states)
        states.add(hidden_states)
        return hidden_states


class LLaDAModel(DiffusionLM):
    """The level of module names above the transformer, ``model`` in the official tensor names.

    :param config: the model's configuration
    :raises UsageError: if the configuration has an option that this class doesn't compute
    """

    config_class = LLaDAConfig
    _no_split_modules = ["LLaDALlamaBlock"]  # noqa: RUF012 - transformers reads a list and sets a set per instance

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        config.check_supported()
        self.transformer = LLaDATransformer(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: Any = None,
        states: HiddenStates | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, (B, T, d_model); see :meth:`LLaDATransformer.forward`."""
        states = states or HiddenStates(False, False)
        return self.transformer(input_ids, inputs_embeds, attention_mask, states, position_ids)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table."""
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.transformer.wte = value


class LLaDAModelLM(DiffusionLM):
    """LLaDA with its vocabulary projection; ``logits[b, i]`` predicts the token at position i itself.

    :param config: the model's configuration
    :raises UsageError: if the configuration has an option that this class doesn't compute
    """

    config_class = LLaDAConfig
    _no_split_modules = ["LLaDALlamaBlock"]  # noqa: RUF012 - see LLaDAModel
    _tied_weights_keys = {"model.transformer.ff_out.weight": "model.transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: Any = None,
        attention_bias: None = None,
        past_key_values: None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        position_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> Any:
        """Logits for every position; the order of the arguments is that of the official class.

        :param input_ids: (B, T) token ids, or
        :param inputs_embeds: (B, T, d_model)
        :param attention_mask: (B, T) with 0 for padding, or four-dimensional, see :class:`AttentionMask`
        :param attention_bias: refused; a four-dimensional ``attention_mask`` says the same
        :param past_key_values: must be None
        :param use_cache: must not be True
        :param output_attentions: refused; see ``sinkprune_plugin.sinks`` for where attention goes
        :param output_hidden_states: also return the hidden states
        :param return_dict: False for a tuple
        :param position_ids: (B, T) or (1, T) positions of the tokens; 0 … T - 1 without them
        :param logits_to_keep: logits of the last so many positions only, or of these (n,) positions; 0 for all
        :return: ``CausalLMOutputWithPast`` with ``logits`` (B, T or n, embedding rows)
        :raises UsageError: for an argument that a diffusion LM can't honour
        """
        check_call(
            self,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache,
            attention_bias=attention_bias,
            output_attentions=output_attentions,
        )
        states = HiddenStates(output_hidden_states, self.config.output_hidden_states)
        hidden_states = self.model(input_ids, inputs_embeds, attention_mask, states, position_ids)
        logits = self.model.transformer.ff_out(kept_positions(hidden_states, logits_to_keep))
        return lm_output(self, logits, states.states, return_dict)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table."""
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.model.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module:
        """The vocabulary projection."""
        return self.model.transformer.ff_out

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the vocabulary projection."""
        self.model.transformer.ff_out = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the vocabulary, see ``PreTrainedModel``; keeps ``embedding_size`` in step with ``vocab_size``."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.embedding_size is not None:
            self.config.embedding_size = embeddings.weight.shape[0]
        return embeddings


class MMaDAModelLM(LLaDAModelLM):
    """MMaDA (arXiv 2505.15809): LLaDA's network with image tokens in its vocabulary."""

    config_class = MMaDAConfig

"""Nemotron-Labs-Diffusion as native transformers classes: Ministral 3 that denoises blocks after a causal context.

Names of modules are names of tensors in the official checkpoints: ``encoder.layers.N.self_attn.q_proj``, …,
``diffusion_head``. Facts are from the official code as published with the checkpoints (Hugging Face,
nvidia/Nemotron-Labs-Diffusion-8B) and from NVIDIA-NeMo/Megatron-Bridge, ``nemotron_labs_diffusion``.
"""

import torch
from torch import nn

from sinkprune_plugin.models.block_attention import BlockAttentionMask
from sinkprune_plugin.models.decoder import DecoderLayer, DecoderLM, DecoderModel, GroupedQueryAttention, Positions
from sinkprune_plugin.models.gated_mlp import GatedMLP
from sinkprune_plugin.models.nemotron_labs.configuration_nemotron_labs import NemotronLabsDiffusionConfig
from sinkprune_plugin.models.rotary import RotaryTables
from sinkprune_plugin.models.sizes_in_config import BlockSizes

__all__ = ["NemotronLabsDecoderLayer", "NemotronLabsDiffusionModel", "NemotronLabsEncoder"]


class NemotronLabsDecoderLayer(DecoderLayer):
    """Grouped-query attention and a gated MLP; queries far beyond the pre-training length are scaled up.

    :param config: the model's configuration, checked
    :param sizes: of this layer
    """

    def __init__(self, config: NemotronLabsDiffusionConfig, sizes: BlockSizes) -> None:
        bias = config.attention_bias
        super().__init__(
            config,
            GroupedQueryAttention(config, sizes, bias=bias, output_bias=bias),
            GatedMLP(config.hidden_size, sizes.mlp_channels, config.hidden_act, bias=config.mlp_bias),
        )


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


class NemotronLabsEncoder(DecoderModel):
    """Embedding, decoder layers and final norm.

    :param config: the model's configuration
    """

    config_class = NemotronLabsDiffusionConfig
    base_model_prefix = "encoder"
    _no_split_modules = ["NemotronLabsDecoderLayer"]  # noqa: RUF012 - transformers reads a list and sets a set per instance

    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        config.check_supported()
        # The official code rotates in the model's dtype.
        rotary = RotaryTables(config.head_dim, config.rotary_theta, full_precision=False, yarn=config.yarn)
        super().__init__(config, NemotronLabsDecoderLayer, rotary, BlockAttentionMask(config.block_size, "causal"))
        self.query_scale = QueryScale(config.query_scaling)

    def position_embeddings(self, hidden_states: torch.Tensor, position_ids: torch.Tensor | None) -> Positions:
        """See :meth:`DecoderModel.position_embeddings`."""
        tables = super().position_embeddings(hidden_states, position_ids)
        if self.query_scale.scaling is None:
            return tables
        # One by one: llm-compressor traces this method, and what a module gives can't be iterated then.
        return tables[0], tables[1], self.query_scale(hidden_states, position_ids)


class NemotronLabsDiffusionModel(DecoderLM):
    """Nemotron-Labs-Diffusion with its vocabulary projection; ``logits[b, i]`` predicts the token at position i itself.

    The last ``config.block_size`` tokens of the input are the open block, denoised in both directions; those before it
    are a causal context. Another arrangement takes a four-dimensional ``attention_mask``.

    :param config: the model's configuration
    :raises UsageError: if the configuration has an option that this class doesn't compute
    """

    config_class = NemotronLabsDiffusionConfig
    base_model_prefix = "encoder"
    head_name = "diffusion_head"
    _no_split_modules = ["NemotronLabsDecoderLayer"]  # noqa: RUF012 - see NemotronLabsEncoder
    _tied_weights_keys = {"diffusion_head.weight": "encoder.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NemotronLabsDiffusionConfig) -> None:
        super().__init__(config, NemotronLabsEncoder(config))

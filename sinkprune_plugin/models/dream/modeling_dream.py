"""Dream 7B (arXiv 2508.15487) as native transformers classes: Qwen2 with attention in both directions.

Names of modules are names of tensors in the official checkpoints. ``logits[b, i]`` predicts the token at position
i + 1, as in the autoregressive model that Dream was adapted from.
"""

from sinkprune_plugin.models.bidirectional_attention import AttentionMask
from sinkprune_plugin.models.decoder import DecoderLayer, DecoderLM, DecoderModel, GroupedQueryAttention
from sinkprune_plugin.models.dream.configuration_dream import DreamConfig
from sinkprune_plugin.models.gated_mlp import GatedMLP
from sinkprune_plugin.models.rotary import RotaryTables
from sinkprune_plugin.models.sizes_in_config import BlockSizes

__all__ = ["DreamBaseModel", "DreamDecoderLayer", "DreamModel"]


class DreamDecoderLayer(DecoderLayer):
    """Grouped-query attention in both directions, whose q, k and v have a bias, and a gated MLP.

    :param config: the model's configuration, checked
    :param sizes: of this layer
    """

    def __init__(self, config: DreamConfig, sizes: BlockSizes) -> None:
        super().__init__(
            config,
            GroupedQueryAttention(config, sizes, bias=True, output_bias=False),
            GatedMLP(config.hidden_size, sizes.mlp_channels, config.hidden_act),
        )


class DreamBaseModel(DecoderModel):
    """Embedding, decoder layers and final norm.

    :param config: the model's configuration
    """

    config_class = DreamConfig
    _no_split_modules = ["DreamDecoderLayer"]  # noqa: RUF012 - transformers reads a list and sets a set per instance

    def __init__(self, config: DreamConfig) -> None:
        config.check_supported()
        # The official code rotates in the model's dtype, unlike LLaDA's.
        rotary = RotaryTables(config.head_dim, config.rope_theta, full_precision=False)
        super().__init__(config, DreamDecoderLayer, rotary, AttentionMask())


class DreamModel(DecoderLM):
    """Dream with its vocabulary projection; ``logits[b, i]`` predicts the token at position i + 1.

    ``attention_mask`` may also be "full", see :class:`AttentionMask`.

    :param config: the model's configuration
    :raises UsageError: if the configuration has an option that this class doesn't compute
    """

    config_class = DreamConfig
    _no_split_modules = ["DreamDecoderLayer"]  # noqa: RUF012 - see DreamBaseModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config, DreamBaseModel(config))

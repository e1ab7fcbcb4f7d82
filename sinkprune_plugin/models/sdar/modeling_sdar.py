"""SDAR (arXiv 2510.06303) as native transformers classes: Qwen3 that denoises blocks after a block-causal context.

Names of modules are names of tensors in the official checkpoints. Facts are from the modelling code that is published
with the checkpoints, as hxhcreate/DARE carries it, and from JetAstra/SDAR, ``generate.py``: blocks lie on multiples of
``block_size``, a prompt's last, unfinished block is denoised with what follows it, and ``logits[b, i]`` predicts the
token at position i itself.
"""

from sinkprune_plugin.models.block_attention import BlockAttentionMask
from sinkprune_plugin.models.decoder import DecoderLayer, DecoderLM, DecoderModel, GroupedQueryAttention
from sinkprune_plugin.models.gated_mlp import GatedMLP
from sinkprune_plugin.models.rotary import RotaryTables
from sinkprune_plugin.models.sdar.configuration_sdar import SDARConfig
from sinkprune_plugin.models.sizes_in_config import BlockSizes

__all__ = ["SDARDecoderLayer", "SDARForCausalLM", "SDARModel"]


class SDARDecoderLayer(DecoderLayer):
    """Grouped-query attention with queries and keys normalised head by head, and a gated MLP.

    :param config: the model's configuration, checked
    :param sizes: of this layer
    """

    def __init__(self, config: SDARConfig, sizes: BlockSizes) -> None:
        bias = config.attention_bias
        super().__init__(
            config,
            GroupedQueryAttention(config, sizes, bias=bias, output_bias=bias, head_norms=True),
            GatedMLP(config.hidden_size, sizes.mlp_channels, config.hidden_act),
        )


class SDARModel(DecoderModel):
    """Embedding, decoder layers and final norm.

    :param config: the model's configuration
    """

    config_class = SDARConfig
    _no_split_modules = ["SDARDecoderLayer"]  # noqa: RUF012 - transformers reads a list and sets a set per instance

    def __init__(self, config: SDARConfig) -> None:
        config.check_supported()
        # The official code rotates in the model's dtype.
        rotary = RotaryTables(config.head_dim, config.rope_theta, full_precision=False)
        super().__init__(config, SDARDecoderLayer, rotary, BlockAttentionMask(config.block_size, "block_causal"))


class SDARForCausalLM(DecoderLM):
    """SDAR with its vocabulary projection; ``logits[b, i]`` predicts the token at position i itself.

    The last ``config.block_size`` tokens of the input are the open block; those before it are its context. Another
    arrangement takes a four-dimensional ``attention_mask``.

    :param config: the model's configuration
    :raises UsageError: if the configuration has an option that this class doesn't compute
    """

    config_class = SDARConfig
    _no_split_modules = ["SDARDecoderLayer"]  # noqa: RUF012 - see SDARModel
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config, SDARModel(config))

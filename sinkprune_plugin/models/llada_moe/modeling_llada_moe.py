"""LLaDA-MoE (arXiv 2509.24389) as native transformers classes: OLMoE's network with attention in both directions.

Names of modules are names of tensors in the official checkpoints: ``model.layers.N.mlp.gate`` is the router and
``model.layers.N.mlp.experts.M`` the experts. Against OLMoE, queries and keys are normalised head by head. The formulas
are those of the published modelling code, as inclusionAI/dInfer carries them (tools/modeling_fused_lladamoe.py).
"""

from torch import nn

from sinkprune_plugin.models.bidirectional_attention import AttentionMask
from sinkprune_plugin.models.decoder import DecoderLayer, DecoderLM, DecoderModel, GroupedQueryAttention
from sinkprune_plugin.models.experts import MixtureModel, MoELayer, SoftmaxRouter
from sinkprune_plugin.models.gated_mlp import GatedMLP
from sinkprune_plugin.models.llada_moe.configuration_llada_moe import LLaDAMoEConfig
from sinkprune_plugin.models.rotary import RotaryTables
from sinkprune_plugin.models.sizes_in_config import BlockSizes

__all__ = ["LLaDAMoEDecoderLayer", "LLaDAMoEModel", "LLaDAMoEModelLM"]


class LLaDAMoEDecoderLayer(DecoderLayer):
    """Attention with queries and keys normalised head by head, and a mixture of experts or a dense MLP.

    :param config: the model's configuration, checked
    :param sizes: of this layer; without experts it is dense
    """

    def __init__(self, config: LLaDAMoEConfig, sizes: BlockSizes) -> None:
        width, channels, bias = config.hidden_size, sizes.mlp_channels, config.attention_bias
        head_norms = bool(config.qk_layernorm)
        attention = GroupedQueryAttention(config, sizes, bias=bias, output_bias=bias, head_norms=head_norms)
        mlp: nn.Module
        if sizes.experts:
            router = SoftmaxRouter(width, sizes.experts, config.num_experts_per_tok)
            mlp = MoELayer(router, width, channels, config.hidden_act)
        else:
            mlp = GatedMLP(width, channels, config.hidden_act)
        super().__init__(config, attention, mlp)


class _LLaDAMoE(MixtureModel):
    """What both classes with a configuration have in common."""

    config_class = LLaDAMoEConfig
    _no_split_modules = ["LLaDAMoEDecoderLayer"]  # noqa: RUF012 - transformers reads a list and sets a set per instance


class LLaDAMoEModel(_LLaDAMoE, DecoderModel):
    """Embedding, decoder layers and final norm.

    :param config: the model's configuration
    """

    def __init__(self, config: LLaDAMoEConfig) -> None:
        config.check_supported()
        # The official code rotates in the model's dtype, unlike dense LLaDA's.
        rotary = RotaryTables(config.head_dim, config.rope_theta, full_precision=False)
        super().__init__(config, LLaDAMoEDecoderLayer, rotary, AttentionMask())


class LLaDAMoEModelLM(_LLaDAMoE, DecoderLM):
    """LLaDA-MoE with its vocabulary projection; ``logits[b, i]`` predicts the token at position i.

    :param config: the model's configuration
    :raises UsageError: if the configuration has an option that this class doesn't compute
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config, LLaDAMoEModel(config))

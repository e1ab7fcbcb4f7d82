"""Nemotron-Labs-Diffusion as vLLM modules, named like the official tensors, except those that are fused.

That its context is causal and its blocks aren't is the model state's to say, in each step.
"""

from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig

from sinkprune_plugin.models.nemotron_labs.configuration_nemotron_labs import NemotronLabsDiffusionConfig
from sinkprune_plugin.models.sizes_in_config import BlockSizes
from sinkprune_plugin.vllm.architectures.layers import BlockLinears
from sinkprune_plugin.vllm.architectures.llama_layout import (
    DecoderLayer,
    DecoderLM,
    DecoderModel,
    GatedMLP,
    GroupedQueryAttention,
)

__all__ = ["NemotronLabsDiffusionModel"]


class NemotronLabsDecoderLayer(DecoderLayer):
    """Grouped-query attention and a gated MLP; queries far beyond the pre-training length are scaled up.

    :param vllm_config: configuration of the engine
    :param sizes: of this layer
    :param prefix: the module's full name
    """

    def __init__(self, vllm_config: VllmConfig, sizes: BlockSizes, prefix: str) -> None:
        config: NemotronLabsDiffusionConfig = vllm_config.model_config.hf_config
        make = BlockLinears(vllm_config, sizes)
        attention = GroupedQueryAttention(
            vllm_config,
            make,
            f"{prefix}.self_attn",
            theta=config.rotary_theta,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            yarn=config.yarn,
            query_scaling=config.query_scaling,
        )
        mlp = GatedMLP(make, config.hidden_act, f"{prefix}.mlp", bias=config.mlp_bias)
        super().__init__(vllm_config, attention, mlp)


@support_torch_compile
class NemotronLabsEncoder(DecoderModel):
    """Embedding, decoder layers and final norm; see the base class."""

    layer_class = NemotronLabsDecoderLayer


class NemotronLabsDiffusionModel(DecoderLM):
    """Nemotron-Labs-Diffusion with its vocabulary projection; hidden state i predicts token i itself."""

    decoder_class = NemotronLabsEncoder
    decoder_name = "encoder"
    head_name = "diffusion_head"

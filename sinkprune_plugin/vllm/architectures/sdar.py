"""SDAR as vLLM modules, named like the official tensors, except those that are fused.

That its context is read block by block is the model state's to say, in each step.
"""

from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig

from sinkprune_plugin.models.sdar.configuration_sdar import SDARConfig
from sinkprune_plugin.models.sizes_in_config import BlockSizes
from sinkprune_plugin.vllm.architectures.layers import BlockLinears
from sinkprune_plugin.vllm.architectures.llama_layout import (
    DecoderLayer,
    DecoderLM,
    DecoderModel,
    GatedMLP,
    GroupedQueryAttention,
)

__all__ = ["SDARForCausalLM"]


class SDARDecoderLayer(DecoderLayer):
    """Grouped-query attention with queries and keys normalised head by head, and a gated MLP.

    :param vllm_config: configuration of the engine
    :param sizes: of this layer
    :param prefix: the module's full name
    """

    def __init__(self, vllm_config: VllmConfig, sizes: BlockSizes, prefix: str) -> None:
        config: SDARConfig = vllm_config.model_config.hf_config
        make = BlockLinears(vllm_config, sizes)
        attention = GroupedQueryAttention(
            vllm_config,
            make,
            f"{prefix}.self_attn",
            theta=config.rope_theta,
            bias=config.attention_bias,
            output_bias=config.attention_bias,
            head_norms=True,
        )
        super().__init__(vllm_config, attention, GatedMLP(make, config.hidden_act, f"{prefix}.mlp"))


@support_torch_compile
class SDARModel(DecoderModel):
    """Embedding, decoder layers and final norm; see the base class."""

    layer_class = SDARDecoderLayer


class SDARForCausalLM(DecoderLM):
    """SDAR with its vocabulary projection; hidden state i predicts token i itself."""

    decoder_class = SDARModel

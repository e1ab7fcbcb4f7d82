"""Dream 7B as vLLM modules; modules have the names of the official tensors, except those that are fused."""

from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig

from sinkprune_plugin.models.dream.configuration_dream import DreamConfig
from sinkprune_plugin.models.sizes_in_config import BlockSizes
from sinkprune_plugin.vllm.architectures.layers import BlockLinears
from sinkprune_plugin.vllm.architectures.llama_layout import (
    DecoderLayer,
    DecoderLM,
    DecoderModel,
    GatedMLP,
    GroupedQueryAttention,
)

__all__ = ["DreamModel"]


class DreamDecoderLayer(DecoderLayer):
    """Grouped-query attention, whose q, k and v have a bias, and a gated MLP.

    :param vllm_config: configuration of the engine
    :param sizes: of this layer
    :param prefix: the module's full name
    """

    def __init__(self, vllm_config: VllmConfig, sizes: BlockSizes, prefix: str) -> None:
        config: DreamConfig = vllm_config.model_config.hf_config
        make = BlockLinears(vllm_config, sizes)
        attention = GroupedQueryAttention(
            vllm_config, make, f"{prefix}.self_attn", theta=config.rope_theta, bias=True, output_bias=False
        )
        super().__init__(vllm_config, attention, GatedMLP(make, config.hidden_act, f"{prefix}.mlp"))


@support_torch_compile
class DreamBaseModel(DecoderModel):
    """Embedding, decoder layers and final norm; see the base class."""

    layer_class = DreamDecoderLayer


class DreamModel(DecoderLM):
    """Dream with its vocabulary projection; hidden state i predicts token i + 1, before the model state's shift."""

    decoder_class = DreamBaseModel

"""Nemotron-Labs-Diffusion as vLLM modules, named like the official tensors, except those that are fused.

That its context is causal and its blocks aren't is the model state's to say, in each step.
"""

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from sinkprune_plugin.models.nemotron_labs.configuration_nemotron_labs import NemotronLabsDiffusionConfig
from sinkprune_plugin.models.sizes_in_config import BlockSizes, sizes_in_config
from sinkprune_plugin.vllm.architectures.decoder import DenoisingLM, run_block, run_decoder
from sinkprune_plugin.vllm.architectures.layers import BlockLinears, RotaryAttention, gated_activation, make_norm
from sinkprune_plugin.vllm.checked_config import check_config

__all__ = ["NemotronLabsDiffusionModel"]


class NemotronLabsAttention(nn.Module):
    """Grouped-query attention; queries far beyond the pre-training length are scaled up.

    :param vllm_config: configuration of the engine
    :param make: makes the layer's Linears
    :param prefix: the module's full name
    """

    def __init__(self, vllm_config: VllmConfig, make: BlockLinears, prefix: str) -> None:
        super().__init__()
        config: NemotronLabsDiffusionConfig = vllm_config.model_config.hf_config
        self.qkv_proj = make.qkv(f"{prefix}.qkv_proj", bias=config.attention_bias)
        self.attn = RotaryAttention(
            vllm_config,
            self.qkv_proj,
            theta=config.rotary_theta,
            full_precision=False,
            prefix=f"{prefix}.attn",
            yarn=config.yarn,
            query_scaling=config.query_scaling,
        )
        self.o_proj = make.attention_output(f"{prefix}.o_proj", bias=config.attention_bias)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (T, hidden_size) to (T, hidden_size).

        :param positions: (T,) int64
        :param hidden_states: (T, hidden_size)
        """
        qkv, _ = self.qkv_proj(hidden_states)
        output, _ = self.o_proj(self.attn.attend(positions, qkv))
        return output


class NemotronLabsMLP(nn.Module):
    """down_proj(act(gate_proj x) ⊙ up_proj x).

    :param config: the model's configuration
    :param make: makes the layer's Linears
    :param prefix: the module's full name
    """

    def __init__(self, config: NemotronLabsDiffusionConfig, make: BlockLinears, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = make.gate_up(f"{prefix}.gate_up_proj", bias=config.mlp_bias)
        self.act_fn = gated_activation(config.hidden_act)
        self.down_proj = make.mlp_output(f"{prefix}.down_proj", bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (T, hidden_size) to (T, hidden_size)."""
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class NemotronLabsDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    :param vllm_config: configuration of the engine
    :param sizes: of this layer
    :param prefix: the module's full name
    """

    def __init__(self, vllm_config: VllmConfig, sizes: BlockSizes, prefix: str) -> None:
        super().__init__()
        config: NemotronLabsDiffusionConfig = vllm_config.model_config.hf_config
        make = BlockLinears(vllm_config, sizes)
        self.self_attn = NemotronLabsAttention(vllm_config, make, f"{prefix}.self_attn")
        self.mlp = NemotronLabsMLP(config, make, f"{prefix}.mlp")
        self.input_layernorm = make_norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = make_norm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One decoder layer; the sum of its two results is the layer's output.

        :param positions: (T,) int64
        :param hidden_states: (T, hidden_size)
        :param residual: (T, hidden_size), still to be added; None in the first layer
        :return: the MLP's output and the residual, both (T, hidden_size)
        """
        return run_block(
            hidden_states,
            residual,
            attention_norm=self.input_layernorm,
            attention=lambda x: self.self_attn(positions, x),
            mlp_norm=self.post_attention_layernorm,
            mlp=self.mlp,
        )


@support_torch_compile
class NemotronLabsEncoder(nn.Module):
    """Embedding, decoder layers and final norm.

    :param vllm_config: configuration of the engine
    :param prefix: the module's full name
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: NemotronLabsDiffusionConfig = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(
            NemotronLabsDecoderLayer(vllm_config, sizes, f"{prefix}.layers.{i}")
            for i, sizes in enumerate(sizes_in_config(config))
        )
        self.norm = make_norm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, (T, hidden_size); see :meth:`DenoisingLM.forward`."""
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return run_decoder(hidden_states, positions, blocks=self.layers, norm=self.norm)


class NemotronLabsDiffusionModel(DenoisingLM):
    """Nemotron-Labs-Diffusion with its vocabulary projection; hidden state i predicts token i itself.

    :param vllm_config: configuration of the engine
    :param prefix: the module's full name
    :raises UsageError: if the model's configuration has an option that isn't computed here
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )
    packed_modules_mapping = {  # noqa: RUF012 - vLLM declares it as an instance's
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: NemotronLabsDiffusionConfig = check_config(vllm_config)
        self.encoder = NemotronLabsEncoder(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "encoder"))
        self.diffusion_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "diffusion_head"),
        )
        if config.tie_word_embeddings:
            self.diffusion_head = self.diffusion_head.tie_weights(self.encoder.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @property
    def decoder(self) -> nn.Module:
        """Embedding, decoder layers and final norm."""
        return self.encoder

    @property
    def embedding(self) -> VocabParallelEmbedding:
        """The embedding table."""
        return self.encoder.embed_tokens

    @property
    def head(self) -> ParallelLMHead:
        """The vocabulary projection."""
        return self.diffusion_head

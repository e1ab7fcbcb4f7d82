"""LLaDA-MoE as vLLM modules; modules have the names of the official tensors, except those that are fused."""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from sinkprune_plugin.models.llada_moe.configuration_llada_moe import LLaDAMoEConfig
from sinkprune_plugin.models.sizes_in_config import BlockSizes, sizes_in_config
from sinkprune_plugin.vllm.architectures.decoder import DenoisingLM, run_block, run_decoder
from sinkprune_plugin.vllm.architectures.experts import MoELayer, check_experts, expert_names
from sinkprune_plugin.vllm.architectures.layers import BlockLinears, RotaryAttention, gated_activation, make_norm
from sinkprune_plugin.vllm.checked_config import check_config

__all__ = ["LLaDAMoEModelLM"]


class LLaDAMoEAttention(nn.Module):
    """Attention with queries and keys normalised head by head.

    :param vllm_config: configuration of the engine
    :param make: makes the layer's Linears
    :param prefix: the module's full name
    """

    def __init__(self, vllm_config: VllmConfig, make: BlockLinears, prefix: str) -> None:
        super().__init__()
        config: LLaDAMoEConfig = vllm_config.model_config.hf_config
        self.qkv_proj = make.qkv(f"{prefix}.qkv_proj", bias=config.attention_bias)
        # The official code rotates in the model's dtype, unlike dense LLaDA's.
        self.attn = RotaryAttention(
            vllm_config, self.qkv_proj, theta=config.rope_theta, full_precision=False, prefix=f"{prefix}.attn"
        )
        self.o_proj = make.attention_output(f"{prefix}.o_proj", bias=config.attention_bias)
        self.has_norms = bool(config.qk_layernorm)
        if self.has_norms:
            self.q_norm = make_norm(config.head_dim, config.rms_norm_eps)
            self.k_norm = make_norm(config.head_dim, config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (T, hidden_size) to (T, hidden_size).

        :param positions: (T,) int64
        :param hidden_states: (T, hidden_size)
        """
        qkv, _ = self.qkv_proj(hidden_states)
        norms = (self.q_norm, self.k_norm) if self.has_norms else None
        output, _ = self.o_proj(self.attn.attend(positions, qkv, norms))
        return output


class DenseMLP(nn.Module):
    """down_proj(act(gate_proj x) ⊙ up_proj x), of a layer without experts.

    :param config: the model's configuration
    :param make: makes the layer's Linears
    :param prefix: the module's full name
    """

    def __init__(self, config: LLaDAMoEConfig, make: BlockLinears, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = make.gate_up(f"{prefix}.gate_up_proj", bias=False)
        self.act_fn = gated_activation(config.hidden_act)
        self.down_proj = make.mlp_output(f"{prefix}.down_proj", bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (T, hidden_size) to (T, hidden_size)."""
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class LLaDAMoEDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), where the MLP is a mixture of experts or a dense one.

    :param vllm_config: configuration of the engine
    :param sizes: of this layer; without experts it is dense
    :param prefix: the module's full name
    """

    def __init__(self, vllm_config: VllmConfig, sizes: BlockSizes, prefix: str) -> None:
        super().__init__()
        config: LLaDAMoEConfig = vllm_config.model_config.hf_config
        make = BlockLinears(vllm_config, sizes)
        self.self_attn = LLaDAMoEAttention(vllm_config, make, f"{prefix}.self_attn")
        self.mlp: nn.Module
        if sizes.experts:
            self.mlp = MoELayer(vllm_config, sizes, f"{prefix}.mlp")
        else:
            self.mlp = DenseMLP(config, make, f"{prefix}.mlp")
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
class LLaDAMoEModel(nn.Module):
    """Embedding, decoder layers and final norm.

    :param vllm_config: configuration of the engine
    :param prefix: the module's full name
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LLaDAMoEConfig = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(
            LLaDAMoEDecoderLayer(vllm_config, sizes, f"{prefix}.layers.{i}")
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


class LLaDAMoEModelLM(DenoisingLM):
    """LLaDA-MoE with its vocabulary projection.

    :param vllm_config: configuration of the engine
    :param prefix: the module's full name
    :raises UsageError: if the model's configuration has an option that isn't computed here
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            # Of dense layers; the experts' projections are stacked by vLLM's own layer.
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
        }
    )
    packed_modules_mapping = {  # noqa: RUF012 - vLLM declares it as an instance's
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LLaDAMoEConfig = check_config(vllm_config)
        self.model = LLaDAMoEModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @property
    def decoder(self) -> nn.Module:
        """Embedding, decoder layers and final norm."""
        return self.model

    @property
    def embedding(self) -> VocabParallelEmbedding:
        """The embedding table."""
        return self.model.embed_tokens

    @property
    def head(self) -> ParallelLMHead:
        """The vocabulary projection."""
        return self.lm_head

    def checkpoint_names(self) -> set[str]:
        """See :meth:`DenoisingLM.checkpoint_names`; experts are each a module there."""
        return super().checkpoint_names() | set(expert_names(self))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """See :meth:`DenoisingLM.load_weights`.

        :raises UsageError: also for a router of another number of experts than the configuration's
        """
        return super().load_weights(check_experts(self, weights))

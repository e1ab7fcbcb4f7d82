"""What the families with Llama's layout have in common as vLLM modules; the counterpart of ``models/decoder.py``.

Modules have the names of the official tensors, except those that are fused.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from sinkprune_plugin.models.sizes_in_config import sizes_in_config
from sinkprune_plugin.models.yarn import YarnScaling
from sinkprune_plugin.vllm.architectures.decoder import DenoisingLM, run_block, run_decoder
from sinkprune_plugin.vllm.architectures.layers import BlockLinears, RotaryAttention, gated_activation, make_norm
from sinkprune_plugin.vllm.checked_config import check_config

__all__ = ["DecoderLM", "DecoderLayer", "DecoderModel", "GatedMLP", "GroupedQueryAttention"]


class GroupedQueryAttention(nn.Module):
    """Attention from projections that are fused.

    :param vllm_config: configuration of the engine
    :param make: makes the layer's Linears
    :param prefix: the module's full name
    :param theta: base of the rotary frequencies; they are applied in the model's dtype, as in the official code
    :param bias: whether q, k and v have a bias
    :param output_bias: whether the output projection has one
    :param head_norms: normalise queries and keys head by head, before rotation
    :param yarn: see :class:`RotaryAttention`
    :param query_scaling: see :class:`RotaryAttention`
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        make: BlockLinears,
        prefix: str,
        *,
        theta: float,
        bias: bool,
        output_bias: bool,
        head_norms: bool = False,
        yarn: YarnScaling | None = None,
        query_scaling: tuple[float, int] | None = None,
    ) -> None:
        super().__init__()
        self.qkv_proj = make.qkv(f"{prefix}.qkv_proj", bias=bias)
        self.attn = RotaryAttention(
            vllm_config,
            self.qkv_proj,
            theta=theta,
            full_precision=False,
            prefix=f"{prefix}.attn",
            yarn=yarn,
            query_scaling=query_scaling,
        )
        self.o_proj = make.attention_output(f"{prefix}.o_proj", bias=output_bias)
        self.has_norms = head_norms
        if head_norms:
            eps = vllm_config.model_config.hf_config.rms_norm_eps
            self.q_norm = make_norm(make.head_dim, eps)
            self.k_norm = make_norm(make.head_dim, eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (T, hidden_size) to (T, hidden_size).

        :param positions: (T,) int64
        :param hidden_states: (T, hidden_size)
        """
        qkv, _ = self.qkv_proj(hidden_states)
        norms = (self.q_norm, self.k_norm) if self.has_norms else None
        output, _ = self.o_proj(self.attn.attend(positions, qkv, norms))
        return output


class GatedMLP(nn.Module):
    """down_proj(act(gate_proj x) ⊙ up_proj x).

    :param make: makes the layer's Linears
    :param activation: transformers' name of the activation
    :param prefix: the module's full name
    :param bias: whether the projections have a bias
    :param reduced: whether tensor-parallel ranks add their parts up; otherwise the caller does
    """

    def __init__(
        self, make: BlockLinears, activation: str, prefix: str, *, bias: bool = False, reduced: bool = True
    ) -> None:
        super().__init__()
        self.gate_up_proj = make.gate_up(f"{prefix}.gate_up_proj", bias=bias)
        self.act_fn = gated_activation(activation)
        self.down_proj = make.mlp_output(f"{prefix}.down_proj", bias=bias, reduced=reduced)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (T, hidden_size) to (T, hidden_size)."""
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); a family's layer is made of configuration, sizes and prefix.

    :param vllm_config: configuration of the engine
    :param attention: called with positions and hidden states
    :param mlp: maps (T, hidden_size) to the same
    """

    attention_name: ClassVar[str] = "self_attn"
    """Name of the attention module, as in the family's tensors."""

    def __init__(self, vllm_config: VllmConfig, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.add_module(self.attention_name, attention)
        self.mlp = mlp
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
        attention = getattr(self, self.attention_name)
        return run_block(
            hidden_states,
            residual,
            attention_norm=self.input_layernorm,
            attention=lambda x: attention(positions, x),
            mlp_norm=self.post_attention_layernorm,
            mlp=self.mlp,
        )


class DecoderModel(nn.Module):
    """Embedding, decoder layers and final norm; subclasses name the layer and are what vLLM compiles.

    :param vllm_config: configuration of the engine
    :param prefix: the module's full name
    """

    layer_class: ClassVar[Any]
    """Makes a layer of the engine's configuration, the layer's sizes and its full name."""
    embedding_name: ClassVar[str] = "embed_tokens"
    """Name of the embedding table, as in the family's tensors."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        table = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.{self.embedding_name}",
        )
        self.add_module(self.embedding_name, table)
        self.layers = nn.ModuleList(
            self.layer_class(vllm_config, sizes, f"{prefix}.layers.{i}")
            for i, sizes in enumerate(sizes_in_config(config))
        )
        self.norm = make_norm(config.hidden_size, config.rms_norm_eps)

    @property
    def embedding(self) -> VocabParallelEmbedding:
        """The embedding table."""
        table: VocabParallelEmbedding = getattr(self, self.embedding_name)
        return table

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, (T, hidden_size); see :meth:`DenoisingLM.forward`."""
        hidden_states = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        return run_decoder(hidden_states, positions, blocks=self.layers, norm=self.norm)


class DecoderLM(DenoisingLM):
    """A :class:`DecoderModel` with its vocabulary projection; both have the names of the official tensors.

    :param vllm_config: configuration of the engine
    :param prefix: the module's full name
    :raises UsageError: if the model's configuration has an option that isn't computed here
    """

    decoder_class: ClassVar[type[DecoderModel]]
    decoder_name: ClassVar[str] = "model"
    head_name: ClassVar[str] = "lm_head"

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
        config = check_config(vllm_config)
        decoder = self.decoder_class(vllm_config=vllm_config, prefix=maybe_prefix(prefix, self.decoder_name))
        head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, self.head_name),
        )
        if config.tie_word_embeddings:
            head = head.tie_weights(decoder.embedding)
        self.add_module(self.decoder_name, decoder)
        self.add_module(self.head_name, head)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    @property
    def decoder(self) -> DecoderModel:
        """Embedding, decoder layers and final norm."""
        decoder: DecoderModel = getattr(self, self.decoder_name)
        return decoder

    @property
    def embedding(self) -> VocabParallelEmbedding:
        """The embedding table."""
        return self.decoder.embedding

    @property
    def head(self) -> ParallelLMHead:
        """The vocabulary projection."""
        head: ParallelLMHead = getattr(self, self.head_name)
        return head

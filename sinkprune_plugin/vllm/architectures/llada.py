"""LLaDA, LLaDA-1.5 and MMaDA's text half as vLLM modules.

Modules have the names of the official tensors, except those that are fused, so that lists of module names in a
checkpoint's configuration (what is quantized, what is sparse) apply as they are.
"""

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from sinkprune_plugin.models.llada.configuration_llada import LLaDAConfig
from sinkprune_plugin.models.sizes_in_config import BlockSizes, sizes_in_config
from sinkprune_plugin.vllm.architectures.decoder import DenoisingLM, run_block, run_decoder
from sinkprune_plugin.vllm.architectures.layers import BlockLinears, RotaryAttention, gated_activation, make_norm
from sinkprune_plugin.vllm.checked_config import check_config

__all__ = ["LLaDAModelLM", "MMaDAModelLM"]


def _norm(config: LLaDAConfig) -> RMSNorm:
    bias = config.include_bias if config.bias_for_layer_norm is None else config.bias_for_layer_norm
    return make_norm(config.d_model, config.rms_norm_eps, affine=config.layer_norm_with_affine, bias=bias)


class LLaDABlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)).

    :param vllm_config: configuration of the engine
    :param sizes: of this block
    :param prefix: the module's full name
    """

    def __init__(self, vllm_config: VllmConfig, sizes: BlockSizes, prefix: str) -> None:
        super().__init__()
        config: LLaDAConfig = vllm_config.model_config.hf_config
        make = BlockLinears(vllm_config, sizes)
        bias, qkv_bias = bool(config.include_bias), bool(config.include_bias or config.include_qkv_bias)
        self.attn_norm = _norm(config)
        self.qkv_proj = make.qkv(f"{prefix}.qkv_proj", bias=qkv_bias)
        self.attn = RotaryAttention(
            vllm_config,
            self.qkv_proj,
            theta=config.rope_theta,
            full_precision=config.rope_full_precision,
            prefix=f"{prefix}.attn",
        )
        self.attn_out = make.attention_output(f"{prefix}.attn_out", bias=bias)
        self.ff_norm = _norm(config)
        self.ff_up_proj = make.gate_up(f"{prefix}.ff_up_proj", bias=bias)
        self.act = gated_activation(config.activation_type)
        self.ff_out = make.mlp_output(f"{prefix}.ff_out", bias=bias)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One decoder block; the sum of its two results is the block's output.

        :param positions: (T,) int64
        :param hidden_states: (T, d_model)
        :param residual: (T, d_model), still to be added; None in the first block
        :return: the MLP's output and the residual, both (T, d_model)
        """
        return run_block(
            hidden_states,
            residual,
            attention_norm=self.attn_norm,
            attention=lambda x: self.attn_out(self.attn.attend(positions, self.qkv_proj(x)[0]))[0],
            mlp_norm=self.ff_norm,
            mlp=lambda x: self.ff_out(self.act(self.ff_up_proj(x)[0]))[0],
        )


@support_torch_compile
class LLaDATransformer(nn.Module):
    """Embedding, decoder blocks and final norm; holds the vocabulary projection without applying it.

    :param vllm_config: configuration of the engine
    :param prefix: the module's full name
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LLaDAConfig = vllm_config.model_config.hf_config
        rows, quant_config = config.embedding_rows, vllm_config.quant_config
        self.wte = VocabParallelEmbedding(rows, config.d_model, quant_config=quant_config, prefix=f"{prefix}.wte")
        self.blocks = nn.ModuleList(
            LLaDABlock(vllm_config, sizes, f"{prefix}.blocks.{i}") for i, sizes in enumerate(sizes_in_config(config))
        )
        self.ln_f = _norm(config)
        self.ff_out = ParallelLMHead(
            rows,
            config.d_model,
            # The official code has no bias here if the weight is the embedding's.
            bias=bool(config.include_bias and not config.weight_tying),
            quant_config=quant_config,
            prefix=f"{prefix}.ff_out",
        )
        if config.weight_tying:
            self.ff_out = self.ff_out.tie_weights(self.wte)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, (T, d_model); see :meth:`DenoisingLM.forward`."""
        hidden_states = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        return run_decoder(hidden_states, positions, blocks=self.blocks, norm=self.ln_f)


class LLaDAModel(nn.Module):
    """The level of names above the transformer, ``model`` in the official tensor names.

    :param vllm_config: configuration of the engine
    :param prefix: the module's full name
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.transformer = LLaDATransformer(vllm_config=vllm_config, prefix=f"{prefix}.transformer")


class LLaDAModelLM(DenoisingLM):
    """LLaDA with its vocabulary projection; hidden state i predicts token i itself.

    :param vllm_config: configuration of the engine
    :param prefix: the module's full name
    :raises UsageError: if the model's configuration has an option that isn't computed here
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".ff_proj": (".ff_up_proj", 0),
            ".up_proj": (".ff_up_proj", 1),
        }
    )
    packed_modules_mapping = {  # noqa: RUF012 - vLLM declares it as an instance's
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "ff_up_proj": ["ff_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LLaDAConfig = check_config(vllm_config)
        self.model = LLaDAModel(vllm_config, maybe_prefix(prefix, "model"))
        self.logits_processor = LogitsProcessor(config.embedding_rows)

    @property
    def decoder(self) -> nn.Module:
        """Embedding, decoder blocks and final norm."""
        return self.model.transformer

    @property
    def embedding(self) -> VocabParallelEmbedding:
        """The embedding table."""
        return self.model.transformer.wte

    @property
    def head(self) -> ParallelLMHead:
        """The vocabulary projection."""
        return self.model.transformer.ff_out


class MMaDAModelLM(LLaDAModelLM):
    """MMaDA: LLaDA's network with image tokens in its vocabulary; only its text half is served."""

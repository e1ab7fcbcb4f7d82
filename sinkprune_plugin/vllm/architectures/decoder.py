"""What the decoders of LLaDA and Dream have in common as vLLM modules.

The mathematics is that of :mod:`sinkprune_plugin.models`. Whether attention looks in both directions is not decided
here: the model state tells the attention backend in each step.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from sinkprune_plugin.errors import UsageError

__all__ = ["DenoisingLM", "RotaryAttention", "check_config", "gated_activation", "make_norm", "make_qkv"]

_FUSED_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


def check_config(config: Any) -> None:
    """Check that the modules compute what a model's configuration says.

    :param config: ours, as vLLM has changed it
    :raises UsageError: naming the option that they don't compute
    """
    config = copy.copy(config)
    # vLLM writes the rotary frequencies into every configuration a second time; type default adds nothing.
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "default":
        config.rope_parameters = None
    config.check_supported()


class BiasedRMSNorm(RMSNorm):
    """vLLM's norm with a bias, added after the weight.

    :param size: width of the hidden states
    :param eps: added to the mean square
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps=eps)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """See the base class."""
        if residual is None:
            return super().forward(x) + self.bias
        y, residual = super().forward(x, residual)
        return y + self.bias, residual


def make_norm(size: int, eps: float, *, affine: bool = True, bias: bool = False) -> RMSNorm:
    """A norm; called with a residual it adds that first and returns the sum as well.

    :param size: width of the hidden states
    :param eps: added to the mean square
    :param affine: whether it has a weight
    :param bias: whether it has a bias; needs ``affine``
    :return: the module
    """
    if affine and bias:
        return BiasedRMSNorm(size, eps)
    return RMSNorm(size, eps=eps, has_weight=affine)


class GatedActivation(nn.Module):
    """act(gate) ⊙ up, for activations that vLLM has no fused kernel for.

    :param act: elementwise function
    """

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (T, 2 · hidden), gate and up side by side, to (T, hidden)."""
        gate, up = x.chunk(2, dim=-1)
        return self.act(gate) * up


def gated_activation(name: str) -> nn.Module:
    """The activation of a gated MLP.

    :param name: transformers' name of the activation
    :return: module that maps (T, 2 · hidden) to (T, hidden)
    :raises UsageError: if there is no activation of that name
    """
    if name in _FUSED_ACTIVATIONS:
        return get_act_and_mul_fn(name)
    if name not in ACT2FN:
        raise UsageError(f"activation {name!r} in config.json is unknown to transformers; correct it")
    return GatedActivation(ACT2FN[name])


def make_qkv(
    vllm_config: VllmConfig, *, heads: int, kv_heads: int, head_dim: int, bias: bool, prefix: str
) -> QKVParallelLinear:
    """The three projections before attention as one matrix, split by heads between tensor-parallel ranks.

    :param vllm_config: configuration of the engine
    :param heads: query heads of the whole model
    :param kv_heads: key and value heads of the whole model
    :param head_dim: width of one head
    :param bias: with a bias
    :param prefix: the module's full name
    :return: the module
    """
    return QKVParallelLinear(
        heads * head_dim,
        head_dim,
        heads,
        kv_heads,
        bias=bias,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
    )


class RotaryAttention(Attention):
    """Rotary embedding and attention of this rank's heads.

    :param vllm_config: configuration of the engine
    :param qkv: the projection whose output it takes
    :param theta: base of the rotary frequencies
    :param full_precision: rotate in float32 whatever the model's dtype
    :param prefix: the module's full name
    """

    def __init__(
        self, vllm_config: VllmConfig, qkv: QKVParallelLinear, *, theta: float, full_precision: bool, prefix: str
    ) -> None:
        super().__init__(
            qkv.num_heads,
            qkv.head_size,
            qkv.head_size**-0.5,
            num_kv_heads=qkv.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
        self.widths = [qkv.num_heads * qkv.head_size, *[qkv.num_kv_heads * qkv.head_size] * 2]
        self.full_precision = full_precision
        model_config = vllm_config.model_config
        # Shared by all layers: vLLM keeps one table for each set of arguments.
        self.rotary = get_rope(
            qkv.head_size,
            max_position=max(model_config.max_model_len, model_config.hf_config.max_position_embeddings),
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            dtype=torch.float32 if full_precision else torch.get_default_dtype(),
        )

    def attend(self, positions: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """Attention of one layer.

        :param positions: (T,) int64
        :param qkv: (T, (heads + 2 · kv_heads) · head_dim) of this rank
        :return: (T, heads · head_dim)
        """
        q, k, v = qkv.split(self.widths, dim=-1)
        if self.full_precision:
            # Angles are exact in float32 only; the official LLaDA code rotates in it and casts back.
            rotated_q, rotated_k = self.rotary(positions, q.float(), k.float())
            q, k = rotated_q.to(v.dtype), rotated_k.to(v.dtype)
        else:
            q, k = self.rotary(positions, q, k)
        return self(q, k, v)


class DenoisingLM(nn.Module, SupportsQuant):
    """A decoder with its vocabulary projection; subclasses say where the two are and how tensors are named.

    ``block_rows``, set by the model state before each step, names the rows whose logits are needed; None for all.
    """

    hf_to_vllm_mapper: WeightsMapper
    packed_modules_mapping: dict[str, list[str]]
    block_rows: torch.Tensor | None = None
    logits_processor: LogitsProcessor

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """The class that plans denoising steps for vLLM's runner."""
        from sinkprune_plugin.vllm.model_state import DenoisingModelState

        return DenoisingModelState

    @property
    def decoder(self) -> nn.Module:
        """Embedding, decoder layers and final norm."""
        raise NotImplementedError

    @property
    def embedding(self) -> VocabParallelEmbedding:
        """The embedding table."""
        raise NotImplementedError

    @property
    def head(self) -> ParallelLMHead:
        """The vocabulary projection."""
        raise NotImplementedError

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look tokens up.

        :param input_ids: (T,) token ids
        :return: (T, d)
        """
        return self.embedding(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,  # noqa: ARG002 - of pipeline parallelism, which is refused
        inputs_embeds: torch.Tensor | None = None,
        shift: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **_kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states after the final norm.

        :param input_ids: (T,) token ids, or
        :param positions: (T,) position of each token within its request
        :param intermediate_tensors: not used
        :param inputs_embeds: (T, d) in place of ``input_ids``
        :param shift: for models whose hidden state i predicts token i + 1: moves them so that row i predicts token i
        :return: (T, d)
        """
        hidden_states = self.decoder(input_ids, positions, inputs_embeds)
        return hidden_states if shift is None else shift(hidden_states)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Project onto the vocabulary.

        :param hidden_states: (T, d)
        :return: (rows, embedding rows), the rows that ``block_rows`` names; None on ranks that don't gather
        """
        if self.block_rows is not None:
            hidden_states = hidden_states[self.block_rows]
        return self.logits_processor(self.head, hidden_states, self.head.bias)

    def checkpoint_names(self) -> set[str]:
        """Names that the weights and biases of this model have in a checkpoint; quantized ones may be missing."""
        names: set[str] = set()
        for name, _ in self.named_parameters():
            module, _, kind = name.rpartition(".")
            parent, _, own = module.rpartition(".")
            if kind in ("weight", "bias"):
                parts = self.packed_modules_mapping.get(own, [own])
                names.update(".".join(filter(None, (parent, part, kind))) for part in parts)
        return names

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors.

        :param weights: name in the checkpoint → tensor
        :return: names of the parameters that were loaded
        :raises UsageError: for a tensor that the model would have to leave out
        """
        return AutoWeightsLoader(self).load_weights(self._no_bias_dropped(weights), mapper=self.hf_to_vllm_mapper)

    def _no_bias_dropped(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """vLLM's loader skips biases that a model has no parameter for, which would change what it computes."""
        known = {name for name, _ in self.named_parameters()}
        for name, tensor in weights:
            if name.endswith(".bias") and self.hf_to_vllm_mapper.map_name(name) not in known and bool(tensor.any()):
                raise UsageError(
                    f"{name} is in the checkpoint, but config.json says that there is no such bias; correct config.json"
                )
            yield name, tensor

"""Layers of the decoders of LLaDA, Dream and others as vLLM modules.

The mathematics is that of :mod:`sinkprune_plugin.models`. Whether attention looks in both directions is not decided
here: the model state tells the attention backend in each step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.sizes_in_config import BlockSizes
from sinkprune_plugin.models.yarn import YarnScaling
from sinkprune_plugin.vllm.architectures.yarn import yarn_rotary

__all__ = ["BlockLinears", "RotaryAttention", "gated_activation", "make_norm"]

_FUSED_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


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


class BlockLinears:
    """Makes the Linears of one decoder block, of its sizes and split between tensor-parallel ranks.

    :param vllm_config: configuration of the engine
    :param sizes: of the block, in the whole model
    """

    def __init__(self, vllm_config: VllmConfig, sizes: BlockSizes) -> None:
        self.sizes = sizes
        self.quant_config = vllm_config.quant_config
        config = vllm_config.model_config.hf_config
        self.width: int = config.hidden_size
        self.head_dim: int = config.head_dim

    def qkv(self, prefix: str, *, bias: bool) -> QKVParallelLinear:
        """The three projections before attention as one matrix, (T, width) → (T, (heads + 2 · kv_heads) · head_dim).

        :param prefix: the module's full name
        :param bias: with a bias
        """
        return QKVParallelLinear(
            self.width,
            self.head_dim,
            self.sizes.attention_heads,
            self.sizes.key_value_heads,
            bias=bias,
            quant_config=self.quant_config,
            prefix=prefix,
        )

    def attention_output(self, prefix: str, *, bias: bool) -> RowParallelLinear:
        """The projection after attention, (T, heads · head_dim) → (T, width); parameters as of :meth:`qkv`."""
        return self._output(self.sizes.attention_heads * self.head_dim, prefix, bias)

    def gate_up(self, prefix: str, *, bias: bool) -> MergedColumnParallelLinear:
        """Gate and up projection as one matrix, (T, width) → (T, 2 · channels); parameters as of :meth:`qkv`."""
        return MergedColumnParallelLinear(
            self.width,
            [self.sizes.mlp_channels] * 2,
            bias=bias,
            quant_config=self.quant_config,
            prefix=prefix,
        )

    def mlp_output(self, prefix: str, *, bias: bool, reduced: bool = True) -> RowParallelLinear:
        """The projection that ends the MLP, (T, channels) → (T, width); parameters as of :meth:`qkv`.

        :param prefix: the module's full name
        :param bias: with a bias
        :param reduced: whether ranks add their parts up; otherwise the caller does
        """
        return self._output(self.sizes.mlp_channels, prefix, bias, reduced)

    def _output(self, columns: int, prefix: str, bias: bool, reduced: bool = True) -> RowParallelLinear:
        return RowParallelLinear(
            columns,
            self.width,
            bias=bias,
            reduce_results=reduced,
            quant_config=self.quant_config,
            prefix=prefix,
        )


class RotaryAttention(Attention):
    """Rotary embedding and attention of this rank's heads.

    :param vllm_config: configuration of the engine
    :param qkv: the projection whose output it takes
    :param theta: base of the rotary frequencies
    :param full_precision: rotate in float32 whatever the model's dtype
    :param prefix: the module's full name
    :param yarn: scaling of the frequencies, if there is one
    :param query_scaling: beta and step of a scale of the queries by position, 1 + beta · ln(1 + ⌊position / step⌋)
    :param rotated: part of each head that is rotated, its beginning
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        qkv: QKVParallelLinear,
        *,
        theta: float,
        full_precision: bool,
        prefix: str,
        yarn: YarnScaling | None = None,
        query_scaling: tuple[float, int] | None = None,
        rotated: float = 1.0,
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
        longest = max(model_config.max_model_len, model_config.hf_config.max_position_embeddings)
        dtype = torch.float32 if full_precision else torch.get_default_dtype()
        # Shared by all layers: vLLM keeps one table for each set of arguments, and so do we.
        self.rotary: nn.Module = (
            get_rope(
                qkv.head_size,
                max_position=longest,
                rope_parameters={"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": rotated},
                dtype=dtype,
            )
            if yarn is None
            else yarn_rotary(qkv.head_size, longest, theta, yarn, dtype)
        )
        self.query_scaling = query_scaling

    def attend(
        self, positions: torch.Tensor, qkv: torch.Tensor, head_norms: tuple[nn.Module, nn.Module] | None = None
    ) -> torch.Tensor:
        """Attention of one layer.

        :param positions: (T,) int64
        :param qkv: (T, (heads + 2 · kv_heads) · head_dim) of this rank
        :param head_norms: normalise each head of the queries and of the keys before rotation; None: nothing does
        :return: (T, heads · head_dim)
        """
        q, k, v = qkv.split(self.widths, dim=-1)
        if head_norms is not None:
            q_norm, k_norm = head_norms
            q = q_norm(q.unflatten(-1, (-1, self.head_size))).flatten(-2)
            k = k_norm(k.unflatten(-1, (-1, self.head_size))).flatten(-2)
        if self.full_precision:
            # Angles are exact in float32 only; the official LLaDA code rotates in it and casts back.
            rotated_q, rotated_k = self.rotary(positions, q.float(), k.float())
            q, k = rotated_q.to(v.dtype), rotated_k.to(v.dtype)
        else:
            q, k = self.rotary(positions, q, k)
        if self.query_scaling is not None:
            beta, step = self.query_scaling
            scale = 1 + beta * torch.log(1 + torch.floor(positions.float() / step))
            q = q * scale[:, None].to(q.dtype)
        return self(q, k, v)

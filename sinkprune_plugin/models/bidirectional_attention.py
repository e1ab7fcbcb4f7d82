"""Attention in both directions through ``scaled_dot_product_attention``, the only attention of these models."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sinkprune_plugin.errors import UsageError

__all__ = ["AttentionMask", "attend", "split_heads"]


class AttentionMask(nn.Module):
    """Turns the caller's ``attention_mask`` into what ``scaled_dot_product_attention`` takes.

    A module without parameters rather than a function, so that llm-compressor's tracer doesn't enter it: whether a
    batch has padding must be decided again for each batch, not fixed by the first one.
    """

    def forward(self, attention_mask: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Mask for one batch.

        :param attention_mask: (B, T) with 0 for padding, or (B or 1, H or 1, T or 1, T) boolean (True may attend) or
            floating point (added to the scores), or None or ``"full"`` (which official Dream code passes) for no mask
        :param hidden_states: (B, T, d)
        :return: boolean (B, 1, 1, T), True for keys that may be attended to, or the four-dimensional mask unchanged, or
            None where nothing is masked, which lets torch choose its fastest kernel
        :raises UsageError: if the mask has any other form
        """
        if attention_mask is None or (isinstance(attention_mask, str) and attention_mask == "full"):
            return None
        batch, length = hidden_states.shape[:2]
        if not isinstance(attention_mask, torch.Tensor):
            raise UsageError(
                f"attention_mask is {attention_mask!r}; it must be a (B, T) tensor with 0 for padding, or None"
            )
        if attention_mask.dim() == 4:
            return self._four_dimensional(attention_mask, hidden_states)
        if tuple(attention_mask.shape) != (batch, length):
            raise UsageError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; it must be ({batch}, {length}) like the "
                "input, or four-dimensional"
            )
        valid = attention_mask.to(hidden_states.device) != 0
        return None if bool(valid.all()) else valid[:, None, None, :]

    @staticmethod
    def _four_dimensional(mask: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, length = hidden_states.shape[:2]
        fits = mask.shape[0] in (1, batch) and mask.shape[2] in (1, length) and mask.shape[3] == length
        if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
            raise UsageError(
                f"the four-dimensional attention_mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; it must be "
                f"({batch}, heads or 1, {length} or 1, {length}), boolean (True may attend) or floating point (added)"
            )
        mask = mask.to(hidden_states.device)
        return mask if mask.dtype == torch.bool else mask.to(hidden_states.dtype)


def split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Split a projection's output into heads.

    By their width, not their number: blocks from which heads were removed have fewer, all of the same width.

    :param x: (B, T, heads · head_dim)
    :param head_dim: width of one head
    :return: (B, heads, T, head_dim), a view
    """
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float = 0.0
) -> torch.Tensor:
    """Softmax attention without causality.

    :param q: (B, H, T, head_dim) after rotary embedding
    :param k: (B, K, T, head_dim) after rotary embedding; K divides H, each key head serves H / K query heads
    :param v: (B, K, T, head_dim)
    :param mask: as :class:`AttentionMask` gives it
    :param dropout: probability of dropping an attention weight, 0 outside training
    :return: (B, T, H · head_dim), heads side by side
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        # enable_gqa would leave the choice to the kernels, and several of them refuse it together with a mask.
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    # Looked up in the module at each call: interception of attention depends on it.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=False)
    return out.transpose(1, 2).flatten(2)

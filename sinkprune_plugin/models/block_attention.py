"""Which tokens see which in a model that denoises block by block.

A block diffusion LM ("Block Diffusion", arXiv 2503.09573, section 3) writes text in blocks of L tokens. While a block
is open, its tokens see each other in both directions and everything before the block, never anything after it. Tokens
of the context, the prompt and finished blocks, see each other either causally (``causal``: Nemotron-Labs-Diffusion) or
each its own block and those before (``block_causal``: LLaDA2, SDAR). They never see an open block, so their keys and
values are final.
"""

from typing import Any

import torch

from sinkprune_plugin.models.bidirectional_attention import AttentionMask
from sinkprune_plugin.models.diffusion_family import ContextAttention

__all__ = ["BlockAttentionMask", "context_length", "context_mask", "joint_mask", "open_block_mask"]


def context_mask(length: int, block_length: int, context: ContextAttention, *, first: int = 0) -> torch.Tensor:
    """Attention of context tokens among each other.

    :param length: T
    :param block_length: L, on whose multiples blocks begin
    :param context: how they see each other
    :param first: position of the first of them, where it isn't 0
    :return: (T, T) bool, True where a query (row) sees a key (column)
    """
    position = torch.arange(first, first + length)
    if context == "bidirectional":
        return torch.ones(length, length, dtype=torch.bool)
    if context == "block_causal":
        position = position // block_length
    return position[:, None] >= position[None, :]


def open_block_mask(
    length: int, block_length: int, context: ContextAttention, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention while the last tokens of a sequence are the open block.

    :param length: T
    :param block_length: L; the block is the last L real tokens, or all where there are fewer
    :param context: how the tokens before it see each other
    :param valid: (B, T) bool, False on padding, which is seen by no token; None: all are real
    :return: (B, T, T) bool, B = 1 without ``valid``
    """
    if valid is None:
        begin = torch.tensor([max(length - block_length, 0)])
        valid = torch.ones(1, length, dtype=torch.bool)
    else:
        # Counted from the right, whichever side the padding is on.
        from_end = valid.flip(1).cumsum(1).flip(1)
        begin = (~(valid & (from_end <= block_length))).long().cumprod(1).sum(1)
    opened = torch.arange(length, device=valid.device)[None, :] >= begin.to(valid.device)[:, None]
    among_context = context_mask(length, block_length, context).to(valid.device)[None] & ~opened[:, None, :]
    return (among_context | opened[:, :, None]) & valid[:, None, :]


def joint_mask(
    length: int,
    block_length: int,
    context: ContextAttention,
    *,
    begin: int = 0,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a sequence and its noisy version side by side, so that one pass has every block open in turn.

    The first C tokens are the clean sequence up to the last block, which nothing after it needs; the others are the
    noisy tokens from ``begin`` on, in blocks of L. Noisy tokens see their own block and the clean ones before it, as
    they would if they alone were open (the mask of arXiv 2503.09573, section 3.2, with the halves the other way round).

    :param length: T, tokens of the clean sequence
    :param block_length: L
    :param context: how clean tokens see each other
    :param begin: first position that may be noisy; blocks are counted from there
    :param valid: (B, T) bool, False on padding, which is seen by no token; None: all are real
    :return: (B, C + T - begin, C + T - begin) bool, B = 1 without ``valid``
    """
    clean = context_length(length, block_length, begin)
    position = torch.cat([torch.arange(clean), torch.arange(begin, length)])
    noisy = torch.arange(len(position)) >= clean
    block = torch.where(noisy | (position >= begin), (position - begin) // block_length, -1)
    query, key = slice(None), None
    own_block = noisy[:, key] & noisy[key] & (block[:, key] == block[key])
    before = noisy[:, key] & ~noisy[key] & (position[key] < begin + block[:, key] * block_length)
    among_context = torch.zeros(len(position), len(position), dtype=torch.bool)
    among_context[:clean, :clean] = context_mask(clean, block_length, context)
    mask = (own_block | before | among_context)[None]
    return mask if valid is None else mask.to(valid.device) & valid[:, position.to(valid.device)][:, None, query]


def context_length(length: int, block_length: int, begin: int = 0) -> int:
    """Clean tokens that the last block's predictions need: all before it.

    :param length: T
    :param block_length: L
    :param begin: where blocks are counted from
    """
    return begin + (length - begin - 1) // block_length * block_length


class BlockAttentionMask(AttentionMask):
    """Turns the caller's ``attention_mask`` into what ``scaled_dot_product_attention`` takes.

    Unless the caller gives a four-dimensional mask, the last block of the input is the open one, and what comes before
    it is context, as the beginning of this file says.

    :param block_length: L
    :param context: how context tokens see each other
    """

    def __init__(self, block_length: int, context: ContextAttention) -> None:
        super().__init__()
        self.block_length = block_length
        self.context = context

    def forward(self, attention_mask: Any, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Mask for one batch.

        :param attention_mask: as in :class:`AttentionMask`
        :param hidden_states: (B, T, d)
        :return: boolean (B or 1, 1, T, T), the four-dimensional mask unchanged, or None where all tokens are one block
        :raises UsageError: if the mask has any other form
        """
        mask = super().forward(attention_mask, hidden_states)
        length = hidden_states.shape[1]
        if mask is not None and mask.shape[2] != 1:
            return mask
        if mask is None and length <= self.block_length:
            return None
        valid = None if mask is None else mask[:, 0, 0, :]
        return open_block_mask(length, self.block_length, self.context, valid)[:, None].to(hidden_states.device)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.block_length}, context={self.context}"

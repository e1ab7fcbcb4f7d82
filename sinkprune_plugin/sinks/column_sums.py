"""Column sums of attention probabilities, streamed over blocks of queries: no (T, T) tensor is ever allocated."""

import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["attention_column_sums", "uniform_column_sums"]

# Elements of one block of scores (two such buffers are alive). On CPU 2 MiB stays in the second-level cache, where the
# softmax passes are several times faster than in main memory; an accelerator needs large blocks to be busy at all.
_CPU_BLOCK_ELEMENTS = 2**19
_ACCELERATOR_BLOCK_ELEMENTS = 2**25


@torch.no_grad()
def attention_column_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    valid: torch.Tensor | None = None,
    block_size: int | None = None,
) -> torch.Tensor:
    """Attention mass that each key position receives in one layer: Σ_heads Σ_queries softmax(Q Kᵀ scale).

    Source: "Sink-Aware Pruning for Diffusion Language Models" (arXiv 2602.17664), section 3 (attention mass). The
    softmax of a query needs its own row of scores only, so a block of queries with all of their keys is complete in
    itself: one pass over Q Kᵀ, extra memory O(H · T · block) at most.

    Masks mean what they mean to ``scaled_dot_product_attention``. A query that may attend to no key contributes
    nothing. NaN in queries or keys that count isn't hidden: it appears in the result.

    :param query: (B, H, Tq, D), after rotary embedding, any floating dtype
    :param key: (B, Hkv, Tk, D); H must be a multiple of Hkv (grouped-query attention)
    :param attn_mask: broadcastable to (B, H, Tq, Tk): bool (True = may attend) or additive. An additive value at or
        below the least finite number of its dtype, which is how transformers writes "may not attend", counts as -inf.
    :param is_causal: query i sees keys 0 … i
    :param scale: factor on the scores; default 1/√D
    :param valid: (B, Tk) bool, False on padding: such keys leave the softmax, such queries are dropped. With fewer
        queries than keys, the queries are taken to be the last positions (cached decoding).
    :param block_size: queries in a block; default: as many as keep a block within a fixed number of bytes
    :return: (B, Tk) float32
    :raises UsageError: if shapes don't fit or ``block_size`` is not positive
    """
    _check(query, key, attn_mask, valid, block_size)
    batch, heads, _, width = query.shape
    kv_heads = key.shape[1]
    batch_step, head_step, query_step = _steps(query, key, block_size)
    # All of them as (B, Hkv, G, Tq, ...) with 1 where they broadcast, so that all of them can be sliced alike.
    queries = query.unflatten(1, (kv_heads, heads // kv_heads))
    mask = None if attn_mask is None else _by_group(attn_mask, heads, kv_heads)
    pieces = []
    # Under autocast the products would be taken in half precision.
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, batch, batch_step):
            rows = slice(start, start + batch_step)
            sums = _ColumnSums(
                queries[rows],
                key[rows],
                mask if mask is None or mask.shape[0] == 1 else mask[rows],
                None if valid is None else valid[rows],
                is_causal,
                width**-0.5 if scale is None else scale,
            )
            pieces.append(sums.compute(head_step, query_step))
    return torch.cat(pieces)


@torch.no_grad()
def uniform_column_sums(
    queries: int,
    keys: int,
    attn_mask: torch.Tensor | None,
    valid: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
) -> torch.Tensor | None:
    """Mass that each key would receive in one head if every query looked at all keys that it may see alike.

    An early key of a causal context is seen by more queries than a late one, and by queries that see few others, so it
    has more mass by construction: Σ_q 1 / (keys that q sees) over the queries that see it. Dividing by the number of
    these queries alone would leave the second reason.

    :param queries: Tq
    :param keys: Tk
    :param attn_mask: as in :func:`attention_column_sums`; the same for all heads, or the first head's counts
    :param valid: (B, Tk) bool, False on padding
    :param is_causal: query i sees keys 0 … i
    :return: (B or 1, Tk) float32, 1 for keys that no query sees; None where all keys are alike
    """
    if not is_causal and (attn_mask is None or attn_mask.shape[-2] == 1):
        # Every query sees the same keys: 1 for each of them.
        return None
    if attn_mask is None:
        seen = torch.ones(1, queries, keys, dtype=torch.bool, device=None if valid is None else valid.device)
    else:
        mask = attn_mask[(None,) * (4 - attn_mask.dim())][:, 0]
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        seen = seen.expand(-1, queries, keys)
    if is_causal:
        seen = seen & torch.ones(queries, keys, dtype=torch.bool, device=seen.device).tril()
    if valid is not None:
        seen = seen & valid[:, None, :] & valid[:, keys - queries :, None]
    mass = (seen / seen.sum(dim=-1, keepdim=True).clamp(min=1)).sum(dim=-2)
    return mass.masked_fill(mass == 0, 1.0)


class _ColumnSums:
    """Column sums of a few sequences, block by block.

    :param queries: (B, Hkv, G, Tq, D)
    :param keys: (B, Hkv, Tk, D)
    :param mask: broadcastable to (B, Hkv, G, Tq, Tk), bool or additive; None
    :param valid: (B, Tk) bool, or None
    :param is_causal: query i sees keys 0 … i
    :param scale: factor on the scores
    """

    def __init__(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        mask: torch.Tensor | None,
        valid: torch.Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> None:
        self.queries, self.keys, self.mask, self.valid = queries, keys, mask, valid
        self.is_causal, self.scale = is_causal, scale
        self.num_queries, self.num_keys = queries.shape[3], keys.shape[2]
        self.valid_queries = None if valid is None else valid[:, self.num_keys - self.num_queries :]

    def compute(self, head_step: int, query_step: int) -> torch.Tensor:
        """Sum over all blocks.

        :param head_step: key heads in a block
        :param query_step: queries in a block
        :return: (B, Tk) float32
        """
        batch, kv_heads, groups, num_queries, width = self.queries.shape
        device = self.queries.device
        mass = torch.zeros(batch, 1, self.num_keys, dtype=torch.float32, device=device)
        block_elements = batch * head_step * groups * query_step * self.num_keys
        buffers = torch.empty(2, block_elements, dtype=torch.float32, device=device)
        triangle = None
        if self.is_causal:
            triangle = torch.full((query_step, query_step), -torch.inf, dtype=torch.float32, device=device).triu_(1)

        head_starts, query_starts = range(0, kv_heads, head_step), range(0, num_queries, query_step)
        # A mask costs most to convert, and usually is the same for all heads; without one it's the keys.
        by_query = self.mask is not None
        order = [(h, q) for q in query_starts for h in head_starts]
        order = order if by_query else [(h, q) for h in head_starts for q in query_starts]
        keys_at = bias_at = None
        keys = bias = keep = None
        for h, q in order:
            heads, block = slice(h, h + head_step), slice(q, q + query_step)
            if keys is None or keys_at != h:
                keys_at, keys = h, self._float_keys(heads)
            place = (q, h if self.mask is not None and self.mask.shape[1] > 1 else 0)
            if bias_at != place:
                bias_at = place
                bias, keep = self._bias(heads, block, triangle)
            part = self._float_queries(heads, block)
            count = part.shape[3]
            # Later keys are invisible to every query of a causal block.
            seen = min(q + count, self.num_keys) if self.is_causal else self.num_keys
            shape = (*part.shape[:4], seen)
            products = batch * part.shape[1]
            flat = buffers[:, : products * groups * count * seen].view(2, products, groups * count, seen)
            scores, probabilities = flat[0], flat[1]
            torch.baddbmm(
                scores,
                part.reshape(products, groups * count, width),
                keys.reshape(products, self.num_keys, width)[:, :seen].transpose(1, 2),
                beta=0,
                alpha=self.scale,
                out=scores,
            )
            # Added instead of filled in: the same result, ten times as fast on CPU.
            if bias is not None:
                scores.view(shape).add_(bias)
            elif triangle is not None:
                scores[..., q:].unflatten(1, (groups, count)).add_(triangle[:count, : max(seen - q, 0)])
            torch.softmax(scores, dim=-1, out=probabilities)
            weights = torch.ones(batch, 1, shape[1] * groups * count, dtype=torch.float32, device=device)
            if keep is not None:
                weights = keep.expand(shape[:4]).reshape(batch, 1, -1).to(torch.float32)
            # A block's own sum first: its small numbers would lose digits if each were added to the total.
            mass[..., :seen] += torch.bmm(weights, probabilities.view(batch, -1, seen))
        return mass.squeeze(1)

    def _float_keys(self, heads: slice) -> torch.Tensor:
        # Float32 whatever the model's dtype: a sum over T queries of numbers near 1/T loses all digits in bfloat16.
        # Converted one block at a time, so that there is no float32 copy of the whole tensor.
        keys = self.keys[:, heads].to(torch.float32)
        # Activations of padding may be NaN in the model, and must not matter.
        return keys if self.valid is None else keys.masked_fill(~self.valid[:, None, :, None], 0.0)

    def _float_queries(self, heads: slice, block: slice) -> torch.Tensor:
        queries = self.queries[:, heads, :, block].to(torch.float32)
        if self.valid_queries is None:
            return queries
        return queries.masked_fill(~self.valid_queries[:, None, None, block, None], 0.0)

    def _bias(
        self, heads: slice, block: slice, triangle: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Additive mask of a block of scores, and which of its queries count.

        :return: float32 that broadcasts to (B, h, G, n, T), and bool that broadcasts to (B, h, G, n); None, None
            where there is no mask but causality
        """
        if self.mask is None and self.valid is None:
            return None, None
        stop = min(block.stop, self.num_queries)
        seen = min(stop, self.num_keys) if self.is_causal else self.num_keys
        bias = torch.zeros(1, 1, 1, 1, seen, dtype=torch.float32, device=self.keys.device)
        if self.mask is not None:
            mask = _cut(self.mask, (slice(None), heads, slice(None), block, slice(seen)))
            if mask.dtype == torch.bool:
                bias = bias.masked_fill(~mask, -torch.inf)
            else:
                # Comparison with NaN is false, so NaN remains visible in the result.
                barred = mask <= torch.finfo(mask.dtype).min
                bias = mask.to(torch.float32).masked_fill(barred, -torch.inf).expand(*mask.shape[:4], seen)
        if self.valid is not None:
            bias = bias.masked_fill(~self.valid[:, None, None, None, :seen], -torch.inf)
        if triangle is not None:
            count, start = stop - block.start, block.start
            bias = bias.expand(-1, -1, -1, count, -1).clone()
            bias[..., start:] += triangle[:count, : max(seen - start, 0)]
        blind = (bias == -torch.inf).all(dim=-1, keepdim=True)
        # A softmax over nothing is NaN; the weight of such a query is zero instead.
        bias = bias.masked_fill(blind, 0.0)
        keep = ~blind.squeeze(-1)
        if self.valid_queries is not None:
            keep = keep & self.valid_queries[:, None, None, block]
        return bias, keep


def _cut(tensor: torch.Tensor, where: tuple[slice, ...]) -> torch.Tensor:
    """Slice a block of a tensor; dimensions that broadcast are taken whole."""
    return tensor[tuple(slice(None) if size == 1 else at for size, at in zip(tensor.shape, where, strict=True))]


def _by_group(mask: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """View a mask that broadcasts to (B, H, Tq, Tk) as one that broadcasts to (B, Hkv, G, Tq, Tk)."""
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.unflatten(1, (kv_heads, heads // kv_heads)) if mask.shape[1] == heads else mask.unsqueeze(2)


def _steps(query: torch.Tensor, key: torch.Tensor, block_size: int | None) -> tuple[int, int, int]:
    """Batch rows, key heads and queries in a block: queries first, then heads, then rows, within the budget."""
    batch, heads, num_queries, _ = query.shape
    kv_heads, num_keys = key.shape[1:3]
    groups = heads // kv_heads
    budget = _CPU_BLOCK_ELEMENTS if query.device.type == "cpu" else _ACCELERATOR_BLOCK_ELEMENTS
    budget = max(budget // num_keys, 1)
    if block_size is None:
        block_size = max(budget // groups, 1)
    query_step = min(block_size, num_queries)
    head_step = min(max(budget // (groups * query_step), 1), kv_heads)
    batch_step = min(max(budget // (heads * query_step), 1), batch)
    return batch_step, head_step, query_step


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | None,
    valid: torch.Tensor | None,
    block_size: int | None,
) -> None:
    if query.dim() != 4 or key.dim() != 4:
        raise UsageError(
            f"attention with query {tuple(query.shape)} and key {tuple(key.shape)} can't be measured; "
            "both must be (batch, heads, tokens, width)"
        )
    batch, heads, num_queries, width = query.shape
    if key.shape[0] != batch or key.shape[3] != width or heads % key.shape[1]:
        raise UsageError(
            f"query {tuple(query.shape)} doesn't fit key {tuple(key.shape)}: batch and width must be equal and the "
            "query heads a multiple of the key heads"
        )
    target = (batch, heads, num_queries, key.shape[2])
    if attn_mask is not None and not _broadcasts(tuple(attn_mask.shape), target):
        raise UsageError(f"attn_mask {tuple(attn_mask.shape)} doesn't broadcast to scores {target}; reshape it")
    if valid is not None and valid.shape != (batch, key.shape[2]):
        raise UsageError(
            f"valid has shape {tuple(valid.shape)} and the keys {(batch, key.shape[2])} (batch, tokens); "
            "pass the mask of the very batch that the model runs on"
        )
    if valid is not None and num_queries > key.shape[2]:
        raise UsageError(
            f"{num_queries} queries look at {key.shape[2]} keys: that is cross-attention, where `valid` doesn't say "
            "which queries are padding; measure a decoder-only model, or leave `valid` out"
        )
    if block_size is not None and block_size < 1:
        raise UsageError(f"block_size is {block_size}; it must be at least 1")


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    return all(size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(target), strict=False))

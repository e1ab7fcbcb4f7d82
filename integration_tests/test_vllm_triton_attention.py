"""vLLM's Triton attention on the sequences of a block-causal step, in Triton's interpreter or on a GPU."""

import numpy as np
import torch
from torch.nn import functional as F
from vllm_engine import prepare_vllm

prepare_vllm()

from vllm.v1.attention.ops.triton_unified_attention import unified_attention  # noqa: E402

from sinkprune_plugin.models.block_attention import context_mask  # noqa: E402
from sinkprune_plugin.vllm.query_cuts import cut_queries  # noqa: E402

PAGE, HEADS, KEY_VALUE_HEADS, WIDTH = 16, 4, 2, 32
# Two prompts of 45 and 70 tokens, 16 of the second read before, and a block of 8 after 24 tokens.
COMPUTED, QUERY, BLOCK = (0, 16, 24), (45, 54, 8), (8, 8, 8)


def test_sequences_that_share_pages_give_the_attention_of_the_mask():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    ends = [done + query for done, query in zip(COMPUTED, QUERY, strict=True)]
    q, k, v = (
        [torch.randn(end, heads, WIDTH, generator=generator) for end in ends]
        for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)
    )
    # Pages of the requests in turn, the first one unused.
    longest = max(-(-end // PAGE) for end in ends)
    table = 1 + torch.arange(longest)[None] * len(ends) + torch.arange(len(ends))[:, None]
    caches = torch.full((2, 1 + table.numel(), PAGE, KEY_VALUE_HEADS, WIDTH), torch.nan)
    for number, end in enumerate(ends):
        place = torch.arange(end)
        for cache, content in zip(caches, (k[number], v[number]), strict=True):
            cache[table[number, place // PAGE], place % PAGE] = content
    cuts = cut_queries(*(np.array(numbers, np.int64) for numbers in (COMPUTED, QUERY, BLOCK)))
    queries = torch.cat([each[done:] for each, done in zip(q, COMPUTED, strict=True)]).to(device)
    found = torch.empty_like(queries)
    # What a page holds beyond its sequence is never seen, but multiplied by zero.
    caches = caches.nan_to_num(1e4).to(device)
    unified_attention(
        queries,
        *caches,
        found,
        cu_seqlens_q=torch.from_numpy(cuts.starts).int().to(device),
        max_seqlen_q=cuts.widest,
        seqused_k=torch.from_numpy(cuts.ends).int().to(device),
        max_seqlen_k=max(ends),
        softmax_scale=WIDTH**-0.5,
        causal=False,
        window_size=(-1, -1),
        block_table=table[cuts.request].int().to(device),
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
    )
    expected = []
    for number, (done, end, block) in enumerate(zip(COMPUTED, ends, BLOCK, strict=True)):
        heads = (x[number].transpose(0, 1) for x in (q, k, v))
        whole = F.scaled_dot_product_attention(
            *heads, attn_mask=context_mask(end, block, "block_causal"), enable_gqa=True
        )
        expected.append(whole.transpose(0, 1)[done:])
    # float32 sums in another order; on a GPU products have the 10 bits of TF32.
    close = {"rtol": 2e-2, "atol": 2e-2} if device == "cuda" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.cpu(), torch.cat(expected), **close)

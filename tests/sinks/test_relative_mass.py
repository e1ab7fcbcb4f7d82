"""Attention mass relative to that of uniform attention: masks alone make no sinks."""

import pytest
import torch
from torch.nn import functional as F

from sinkprune_plugin.models.block_attention import context_mask, joint_mask, open_block_mask
from sinkprune_plugin.sinks import capture_attention_mass, soft_sink_mask


def captured(mask, queries, valid=None, relative=True, is_causal=False, heads=3):
    """Mass of one layer whose queries are ``queries`` times the keys' first element."""
    batch, tokens = queries.shape
    q = queries[:, None, :, None].expand(batch, heads, tokens, 4).contiguous()
    k = torch.zeros_like(q)
    k[..., 0] = torch.linspace(-1, 1, tokens)
    with capture_attention_mass(valid, relative=relative) as capture:
        F.scaled_dot_product_attention(q, k, k, attn_mask=mask, is_causal=is_causal)
    return capture.mass


MASKS = {
    "causal": lambda: context_mask(64, 8, "causal")[None, None],
    "block-causal": lambda: context_mask(64, 8, "block_causal")[None, None],
    "an open block": lambda: open_block_mask(64, 8, "causal")[:, None],
    "clean and noisy side by side": lambda: joint_mask(64, 8, "causal")[:, None],
    "additive": lambda: torch.zeros(64, 64).masked_fill(~context_mask(64, 8, "causal"), -torch.inf)[None, None],
}


@pytest.mark.parametrize("name", MASKS)
def test_uniform_attention_gives_no_sinks(name):
    mask = MASKS[name]()
    nothing = torch.zeros(2, mask.shape[-1])
    mass = captured(mask, nothing)
    # Sums of at most 120 float32 fractions.
    torch.testing.assert_close(mass, torch.full_like(mass, 3.0), rtol=1e-5, atol=0)
    assert soft_sink_mask(mass).max() <= 0.5 + 1e-3
    # The test can fail: without the division, early keys are far above the others.
    raw = captured(mask, nothing, relative=False)
    assert soft_sink_mask(raw).max() > 0.6


def test_torch_s_own_causal_flag_and_padding():
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[1, 40:] = False
    mass = captured(None, torch.zeros(2, 64), valid, is_causal=True)
    torch.testing.assert_close(mass[valid], torch.full_like(mass[valid], 3.0), rtol=1e-5, atol=0)
    assert not mass[~valid].any()


def test_a_key_that_all_look_at_is_a_sink_wherever_it_is():
    for place in (0, 30, 62):
        q = torch.zeros(1, 1, 64, 4)
        q[..., 0] = 9.0
        k = torch.zeros(1, 1, 64, 4)
        k[0, 0, place, 0] = 1.0
        with capture_attention_mass(relative=True) as capture:
            F.scaled_dot_product_attention(q, k, k, attn_mask=MASKS["an open block"]())
        assert (soft_sink_mask(capture.mass)[0] > 0.5).nonzero().flatten().tolist() == [place]


def test_without_a_mask_between_tokens_nothing_changes():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 16, generator=generator)
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[0, :3] = False
    for mask in (None, valid[:, None, None, :]):
        assert torch.equal(captured(mask, queries), captured(mask, queries, relative=False))

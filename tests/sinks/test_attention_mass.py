"""Attention mass: streamed column sums against a plain softmax, and the capture around a running model."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sinks import attention_column_sums, capture_attention_mass, report_attention


def plain_column_sums(query, key, *, attn_mask=None, is_causal=False, scale=None, valid=None):
    """The formula, written with the whole (B, H, T, T) tensor in float64."""
    batch, heads, num_queries, width = query.shape
    num_keys = key.shape[2]
    key = key.double().repeat_interleave(heads // key.shape[1], dim=1)
    scores = query.double() @ key.transpose(-1, -2) * (1 / math.sqrt(width) if scale is None else scale)
    allowed = torch.ones(batch, heads, num_queries, num_keys, dtype=torch.bool)
    if is_causal:
        allowed &= torch.ones(num_queries, num_keys, dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed &= attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask.double().clamp(min=-1e6)
        allowed &= attn_mask > torch.finfo(attn_mask.dtype).min
    if valid is not None:
        allowed &= valid[:, None, None, :]
    probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    if valid is not None:
        probabilities = probabilities * valid[:, None, num_keys - num_queries :, None]
    return probabilities.sum(dim=(1, 2)).float()


def projections(generator, batch, heads, kv_heads, num_queries, num_keys, width=8, dtype=torch.float32):
    # Laid out as a model makes them: (B, T, H, D) transposed, so not contiguous.
    query = torch.randn(batch, num_queries, heads, width, generator=generator).transpose(1, 2)
    key = 2 * torch.randn(batch, num_keys, kv_heads, width, generator=generator).transpose(1, 2)
    return query.to(dtype), key.to(dtype)


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    num_keys=st.integers(1, 40),
    fewer_queries=st.integers(0, 39),
    block_size=st.one_of(st.none(), st.integers(1, 45)),
    mask_kind=st.sampled_from(["none", "bool", "least", "additive", "half"]),
    mask_heads=st.booleans(),
    is_causal=st.booleans(),
    padding=st.sampled_from(["none", "left", "right", "scattered"]),
    scale=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_the_plain_softmax(
    seed, batch, kv_heads, groups, num_keys, fewer_queries, block_size, mask_kind, mask_heads, is_causal, padding,
    scale, dtype,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    heads, num_queries = kv_heads * groups, max(num_keys - fewer_queries, 1)
    query, key = projections(generator, batch, heads, kv_heads, num_queries, num_keys, dtype=dtype)
    mask = None
    if mask_kind != "none":
        shape = (batch, heads if mask_heads else 1, num_queries, num_keys)
        mask = torch.rand(shape, generator=generator) < 0.7
        if mask_kind == "half":
            mask = torch.where(mask, 0.0, -torch.inf).to(dtype)
        elif mask_kind != "bool":
            bias = torch.randn(shape, generator=generator)
            mask = torch.where(mask, bias, -torch.inf if mask_kind == "additive" else torch.finfo(torch.float32).min)
    valid = None
    if padding != "none":
        lengths = torch.randint(1, num_keys + 1, (batch, 1), generator=generator)
        valid = torch.arange(num_keys) < lengths
        valid = valid.flip(1) if padding == "left" else valid
        valid = torch.rand(batch, num_keys, generator=generator) < 0.6 if padding == "scattered" else valid
    options = {"attn_mask": mask, "is_causal": is_causal, "scale": scale, "valid": valid}
    mass = attention_column_sums(query, key, block_size=block_size, **options)
    assert mass.dtype == torch.float32
    # Float32 rounding of up to 9 * 40 probabilities of at most 1. Inputs are the same numbers on both sides, also in
    # bfloat16, so its rounding doesn't enter.
    torch.testing.assert_close(mass, plain_column_sums(query, key, **options), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("budget", [64, 1000, 5000])
def test_blocks_over_rows_heads_and_queries(monkeypatch, budget):
    # The budgets reach one query of one head, some heads, and several batch rows in a block.
    monkeypatch.setattr("sinkprune_plugin.sinks.column_sums._CPU_BLOCK_ELEMENTS", budget)
    query, key = projections(torch.Generator().manual_seed(0), 5, 6, 3, 12, 12)
    valid = torch.arange(12) < torch.tensor([[12], [5], [9], [1], [12]])
    mask = torch.rand(5, 6, 12, 12, generator=torch.Generator().manual_seed(1)) < 0.8
    mass = attention_column_sums(query, key, attn_mask=mask, valid=valid)
    torch.testing.assert_close(mass, plain_column_sums(query, key, attn_mask=mask, valid=valid), rtol=2e-5, atol=2e-5)


def test_mass_adds_up_to_the_queries():
    query, key = projections(torch.Generator().manual_seed(0), 2, 4, 2, 300, 300)
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[1, 250:] = False
    mass = attention_column_sums(query, key, valid=valid)
    # Every real query hands out exactly 1 in each head; float32 sums of 300 numbers.
    torch.testing.assert_close(mass.sum(dim=1), torch.tensor([4 * 300.0, 4 * 250.0]), rtol=1e-5, atol=0)
    assert (mass[1, 250:] == 0).all()


class _LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                # The storage, so that a small view of something large is seen too.
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("kind", ["none", "causal", "mask", "valid"])
def test_never_makes_a_square_tensor(kind):
    heads, tokens, block = 4, 256, 16
    query, key = projections(torch.Generator().manual_seed(0), 1, heads, 2, tokens, tokens)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril() if kind == "mask" else None
    valid = torch.arange(tokens)[None] < 200 if kind == "valid" else None
    with _LargestTensor() as largest:
        attention_column_sums(query, key, attn_mask=mask, is_causal=kind == "causal", valid=valid, block_size=block)
    # Two buffers of (H, block, T) in one allocation, and neither (H, T, T) nor even one head's (T, T).
    assert largest.numel <= max(2 * heads * block * tokens, tokens * tokens // 4)
    assert largest.numel < tokens * tokens


def test_default_block_is_an_eighth_of_the_square_tensor():
    query, key = projections(torch.Generator().manual_seed(0), 1, 16, 16, 1024, 1024)
    with _LargestTensor() as largest:
        attention_column_sums(query, key)
    assert largest.numel <= 16 * 1024 * 1024 // 8


def test_nan_shows_unless_it_is_padding():
    query, key = projections(torch.Generator().manual_seed(0), 1, 2, 2, 10, 10)
    valid = torch.arange(10)[None] < 8
    expected = attention_column_sums(query, key, valid=valid)
    query[:, :, 8:], key[:, :, 8:] = torch.nan, torch.nan
    torch.testing.assert_close(attention_column_sums(query, key, valid=valid), expected)
    query[0, 0, 3] = torch.nan
    assert attention_column_sums(query, key, valid=valid).isnan().any()


def test_autocast_does_not_lower_the_precision():
    query, key = projections(torch.Generator().manual_seed(0), 1, 2, 2, 50, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mass = attention_column_sums(query, key)
    assert torch.equal(mass, attention_column_sums(query, key))


@pytest.mark.parametrize(
    ("query", "key", "options", "message"),
    [
        ((2, 5, 8), (2, 5, 8), {}, "batch, heads, tokens, width"),
        ((2, 3, 5, 8), (2, 2, 5, 8), {}, "multiple of the key heads"),
        ((2, 2, 5, 8), (2, 2, 5, 4), {}, "doesn't fit key"),
        ((2, 2, 5, 8), (2, 2, 5, 8), {"attn_mask": torch.zeros(2, 1, 5, 4)}, "doesn't broadcast"),
        ((2, 2, 5, 8), (2, 2, 5, 8), {"valid": torch.ones(2, 4, dtype=torch.bool)}, "valid has shape"),
        ((2, 2, 7, 8), (2, 2, 5, 8), {"valid": torch.ones(2, 5, dtype=torch.bool)}, "cross-attention"),
        ((2, 2, 5, 8), (2, 2, 5, 8), {"block_size": 0}, "block_size is 0"),
    ],
)
def test_wrong_input_is_named(query, key, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        attention_column_sums(torch.zeros(query), torch.zeros(key), **options)
    assert "\n" not in str(caught.value)


class ToyAttention(nn.Module):
    """Two layers of attention that call torch in the ways that modelling code does."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, x, **options):
        for layer in self.layers:
            query, key, value = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in layer(x).chunk(3, dim=-1))
            x = x + self.call(query, key, value, **options).transpose(1, 2).flatten(2)
        return x


def by_keyword(query, key, value, **options):
    return F.scaled_dot_product_attention(query=query, key=key, value=value, **options)


def by_position(query, key, value, attn_mask=None, is_causal=False):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal)


def grouped(query, key, value, **options):
    return F.scaled_dot_product_attention(query, key[:, :2], value[:, :2], enable_gqa=True, **options)


def by_hand(query, key, value, attn_mask=None, is_causal=False):
    report_attention(query, key, attn_mask=attn_mask, is_causal=is_causal)
    scores = query @ key.transpose(-1, -2) / 2
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return scores.softmax(dim=-1) @ value


@pytest.fixture
def inputs():
    return torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("call", [by_keyword, by_position, grouped, by_hand])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_capture_sees_every_way_to_call(call, options, inputs):
    seen = []

    def recorded(query, key, value, **options):
        seen.append((query, key[:, :2] if call is grouped else key))
        return call(query, key, value, **options)

    with capture_attention_mass() as capture:
        ToyAttention(recorded)(inputs, **options)
    expected = [plain_column_sums(query, key, **options) for query, key in seen]
    assert len(capture.layers) == 2
    for layer, wanted in zip(capture.layers, expected, strict=True):
        torch.testing.assert_close(layer, wanted, rtol=2e-5, atol=2e-5)  # float32 rounding
    assert torch.equal(capture.mass, capture.layers[0] + capture.layers[1])
    assert not capture.mass.requires_grad


def test_output_is_untouched_and_capture_ends_with_the_block(inputs):
    model = ToyAttention(by_keyword)
    expected = model(inputs)
    with capture_attention_mass() as capture:
        assert torch.equal(model(inputs), expected)
    mass = capture.mass
    model(inputs)
    assert capture.mass is mass


def test_running_mass_can_be_read_between_layers(inputs):
    model = ToyAttention(by_keyword)
    readings = []
    with capture_attention_mass() as capture:
        model.layers[1].register_forward_pre_hook(lambda *_: readings.append(capture.mass))
        model(inputs)
    assert torch.equal(readings[0], capture.layers[0])


def test_padding_as_in_a_shorter_sequence(inputs):
    model = ToyAttention(by_keyword)
    with capture_attention_mass() as short:
        model(inputs[:, :9])
    padded = torch.cat([inputs[:, :9], torch.full((2, 5, 16), 7.0)], dim=1)
    valid = (torch.arange(14) < 9).expand(2, 14)
    with capture_attention_mass(valid=valid.long()) as capture:
        model(padded, attn_mask=valid[:, None, None, :])
    torch.testing.assert_close(capture.mass[:, :9], short.mass, rtol=2e-5, atol=2e-5)  # float32 rounding
    assert (capture.mass[:, 9:] == 0).all()


def test_reset_starts_afresh(inputs):
    model = ToyAttention(by_keyword)
    with capture_attention_mass() as capture:
        model(inputs)
        first = capture.mass
        capture.reset()
        assert capture.layers == []
        model(inputs[:, :5])
    assert first.shape == (2, 12)
    assert capture.mass.shape == (2, 5)


def test_two_captures_see_the_same(inputs):
    with capture_attention_mass() as outer, capture_attention_mass(block_size=3) as inner:
        ToyAttention(by_keyword)(inputs)
    torch.testing.assert_close(outer.mass, inner.mass, rtol=2e-5, atol=2e-5)  # other block sizes, other order of sums
    assert len(outer.layers) == 2


def test_nothing_intercepted_names_the_remedies(inputs):
    remedies = r'attn_implementation="sdpa".*intercept_attention_interface'
    with pytest.raises(UsageError, match=remedies), capture_attention_mass() as capture:
        nn.Linear(16, 16)(inputs)
    with pytest.raises(UsageError, match="no attention was intercepted"):
        _ = capture.mass


def test_an_error_of_the_model_is_not_covered_up(inputs):
    with pytest.raises(RuntimeError, match="the model's own"), capture_attention_mass():
        raise RuntimeError("the model's own")


def test_growing_cache_is_refused(inputs):
    model = ToyAttention(by_keyword)
    with capture_attention_mass():
        model(inputs)
        with pytest.raises(UsageError, match=r"\(2, 5\).*\(2, 12\).*reset"):
            model(inputs[:, :5])


def test_report_attention_without_a_capture_only_attends():
    query = torch.ones(1, 1, 2, 4)
    assert report_attention(query, query) is None
    assert report_attention(query, query, attend=lambda: "attended") == "attended"


def test_attention_inside_a_reported_one_counts_once(inputs):
    def wrapped(query, key, value):
        return report_attention(query, key, attend=lambda: by_keyword(query, key, value))

    with capture_attention_mass() as capture:
        ToyAttention(wrapped)(inputs)
    assert len(capture.layers) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_on_an_accelerator(dtype):
    query, key = projections(torch.Generator().manual_seed(0), 2, 4, 2, 700, 700, dtype=dtype)
    valid = torch.arange(700) < torch.tensor([[700], [300]])
    mass = attention_column_sums(query.cuda(), key.cuda(), valid=valid.cuda(), block_size=128)
    # TF32 is off by default, so the products round as on CPU, in another order.
    torch.testing.assert_close(mass.cpu(), attention_column_sums(query, key, valid=valid), rtol=1e-4, atol=1e-4)

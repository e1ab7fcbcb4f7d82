"""Attention mass on transformers' own models, autoregressive ones, through each of its attention implementations."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sinks import capture_attention_mass, intercept_attention_interface, sink_report

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
CLASSES = [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)]
# Float32 sums of 3 layers, 4 heads and 20 queries in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def make(model_class, config_class, implementation="sdpa", dtype=torch.float32):
    torch.manual_seed(0)
    model = model_class._from_config(config_class(**SHAPE), attn_implementation=implementation, dtype=dtype)
    return model.eval()


@pytest.fixture
def inputs():
    return torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))


def attention_weights(model, inputs, **options):
    """(B, T) sums of the probabilities that eager attention itself returns, all queries."""
    with torch.no_grad():
        attentions = model(inputs, output_attentions=True, **options).attentions
    return torch.stack(attentions).sum(dim=(0, 2, 3))


@pytest.mark.parametrize(("model_class", "config_class"), CLASSES)
def test_autoregressive_models_through_sdpa(model_class, config_class, inputs):
    expected = attention_weights(make(model_class, config_class, "eager"), inputs)
    with torch.no_grad(), capture_attention_mass() as capture:
        make(model_class, config_class)(inputs)
    torch.testing.assert_close(capture.mass, expected, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_an_autoregressive_model(side, inputs):
    model = make(LlamaForCausalLM, LlamaConfig)
    with torch.no_grad(), capture_attention_mass() as short:
        model(inputs[:, :15])
    real = torch.arange(20) < 15 if side == "right" else torch.arange(20) >= 5
    padded = torch.zeros_like(inputs)
    padded[:, real] = inputs[:, :15]
    mask = real.long().expand(2, 20)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad(), capture_attention_mass(valid=mask) as capture:
        model(padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(capture.mass[:, real], short.mass, **CLOSE)
    assert (capture.mass[:, ~real] == 0).all()


def test_mass_of_a_bfloat16_model_is_summed_in_float32(inputs):
    model = make(LlamaForCausalLM, LlamaConfig, dtype=torch.bfloat16)
    with torch.no_grad(), capture_attention_mass() as capture:
        model(inputs)
    assert capture.mass.dtype == torch.float32
    # Sums of float32 probabilities, though queries and keys are bfloat16: exactly one per query up to float32 rounding.
    torch.testing.assert_close(capture.mass.sum(dim=1), torch.full((2,), 3 * 4 * 20.0), rtol=1e-5, atol=0)


def test_eager_attention_is_an_error_that_names_the_remedies(inputs):
    model = make(LlamaForCausalLM, LlamaConfig, "eager")
    remedies = "attn_implementation.*intercept_attention_interface"
    with torch.no_grad(), pytest.raises(UsageError, match=remedies), capture_attention_mass():
        model(inputs)


@pytest.mark.parametrize(("model_class", "config_class"), CLASSES)
def test_eager_attention_through_the_interface(model_class, config_class, inputs):
    model = make(model_class, config_class, "eager")
    mask = torch.ones_like(inputs)
    mask[1, 16:] = 0
    before = dict(ALL_ATTENTION_FUNCTIONS)
    with torch.no_grad():
        logits = model(inputs, attention_mask=mask).logits
        with intercept_attention_interface(), capture_attention_mass() as capture:
            assert torch.equal(model(inputs, attention_mask=mask).logits, logits)
    assert len(capture.layers) == 3
    torch.testing.assert_close(capture.mass, attention_weights(model, inputs, attention_mask=mask), **CLOSE)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def fused_like(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Stands in for a fused kernel: two-dimensional padding mask, causality of its own."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    bias = torch.full((query.shape[2], key.shape[2]), -torch.inf).triu(1)[None, None]
    if attention_mask is not None:
        bias = bias.masked_fill(attention_mask[:, None, None, :] == 0, -torch.inf)
    heads = (query @ key.transpose(2, 3) * scaling + bias).softmax(dim=-1) @ value
    return heads.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("padded", [False, True])
def test_fused_kernel_through_the_interface(padded, inputs, monkeypatch):
    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "fused_like", fused_like)
    mask = torch.ones_like(inputs)
    if padded:
        mask[1, 16:] = 0
    expected = attention_weights(make(LlamaForCausalLM, LlamaConfig, "eager"), inputs, attention_mask=mask)
    model = make(LlamaForCausalLM, LlamaConfig, "fused_like")
    # The mask that flash attention gets; transformers makes it for kernels that it knows by name.
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: mask)
    with torch.no_grad(), intercept_attention_interface(), capture_attention_mass() as capture:
        model(inputs, attention_mask=mask)
    torch.testing.assert_close(capture.mass, expected, **CLOSE)


def block_masked(module, query, key, value, attention_mask, **kwargs):
    return torch.zeros_like(query).transpose(1, 2), None


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({"attention_mask": object()}, "object"),
        ({"softcap": 30.0}, "softcap"),
        ({"sliding_window": 4}, "sliding_window"),
    ],
)
def test_what_a_kernel_does_by_itself_is_refused(attributes, named, inputs, monkeypatch):
    # As flex attention gets a BlockMask, Gemma 2 a soft cap and Mistral a window.
    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "fused_like", block_masked)
    attention = make(LlamaForCausalLM, LlamaConfig).model.layers[0].self_attn
    query = torch.ones(1, 4, 20, 8)
    arguments = {"attention_mask": None, **attributes}
    with intercept_attention_interface():
        kernel = ALL_ATTENTION_FUNCTIONS["fused_like"]
        with pytest.raises(UsageError, match=f"fused_like attention of LlamaAttention uses .*{named}.*sdpa"):
            kernel(attention, query, query, query, **arguments)
        kernel(attention, query, query, query, attention_mask=None, sliding_window=20)


def test_report_of_an_autoregressive_model(inputs, tmp_path):
    eager = sink_report(make(LlamaForCausalLM, LlamaConfig, "eager"), None, inputs, tmp_path / "eager")
    sdpa = sink_report(make(LlamaForCausalLM, LlamaConfig), None, inputs, tmp_path / "sdpa")
    assert sdpa.family is None
    assert sdpa.observation.axis == "prefix"
    torch.testing.assert_close(eager.observation.mass, sdpa.observation.mass, **CLOSE)
    assert (tmp_path / "sdpa" / "sinks.png").is_file()

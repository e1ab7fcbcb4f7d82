"""The native LLaDA classes against a plain forward pass, over every option that they accept."""

import functools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from official_checkpoints import write_llada
from plain_forward import plain_llada
from safetensors import safe_open
from safetensors.torch import load_file
from whole_models import load_whole, random_ids

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.llada import LLaDAConfig, LLaDAModelLM, MMaDAModelLM

TINY = Path(__file__).parent.parent.parent / "sinkprune_plugin" / "assets" / "tiny-llada"
GOLDEN = Path(__file__).parent.parent / "fixtures" / "golden"

# Both sides compute in float32 with other orders of operations; logits are of size 1 to 20.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


load = functools.partial(load_whole, LLaDAModelLM)


@pytest.fixture(scope="module")
def tiny():
    return load(TINY)


@torch.no_grad()
def test_tiny_llada_logits_equal_the_plain_forward_on_the_golden_inputs(tiny):
    noisy = load_file(GOLDEN / "evaluation.safetensors")["noisy_ids"].long()
    ids = noisy[:2, ::3].flatten(0, 1)  # two windows at three noise levels each
    expected = plain_llada(load_file(TINY / "model.safetensors"), json.loads((TINY / "config.json").read_text()), ids)
    logits = tiny(ids).logits
    assert logits.dtype == torch.float32
    assert expected.abs().max() > 10  # a trained model's logits: the tolerance means something
    torch.testing.assert_close(logits, expected, **CLOSE)


OPTIONS = {
    "as published": {},
    "grouped queries": {"n_kv_heads": 2},
    "n_kv_heads left open": {"n_kv_heads": None},
    "one key head by multi_query_attention": {"n_kv_heads": None, "multi_query_attention": True},
    "one key head, said twice": {"n_kv_heads": 1, "multi_query_attention": True},
    "multi_query_attention denied": {"multi_query_attention": False},
    "bias everywhere": {"include_bias": True},
    "bias everywhere, norms follow": {"include_bias": True, "bias_for_layer_norm": None},
    "bias in q, k, v": {"include_qkv_bias": True},
    "bias in norms alone": {"bias_for_layer_norm": True},
    "norms without weights": {"layer_norm_with_affine": False},
    "tied": {"weight_tying": True},
    "tied with bias": {"weight_tying": True, "include_bias": True},
    "no padding rows": {"embedding_size": None},
    "MLP by ratio": {"mlp_hidden_size": None, "mlp_ratio": 2},
    "gelu": {"activation_type": "gelu"},
    "relu": {"activation_type": "relu"},
    "rotary in the model's dtype": {"rope_full_precision": False},
    "another theta and eps": {"rope_theta": 100.0, "rms_norm_eps": 0.1},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_each_option_equals_the_plain_forward(changes, tmp_path):
    config, tensors = write_llada(tmp_path, **changes)
    ids = random_ids(config["vocab_size"], 2, 9)
    logits = load(tmp_path)(ids).logits
    torch.testing.assert_close(logits, plain_llada(tensors, config, ids), **CLOSE)
    assert logits.shape[-1] == (config["embedding_size"] or config["vocab_size"])


@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 3),
    half_head=st.integers(1, 4),
    layers=st.integers(1, 2),
    include_bias=st.booleans(),
    tied=st.booleans(),
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=25)
@torch.no_grad()
def test_any_shape_with_padding_equals_the_plain_forward(
    tmp_path_factory, kv_heads, groups, half_head, layers, include_bias, tied, lengths, seed
):
    folder = tmp_path_factory.mktemp("llada")
    config, tensors = write_llada(
        folder,
        seed=seed,
        n_heads=kv_heads * groups,
        n_kv_heads=kv_heads,
        d_model=2 * half_head * kv_heads * groups,
        n_layers=layers,
        include_bias=include_bias,
        weight_tying=tied,
    )
    ids = random_ids(config["vocab_size"], len(lengths), max(lengths), seed=seed)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    logits = load(folder)(ids, attention_mask=valid.long()).logits
    torch.testing.assert_close(logits[valid], plain_llada(tensors, config, ids, valid)[valid], **CLOSE)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding_changes_nothing_for_the_real_tokens(tiny, side):
    ids = random_ids(2048, 1, 20)
    alone = tiny(ids).logits
    for padding in (random_ids(2048, 1, 12, seed=1), random_ids(2048, 1, 12, seed=2)):
        parts = (ids, padding) if side == "right" else (padding, ids)
        mask = torch.cat([torch.full_like(p, p is ids) for p in parts], dim=1)
        logits = tiny(torch.cat(parts, dim=1), attention_mask=mask).logits
        # Left padding moves the positions, and rotary embedding is exact in their differences only up to rounding.
        torch.testing.assert_close(logits[:, mask[0].bool()], alone, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_attention_goes_both_ways(tiny):
    ids = random_ids(2048, 1, 16)
    changed = ids.clone()
    changed[0, -1] += 1
    assert (tiny(ids).logits - tiny(changed).logits)[0, 0].abs().max() > 1e-3


@torch.no_grad()
def test_a_mask_of_ones_and_four_dimensional_masks_mean_the_same_as_they_should(tiny):
    ids = random_ids(2048, 2, 10)
    plain = tiny(ids).logits
    torch.testing.assert_close(tiny(ids, attention_mask=torch.ones_like(ids)).logits, plain, atol=0, rtol=0)
    valid = torch.ones_like(ids)
    valid[1, 7:] = 0
    padded = tiny(ids, attention_mask=valid).logits
    boolean = valid.bool()[:, None, None, :].expand(2, 1, 10, 10)
    added = torch.zeros(2, 1, 10, 10).masked_fill(~boolean, float("-inf"))
    for mask in (boolean, added):
        # Another kernel than for the broadcast mask may run; the logits are of size 10.
        torch.testing.assert_close(tiny(ids, attention_mask=mask).logits, padded, **CLOSE)


@torch.no_grad()
def test_embeddings_instead_of_ids_and_the_hidden_states(tiny):
    ids = random_ids(2048, 2, 10)
    output = tiny(ids, output_hidden_states=True, use_cache=False)
    assert output.past_key_values is None
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 10, 192)] * 7
    embedded = tiny.get_input_embeddings()(ids)
    assert torch.equal(output.hidden_states[0], embedded)
    assert torch.equal(tiny.get_output_embeddings()(output.hidden_states[-1]), output.logits)
    assert torch.equal(tiny(inputs_embeds=embedded).logits, output.logits)
    as_tuple = tiny(ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.logits)


@torch.no_grad()
def test_bfloat16_stays_near_float32_with_rotation_in_float32(tiny):
    model = LLaDAModelLM.from_pretrained(TINY)
    assert model.dtype == torch.bfloat16
    ids = random_ids(2048, 1, 256)
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    expected = tiny(ids).logits
    # 8 bits of mantissa through 6 blocks: errors of some percent of the logits' spread.
    assert (logits.float() - expected).std() < 0.05 * expected.std()


class _CaptureQueries(torch.overrides.TorchFunctionMode):
    """Keeps the first query that reaches scaled_dot_product_attention."""

    query = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention and self.query is None:
            self.query = args[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("full_precision", [True, False])
@torch.no_grad()
def test_rope_full_precision_decides_where_bfloat16_rounds(full_precision):
    config = LLaDAConfig.from_pretrained(TINY, rope_full_precision=full_precision)
    model = LLaDAModelLM.from_pretrained(TINY, config=config)
    ids = random_ids(2048, 1, 256)
    with _CaptureQueries() as capture:
        model(ids)
    block = model.model.transformer.blocks[0]
    unrotated = block.q_proj(block.attn_norm(model.get_input_embeddings()(ids))).unflatten(-1, (6, 32)).transpose(1, 2)
    angle = torch.arange(256.0)[:, None] * 500000.0 ** (-torch.arange(0, 32, 2) / 32)
    z = torch.complex(*unrotated.float().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    rounded_once = torch.cat((z.real, z.imag), dim=-1).bfloat16()
    equal = (capture.query == rounded_once).float().mean()
    # Rounded once, at the end, both ways of multiplying agree except for rare ties; with rounding at each step
    # about half of the elements differ in their last bit.
    assert (equal > 0.999) == full_precision


def test_dropout_acts_in_training_only(tmp_path):
    config, _ = write_llada(tmp_path, attention_dropout=0.5, residual_dropout=0.5, embedding_dropout=0.5)
    model = load(tmp_path)
    ids = random_ids(config["vocab_size"], 1, 8)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("changes", [{}, {"weight_tying": True}, {"include_bias": True, "n_kv_heads": 3}])
@torch.no_grad()
def test_saving_keeps_tensor_names_values_and_official_keys(changes, tmp_path):
    config, tensors = write_llada(tmp_path / "a", **changes)
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 1, "steps": 8, "temperature": 0.0}')
    model = load(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    changing = {"transformers_version", "torch_dtype"}
    assert {k: written[k] for k in config.keys() - changing} == {k: config[k] for k in config.keys() - changing}
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 1
    assert generation["steps"] == 8
    ids = random_ids(config["vocab_size"], 1, 8)
    assert torch.equal(load(tmp_path / "b")(ids).logits, model(ids).logits)


def test_tied_models_have_one_table_and_can_be_untied(tmp_path):
    write_llada(tmp_path, weight_tying=True)
    model = load(tmp_path)
    assert model.config.tie_word_embeddings is True
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.config.tie_word_embeddings = False  # the name by which other libraries untie
    assert model.config.weight_tying is False


def test_resizing_the_vocabulary_is_saved_consistently(tmp_path):
    write_llada(tmp_path / "a")
    model = load(tmp_path / "a")
    model.resize_token_embeddings(101, mean_resizing=False)
    model.save_pretrained(tmp_path / "b")
    assert load(tmp_path / "b").get_output_embeddings().weight.shape[0] == 101


def test_mmada_is_the_same_network_and_keeps_its_own_keys(tmp_path):
    from transformers import AutoModelForCausalLM

    config, tensors = write_llada(tmp_path / "a", model_type="mmada", codebook_size=8192, new_vocab_size=96)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert isinstance(model, MMaDAModelLM)
    ids = random_ids(config["vocab_size"], 2, 7)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain_llada(tensors, config, ids), **CLOSE)
    model.save_pretrained(tmp_path / "b")
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (written["model_type"], written["codebook_size"], written["new_vocab_size"]) == ("mmada", 8192, 96)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("block_type", "sequential"),
        ("block_group_size", 2),
        ("activation_type", "swiglu"),
        ("layer_norm_type", "default"),
        ("layer_norm_type", "gemma_rms"),
        ("rope", False),
        ("alibi", True),
        ("attention_layer_norm", True),
        ("input_emb_norm", True),
        ("scale_logits", True),
        ("clip_qkv", 8.0),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ],
)
def test_options_that_are_not_computed_are_refused_by_name(option, value, tmp_path):
    write_llada(tmp_path, **{option: value})
    with pytest.raises(UsageError, match=f"^{option}=.*not supported") as error:
        LLaDAModelLM.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"embedding_size": 89}, "embedding_size=89 .* vocab_size=90"),
        ({"n_heads": 5}, "d_model=48 over n_heads=5"),
        ({"n_heads": 16}, "heads of one even width"),
        ({"n_kv_heads": 4}, "n_heads=6 is no multiple of n_kv_heads=4"),
        ({"n_kv_heads": 2, "multi_query_attention": True}, "n_kv_heads=2 contradicts multi_query_attention=True"),
        ({"n_layers": "six"}, "n_layers='six' .* whole number of at least 1"),
        ({"n_layers": -1}, "n_layers=-1 .* whole number of at least 1"),
        ({"n_heads": 0}, "n_heads=0 .* whole number of at least 1"),
        ({"max_sequence_length": True}, "max_sequence_length=True .* whole number of at least 1"),
        ({"mlp_hidden_size": 2.5}, "mlp_hidden_size=2.5 .* whole number of at least 1"),
        ({"rope_theta": "x"}, "rope_theta='x' .* number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan .* number above 0"),
    ],
)
def test_wrong_and_contradicting_sizes_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        LLaDAModelLM(LLaDAConfig(**{"d_model": 48, "n_heads": 6, "vocab_size": 90, "n_layers": 1, **changes}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "neither was given"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "inputs_embeds": torch.zeros(1, 4, 192)}, "both was given"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "use_cache": True}, "use_cache=False"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "past_key_values": ()}, "past_key_values"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "output_attentions": True}, "output_attentions"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_bias": torch.zeros(1, 1, 4, 4)}, "bias"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 5)}, r"\(1, 5\)"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 1, 3, 4)}, "four-dim"),
        (
            {"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 1, 4, 4).long()},
            "int64",
        ),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": "causal"}, "'causal'"),
    ],
)
def test_calls_that_make_no_sense_are_refused(tiny, arguments, words):
    with pytest.raises(UsageError, match=words) as error:
        tiny(**arguments)
    assert "\n" not in str(error.value)


def test_generate_points_to_the_sampler(tiny):
    with pytest.raises(UsageError, match=r"sinkprune_plugin\.sampling\.denoise"):
        tiny.generate(torch.zeros(1, 4, dtype=torch.long))
    assert not tiny.can_generate()


def test_names_that_other_libraries_ask_the_configuration_for():
    config = LLaDAConfig(d_model=48, n_heads=6, n_layers=3, n_kv_heads=2, mlp_hidden_size=80, max_sequence_length=64)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (48, 6, 3)
    assert (config.num_key_value_heads, config.head_dim, config.intermediate_size) == (2, 8, 80)
    assert (config.max_position_embeddings, config.tie_word_embeddings) == (64, False)


def test_the_asset_has_only_official_names(tiny):
    with safe_open(TINY / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(tiny.state_dict())

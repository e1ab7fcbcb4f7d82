"""The native Dream classes against a plain forward pass, on random checkpoints in the official layout."""

import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from official_checkpoints import write_dream
from plain_forward import plain_dream
from safetensors.torch import load_file
from whole_models import load_whole, random_ids

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.dream import DreamConfig, DreamModel

# Both sides compute in float32 with other orders of operations; logits are of size 1.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


load = functools.partial(load_whole, DreamModel)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dream")
    config, tensors = write_dream(folder)
    return folder, config, tensors, load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 7},
        {"tie_word_embeddings": True},
        {"rope_theta": 50.0, "rms_norm_eps": 0.1},
        {"rope_scaling": {"type": "default"}},
    ],
)
@torch.no_grad()
def test_logits_equal_the_plain_forward(changes, tmp_path):
    config, tensors = write_dream(tmp_path, **changes)
    ids = random_ids(config["vocab_size"], 2, 9)
    logits = load(tmp_path)(ids).logits
    torch.testing.assert_close(logits, plain_dream(tensors, config, ids), **CLOSE)


@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 3),
    half_head=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    stretch=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=25)
@torch.no_grad()
def test_any_shape_with_padding_and_positions_equals_the_plain_forward(
    tmp_path_factory, kv_heads, groups, half_head, lengths, stretch, seed
):
    folder = tmp_path_factory.mktemp("dream")
    config, tensors = write_dream(
        folder,
        seed=seed,
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        hidden_size=2 * half_head * kv_heads * groups,
    )
    ids = random_ids(config["vocab_size"], len(lengths), max(lengths), seed=seed)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    # Each row spaced differently: a shift alone would change nothing, rotary embedding sees differences of positions.
    positions = torch.arange(max(lengths)) * (1 + stretch + torch.arange(len(lengths))[:, None])
    logits = load(folder)(ids, valid.long(), positions).logits
    torch.testing.assert_close(logits[valid], plain_dream(tensors, config, ids, valid, positions)[valid], **CLOSE)


@torch.no_grad()
def test_masks_as_the_official_sampler_passes_them(checkpoint):
    _, config, _, model = checkpoint
    ids = random_ids(config["vocab_size"], 2, 9)
    assert torch.equal(model(ids, "full").logits, model(ids).logits)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :3] = False
    pairs = valid[:, None, :, None] & valid[:, None, None, :]
    positions = (valid.long().cumsum(-1) - 1).clamp(min=0)
    square = model(ids, pairs, positions).logits
    torch.testing.assert_close(square[valid], model(ids, valid, positions).logits[valid], **CLOSE)
    # Left padding with its own positions gives the logits of the sequence alone.
    torch.testing.assert_close(square[1, 3:], model(ids[1:, 3:]).logits[0], **CLOSE)


@torch.no_grad()
def test_use_cache_in_the_configuration_is_ignored_and_in_the_call_refused(checkpoint):
    _, config, _, model = checkpoint
    ids = random_ids(config["vocab_size"], 1, 9)
    assert config["use_cache"] is True
    assert model(ids, use_cache=False).past_key_values is None
    with pytest.raises(UsageError, match="use_cache=False"):
        model(ids, use_cache=True)


@torch.no_grad()
def test_embeddings_instead_of_ids_and_the_hidden_states(checkpoint):
    _, config, _, model = checkpoint
    ids = random_ids(config["vocab_size"], 2, 9)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == config["num_hidden_layers"] + 1
    assert torch.equal(model.get_output_embeddings()(output.hidden_states[-1]), output.logits)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, output.logits)


@torch.no_grad()
def test_saving_keeps_tensor_names_values_and_official_keys(checkpoint, tmp_path):
    folder, config, tensors, model = checkpoint
    # The official file's content: invalid by transformers' own rules (temperature 0 without sampling), yet to be kept.
    generation = {"alg": "origin", "alg_temp": None, "eps": 0.001, "eos_token_id": 1, "steps": 512, "temperature": 0.0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    load(folder).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    written = json.loads((tmp_path / "config.json").read_text())
    changing = {"transformers_version", "torch_dtype"}
    assert {k: written.get(k, "missing") for k in config.keys() - changing} == {
        k: config[k] for k in config.keys() - changing
    }
    assert "rope_parameters" not in written
    kept = json.loads((tmp_path / "generation_config.json").read_text())
    assert {key: kept.get(key) for key in generation} == generation
    ids = random_ids(config["vocab_size"], 1, 8)
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)


def test_rotary_keys_as_transformers_5_writes_them():
    config = DreamConfig(rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    assert (config.rope_theta, config.rope_scaling) == (5.0, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling=.*not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*not supported"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling=.*not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"num_attention_heads": 5}, "hidden_size=56 over num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None .* whole number of at least 1"),
        ({"rope_theta": "x"}, "rope_theta='x' .* number above 0"),
    ],
)
def test_options_that_are_not_computed_are_refused_by_name(changes, words):
    sizes = {"hidden_size": 56, "num_attention_heads": 7, "num_hidden_layers": 1, "vocab_size": 20}
    with pytest.raises(UsageError, match=words) as error:
        DreamModel(DreamConfig(**{**sizes, **changes}))
    assert "\n" not in str(error.value)


def test_generate_points_to_the_sampler(checkpoint):
    with pytest.raises(UsageError, match=r"sinkprune_plugin\.sampling\.denoise"):
        checkpoint[-1].generate(torch.zeros(1, 4, dtype=torch.long))

"""The native SDAR classes against a plain forward pass, on random official checkpoints."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from official_checkpoints import TRACE
from plain_llada2 import block_visible
from plain_sdar import plain_sdar
from sdar_checkpoints import write_sdar
from transformers import AutoModel, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from whole_models import check_saved, load_whole, random_ids

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.sdar import SDARConfig, SDARForCausalLM

# Both sides compute in float32 with other orders of operations; logits are of size 1.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}

load = functools.partial(load_whole, SDARForCausalLM)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdar")
    config, tensors = write_sdar(folder)
    return folder, config, tensors, load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4, "head_dim": 6},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"rms_norm_eps": 0.1, "rope_theta": 50.0},
    ],
)
@torch.no_grad()
def test_logits_equal_the_plain_forward(changes, tmp_path):
    config, tensors = write_sdar(tmp_path, **changes)
    ids = random_ids(config["vocab_size"], 20)
    expected = plain_sdar(tensors, config, ids, block_visible(20, 4))
    model = load(tmp_path)
    torch.testing.assert_close(model(ids[None]).logits[0], expected, **CLOSE)
    torch.testing.assert_close(model(ids[None], logits_to_keep=4).logits[0], expected[-4:], **CLOSE)


@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 3),
    half_head=st.integers(1, 4),
    block=st.integers(1, 6),
    blocks=st.integers(1, 4),
    stretch=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=20)
@torch.no_grad()
def test_any_shape_with_any_positions_equals_the_plain_forward(
    tmp_path_factory, kv_heads, groups, half_head, block, blocks, stretch, seed
):
    folder = tmp_path_factory.mktemp("sdar")
    config, tensors = write_sdar(
        folder,
        seed=seed,
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        head_dim=2 * half_head,
        block_size=block,
        num_hidden_layers=1,
    )
    length = block * blocks
    ids = random_ids(config["vocab_size"], length, seed=seed)
    positions = torch.arange(length) * (1 + stretch)
    expected = plain_sdar(tensors, config, ids, block_visible(length, block), positions)
    torch.testing.assert_close(load(folder)(ids[None], None, positions[None]).logits[0], expected, **CLOSE)


@torch.no_grad()
def test_a_causal_context_is_transformers_own_qwen3(checkpoint):
    """With a causal mask the network is Qwen3, as which the family began."""
    _, config, tensors, model = checkpoint
    ids = random_ids(config["vocab_size"], 2, 19)
    kept = {key: config[key] for key in Qwen3Config().to_dict() if key in config and key != "architectures"}
    rope = {"rope_type": "default", "rope_theta": float(config["rope_theta"])}
    other = Qwen3ForCausalLM(Qwen3Config(**kept | {"model_type": "qwen3", "rope_parameters": rope})).eval()
    other.load_state_dict(tensors)
    mask = torch.ones(19, 19, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(model(ids, mask).logits, other(ids).logits, **CLOSE)


def test_auto_classes_load_it_without_running_its_files(checkpoint):
    folder, *_ = checkpoint
    for auto_class in (AutoModel, AutoModelForCausalLM):
        assert type(auto_class.from_pretrained(folder)) is SDARForCausalLM
    assert not (folder / TRACE).exists()


def test_saving_keeps_tensor_names_values_and_official_keys(checkpoint, tmp_path):
    check_saved(load, checkpoint, tmp_path)


def test_how_it_is_corrupted(tmp_path):
    """Files without the two keys that the engines take from their callers."""
    write_sdar(tmp_path, drop=("block_size", "mask_token_id"), vocab_size=151936, hidden_size=4, intermediate_size=4)
    spec = resolve_diffusion(load(tmp_path).config)
    assert (spec.name, spec.block_length, spec.mask_token_id, spec.logit_shift) == ("sdar", 4, 151669, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling=.*linear"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
        ({"head_dim": 5}, "head_dim=5 is odd"),
        ({"block_size": 0}, "block_size=0 .* whole number of at least 1"),
    ],
)
def test_options_that_are_not_computed_are_refused_by_name(changes, words):
    sizes = {"hidden_size": 56, "num_attention_heads": 8, "num_hidden_layers": 1, "vocab_size": 20, "head_dim": 8}
    with pytest.raises(UsageError, match=words) as error:
        SDARForCausalLM(SDARConfig(**{**sizes, **changes}))
    assert "\n" not in str(error.value)

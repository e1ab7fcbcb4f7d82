"""The native Nemotron-Labs-Diffusion classes against a plain forward pass, on random official checkpoints."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nemotron_labs_checkpoints import write_nemotron_labs
from official_checkpoints import TRACE
from plain_nemotron_labs import frequencies, generation_visible, plain_nemotron_labs
from transformers import AutoModel, AutoModelForCausalLM, Ministral3Config, Ministral3ForCausalLM
from whole_models import check_saved, load_whole, random_ids

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.block_attention import joint_mask
from sinkprune_plugin.models.nemotron_labs import NemotronLabsDiffusionConfig, NemotronLabsDiffusionModel

# Both sides compute in float32 with other orders of operations; logits are of size 1.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}


load = functools.partial(load_whole, NemotronLabsDiffusionModel)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nemotron")
    config, tensors = write_nemotron_labs(folder)
    return folder, config, tensors, load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 8},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rms_norm_eps": 0.1, "head_dim": 10},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        # Without mscale the softmax's temperature isn't 1.
        {"rope_parameters": YARN},
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 2.0}},
    ],
)
@torch.no_grad()
def test_logits_equal_the_plain_forward(changes, tmp_path):
    config, tensors = write_nemotron_labs(tmp_path, **changes)
    # Beyond the original length of 16, where queries are scaled; the last block of 4 is open.
    ids = random_ids(config["vocab_size"], 39)
    expected = plain_nemotron_labs(tensors, config, ids, generation_visible(39, 4))
    model = load(tmp_path)
    torch.testing.assert_close(model(ids[None]).logits[0], expected, **CLOSE)
    torch.testing.assert_close(model(ids[None], logits_to_keep=4).logits[0], expected[-4:], **CLOSE)
    some = torch.tensor([0, 2])
    torch.testing.assert_close(model(ids[None], logits_to_keep=some).logits[0], expected[some], **CLOSE)


@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 3),
    half_head=st.integers(1, 4),
    block=st.integers(1, 9),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    left=st.booleans(),
    stretch=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=25)
@torch.no_grad()
def test_any_shape_with_padding_and_positions_equals_the_plain_forward(
    tmp_path_factory, kv_heads, groups, half_head, block, lengths, left, stretch, seed
):
    folder = tmp_path_factory.mktemp("nemotron")
    config, tensors = write_nemotron_labs(
        folder,
        seed=seed,
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        head_dim=2 * half_head,
        block_size=block,
        num_hidden_layers=1,
    )
    longest = max(lengths)
    ids = random_ids(config["vocab_size"], len(lengths), longest, seed=seed)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    valid = valid.flip(1) if left else valid
    # Each row spaced differently: a shift alone would change nothing, rotary embedding sees differences of positions.
    positions = torch.arange(longest) * (1 + stretch + torch.arange(len(lengths))[:, None])
    logits = load(folder)(ids, valid.long(), positions).logits
    for row, length in enumerate(lengths):
        real = valid[row]
        visible = generation_visible(length, min(block, length))
        expected = plain_nemotron_labs(tensors, config, ids[row, real], visible, positions[row, real])
        torch.testing.assert_close(logits[row, real], expected, **CLOSE)


@torch.no_grad()
def test_one_joint_pass_is_every_block_open_in_turn(checkpoint):
    """Clean and noisy tokens side by side: the noisy block's logits are those of a pass in which it alone is open."""
    _, config, _, model = checkpoint
    clean = random_ids(config["vocab_size"], 2, 12)
    noisy = random_ids(config["vocab_size"], 2, 12, seed=1)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    mask = joint_mask(12, 4, "causal")[:, None]
    logits = model(torch.cat([clean[:, :8], noisy], dim=1), mask, positions, logits_to_keep=12).logits
    for begin in (0, 4, 8):
        alone = model(torch.cat([clean[:, :begin], noisy[:, begin : begin + 4]], dim=1), logits_to_keep=4).logits
        torch.testing.assert_close(logits[:, begin : begin + 4], alone, **CLOSE)


@torch.no_grad()
def test_a_causal_context_is_transformers_own_ministral(checkpoint):
    """With a causal mask the network is Ministral 3, as which the family began."""
    _, config, tensors, model = checkpoint
    ids = random_ids(config["vocab_size"], 2, 39)
    kept = {key: config[key] for key in Ministral3Config().to_dict() if key in config and key != "architectures"}
    other = Ministral3ForCausalLM(Ministral3Config(**kept | {"model_type": "ministral3", "pad_token_id": None})).eval()
    names = {"diffusion_head.": "lm_head.", "encoder.": "model."}
    for old, new in names.items():
        tensors = {name.replace(old, new) if name.startswith(old) else name: t for name, t in tensors.items()}
    other.load_state_dict(tensors)
    mask = torch.ones(39, 39, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(model(ids, mask).logits, other(ids).logits, **CLOSE)


def test_frequencies_equal_transformers_yarn():
    """The plain reference itself, at the sizes of the published models."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for factor in (0.25, 16.0):
        rope = YARN | {"factor": factor, "original_max_position_embeddings": 16384, "rope_theta": 1e6}
        rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        config = NemotronLabsDiffusionConfig(rope_parameters=rope, head_dim=128)
        expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config)
        found, own = frequencies(128, rope)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert own == pytest.approx(magnitude)


def test_auto_classes_load_it_without_running_its_files(checkpoint):
    folder, *_ = checkpoint
    for auto_class in (AutoModel, AutoModelForCausalLM):
        assert type(auto_class.from_pretrained(folder)) is NemotronLabsDiffusionModel
    assert not (folder / TRACE).exists()


def test_saving_keeps_tensor_names_values_and_official_keys(checkpoint, tmp_path):
    check_saved(load, checkpoint, tmp_path)


@torch.no_grad()
def test_embeddings_instead_of_ids_and_the_hidden_states(checkpoint):
    _, config, _, model = checkpoint
    ids = random_ids(config["vocab_size"], 2, 9)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == config["num_hidden_layers"] + 1
    assert torch.equal(model.get_output_embeddings()(output.hidden_states[-1]), output.logits)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, output.logits)
    # The head is left out by what only looks at the network.
    assert model.base_model is model.encoder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": -1.0, "rope_theta": 1e4}}, "factor=-1.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta='x'"),
        ({"rope_parameters": YARN | {"llama_4_scaling_beta": "x"}}, "llama_4_scaling_beta='x'"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"dlm_paradigm": "autoregressive"}, "dlm_paradigm='autoregressive'"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
        ({"head_dim": 5}, "head_dim=5 is odd"),
        ({"block_size": 0}, "block_size=0 .* whole number of at least 1"),
    ],
)
def test_options_that_are_not_computed_are_refused_by_name(changes, words):
    sizes = {"hidden_size": 56, "num_attention_heads": 8, "num_hidden_layers": 1, "vocab_size": 20, "head_dim": 8}
    with pytest.raises(UsageError, match=words) as error:
        NemotronLabsDiffusionModel(NemotronLabsDiffusionConfig(**{**sizes, **changes}))
    assert "\n" not in str(error.value)

"""LLaDA2's network as vLLM modules: grouped routing, shared experts and partial rotation as in the native class."""

import json

import pytest
import torch
from fused_checkpoints import LAYOUTS, fuse
from official_checkpoints import write_llada2
from sparse_models import prune_2_of_4
from vllm_modules import forward_function, loader, tokens_of

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.block_sizes import keep_units
from sinkprune_plugin.models.llada2_moe import LLaDA2MoeModelLM

# One block holds all tokens, which all see each other then.
ONE_BLOCK = {"block_length": 64}
# A dense layer, and two whose 12 experts have become 8 in 4 groups and 12 still.
UNEQUAL = {"experts": [0, 8, 12], "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def load():
    with loader() as load:
        yield load


@pytest.fixture
def logits(monkeypatch):
    return forward_function(monkeypatch)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_k_dense_replace": 0},
        {"num_shared_experts": 2},
        {"num_shared_experts": None},
        {"use_qkv_bias": True, "use_bias": True},
        {"tie_word_embeddings": True},
        {"n_group": 1, "topk_group": 1},
        {"num_experts_per_tok": 1},
        {"partial_rotary_factor": 1.0},
        {"hidden_act": "gelu"},
        UNEQUAL,
    ],
    ids=lambda changes: " ".join(changes) or "official",
)
def test_logits_of_the_plain_model(changes, tmp_path, load, logits):
    config, _ = write_llada2(tmp_path, **ONE_BLOCK, **changes)
    tokens = tokens_of(config)
    with torch.no_grad():
        expected = LLaDA2MoeModelLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens[None]).logits[0]
    found = logits(*load(tmp_path), tokens)
    # float32 sums in another order (fused projections and experts, another attention kernel); logits of order 1.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.abs().max() > 0.5


def test_fewer_heads_and_channels(tmp_path, load, logits):
    """A dense layer that lost channels and heads, and one whose shared expert lost channels."""
    config, _ = write_llada2(tmp_path / "whole", **ONE_BLOCK)
    model = load_model(tmp_path / "whole", torch.float32)
    keep_units(model, 0, channels=torch.arange(40), heads=torch.tensor([0, 2]))
    keep_units(model, 1, channels=torch.arange(8, 24), heads=torch.tensor([2, 3]))
    model.save_pretrained(tmp_path / "small")
    tokens = tokens_of(config)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    torch.testing.assert_close(logits(*load(tmp_path / "small"), tokens), expected, rtol=1e-4, atol=1e-4)


def test_the_same_experts_are_chosen_in_bfloat16(tmp_path, load):
    """The native router computes in float32 whatever the model's dtype; so does this gate, and its bias stays whole."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    write_llada2(tmp_path / "float32", **ONE_BLOCK, **UNEQUAL)
    plain = LLaDA2MoeModelLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "bfloat16")
    model, config = load(tmp_path / "bfloat16", dtype="bfloat16")
    x = torch.randn(200, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    for layer in (1, 2):
        ours = model.model.layers[layer].mlp
        with torch.inference_mode(), set_current_vllm_config(config), set_forward_context(None, config):
            logits, _ = ours.gate(x)
            weights, experts = ours.experts.router.select_experts(x, logits)
            expected = plain.model.layers[layer].mlp.gate(x)
        assert logits.dtype == ours.gate.expert_bias.dtype == torch.float32
        order, expected_order = experts.long().sort(-1), expected.experts.sort(-1)
        assert torch.equal(order.values, expected_order.values)
        # float32 on both sides.
        torch.testing.assert_close(
            weights.gather(-1, order.indices), expected.weights.gather(-1, expected_order.indices), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("sparse_format", ["sparse-24-bitmask", "sparse-bitmask"])
def test_a_sparse_checkpoint_gives_the_logits_of_a_dense_one(sparse_format, tmp_path, load, logits):
    config, _ = write_llada2(tmp_path / "whole", **ONE_BLOCK, **UNEQUAL)
    prune_2_of_4(LLaDA2MoeModelLM.from_pretrained(tmp_path / "whole")).save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", sparse_format, progress=False)
    dense, sparse = (logits(*load(tmp_path / name), tokens_of(config)) for name in ("dense", "sparse"))
    assert torch.equal(sparse, dense)


@pytest.mark.parametrize("changes", [{}, UNEQUAL, {"use_qkv_bias": True, "use_bias": True}], ids=str)
def test_every_parameter_comes_from_the_checkpoint(changes, tmp_path, load):
    _, tensors = write_llada2(tmp_path, **changes)
    model, _ = load(tmp_path, load_format="dummy")
    assert model.checkpoint_names() == set(tensors)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "relu2"}, "hidden_act='relu2': vLLM's kernels for experts have silu, gelu"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"score_function": "softmax"}, "score_function='softmax'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling="),
        ({"num_experts": 10}, "decoder block 1 has 10 experts in n_group=4 groups"),
    ],
)
def test_options_that_are_not_computed(changes, words, tmp_path, load):
    write_llada2(tmp_path, **changes)
    with pytest.raises(UsageError, match=words):
        load(tmp_path)


@pytest.mark.parametrize(("stored", "said"), [(8, 12), (12, 8)])
def test_tensors_that_disagree_with_the_number_of_experts(stored, said, tmp_path, load):
    config, _ = write_llada2(tmp_path, num_experts=stored)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts": said}))
    with pytest.raises(UsageError, match=rf"^model\.layers\.1\.mlp\.gate\..* is for {stored} experts, .* says {said};"):
        load(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_experts_give_the_logits_of_separate_ones(layout, tmp_path, load, logits):
    config, _ = write_llada2(tmp_path, **ONE_BLOCK, **UNEQUAL)
    separate = logits(*load(tmp_path), tokens_of(config))
    fuse(tmp_path, layout)
    assert torch.equal(logits(*load(tmp_path), tokens_of(config)), separate)

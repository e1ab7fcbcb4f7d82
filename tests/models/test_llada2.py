"""The native LLaDA2 classes against a plain forward pass, on random checkpoints in the official layout."""

import functools
import json

import pytest
import torch
from official_checkpoints import TRACE, write_llada2
from plain_llada2 import block_visible, plain_llada2
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from whole_models import load_whole, random_ids

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.llada2_moe import LLaDA2MoeConfig, LLaDA2MoeModelLM
from sinkprune_plugin.models.sizes_in_config import BlockSizes, sizes_in_config

# Both sides compute in float32 with other orders of operations; logits are of size 1.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


load = functools.partial(load_whole, LLaDA2MoeModelLM)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llada2")
    config, tensors = write_llada2(folder, first_k_dense_replace=0)
    return folder, config, tensors, load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_shared_experts": 0},
        {"num_shared_experts": 2, "num_key_value_heads": 4},
        {"use_bias": True, "use_qkv_bias": True},
        {"partial_rotary_factor": 1.0, "rope_theta": 50.0},
        {"tie_word_embeddings": True, "rms_norm_eps": 0.1},
        {"num_experts_per_tok": 1},
        {"n_group": 1, "topk_group": 1},
        {"n_group": 6, "topk_group": 3, "num_experts_per_tok": 6},
        {"head_dim": 8, "block_length": 16},
        {"first_k_dense_replace": 0},
    ],
    ids=str,
)
@torch.no_grad()
def test_logits_equal_the_plain_forward(changes, tmp_path):
    config, tensors = write_llada2(tmp_path, **changes)
    ids = random_ids(config["vocab_size"], 1, 16)
    # The last block is open and full, so that all blocks are counted from the first token.
    expected = plain_llada2(tensors, config, ids[0], block_visible(16, config["block_length"]))
    torch.testing.assert_close(load(tmp_path)(ids).logits[0], expected, **CLOSE)


@torch.no_grad()
def test_a_mask_of_the_callers(checkpoint):
    """As the official code takes it: which key each query sees."""
    _, config, tensors, model = checkpoint
    ids = random_ids(config["vocab_size"], 1, 10)
    visible = block_visible(10, 3)
    mask = torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    for query, keys in enumerate(visible):
        mask[0, 0, query, keys] = True
    torch.testing.assert_close(model(ids, mask).logits[0], plain_llada2(tensors, config, ids[0], visible), **CLOSE)
    # Products of other shapes sum in another order.
    torch.testing.assert_close(model(ids, mask, logits_to_keep=2).logits, model(ids, mask).logits[:, -2:], **CLOSE)
    some = torch.tensor([0, 3])
    torch.testing.assert_close(model(ids, mask, logits_to_keep=some).logits, model(ids, mask).logits[:, some], **CLOSE)


@torch.no_grad()
def test_the_bias_changes_the_choice_and_not_the_weights(checkpoint):
    _, config, _, model = checkpoint
    router = model.model.layers[1].mlp.gate
    tokens = torch.randn(50, config["hidden_size"], generator=torch.Generator().manual_seed(0))
    routing = router(tokens)
    assert routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((50,), config["routed_scaling_factor"]))
    scores = (tokens @ router.weight.T).sigmoid().gather(1, routing.experts)
    torch.testing.assert_close(routing.weights, 2.5 * scores / scores.sum(-1, keepdim=True))
    bias, router.expert_bias = router.expert_bias, torch.zeros_like(router.expert_bias)
    assert not torch.equal(router(tokens).experts, routing.experts)
    router.expert_bias = bias
    groups = routing.experts // (config["num_experts"] // config["n_group"])
    assert max(len(row.unique()) for row in groups) <= config["topk_group"]


def test_the_bias_stays_float32_in_a_bfloat16_model(checkpoint):
    folder, _, tensors, _ = checkpoint
    model = load(folder, torch.bfloat16)
    router = model.model.layers[0].mlp.gate
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.expert_bias, tensors["model.layers.0.mlp.gate.expert_bias"])


@torch.no_grad()
def test_saving_keeps_tensor_names_values_and_official_keys(checkpoint, tmp_path):
    _, config, tensors, model = checkpoint
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
    written = json.loads((tmp_path / "config.json").read_text())
    changing = {"transformers_version", "torch_dtype"}
    assert {k: written.get(k, "missing") for k in config.keys() - changing} == {
        k: config[k] for k in config.keys() - changing
    }


def test_official_files_give_this_class(tmp_path):
    """Nothing that they name is executed; they don't say how long a block is."""
    config, _ = write_llada2(tmp_path, drop=["block_length", "mask_token_id", "head_dim"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is LLaDA2MoeModelLM
    assert not (tmp_path / TRACE).exists()
    spec = resolve_diffusion(LLaDA2MoeConfig())
    assert (spec.name, spec.mask_token_id, spec.block_length, spec.context) == ("llada2", 156895, 32, "block_causal")
    assert resolve_diffusion({**config, "vocab_size": 157184}).block_length == 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling=.*not supported"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False .*not supported, only None or True"),
        ({"score_function": "softmax"}, "score_function='softmax' .*not supported"),
        ({"norm_head": True}, "norm_head=True .*not supported"),
        ({"expert_capacity": 48}, r"expert_capacity=48 .* \(LLaDA2\.2\), which isn't computed; use LLaDA2\.0 or 2\.1"),
        ({"norm_softmax": True}, "norm_softmax=True .*not supported"),
        ({"moe_router_enable_expert_bias": False}, "moe_router_enable_expert_bias=False .*not supported"),
        ({"router_dtype": "bf16"}, "router_dtype='bf16' .*not supported, only None or 'fp32'"),
        ({"use_qk_norm": False}, "use_qk_norm=False .*not supported"),
        ({"use_rmsnorm": False}, "use_rmsnorm=False .*not supported"),
        ({"using_split_qkv_in_self_attention": True}, "using_split_qkv_in_self_attention=True .*not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True .*not supported"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"partial_rotary_factor": 0.2}, r"partial_rotary_factor=0\.2 of head_dim=16 must be an even number"),
        ({"partial_rotary_factor": 1.5}, r"partial_rotary_factor=1\.5 of head_dim=16 .* at most all"),
        ({"num_experts": 2}, "decoder block 1 has 2 experts, fewer than the num_experts_per_tok=3"),
        ({"num_experts": 10}, "decoder block 1 has 10 experts in n_group=4 groups"),
        ({"num_experts": 4}, "decoder block 1 has 4 experts in n_group=4 groups, .* at least 2"),
        ({"topk_group": 5}, "topk_group=5 must be at most n_group=4"),
        ({"topk_group": 1, "num_experts_per_tok": 4}, "has 3 experts in each group, .* too few"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1 must be a whole number of at least 0"),
        ({"block_length": 0}, "block_length=0 .* at least 1"),
    ],
)
def test_options_that_are_not_computed_are_refused_by_name(changes, words, tmp_path):
    config, _ = write_llada2(tmp_path)
    read = LLaDA2MoeConfig(**{k: v for k, v in {**config, **changes}.items() if k != "model_type"})
    with pytest.raises(UsageError, match=words) as error:
        LLaDA2MoeModelLM(read)
    assert "\n" not in str(error.value)


def test_layers_with_numbers_of_experts_of_their_own(tmp_path):
    config, _ = write_llada2(tmp_path, num_hidden_layers=3)
    sizes = {"attention_heads": 4, "key_value_heads": 2}
    config["sinkprune_block_sizes"] = [
        {**sizes, "mlp_channels": 72},
        {**sizes, "mlp_channels": 32, "experts": 8},
        {**sizes, "mlp_channels": 32, "experts": 12},
    ]
    config["hidden_act"] = "silu with sinkprune_block_sizes (load it with sinkprune-plugin)"
    read = LLaDA2MoeConfig(**{k: v for k, v in config.items() if k != "model_type"})
    model = LLaDA2MoeModelLM(read)
    assert [len(layer.mlp.experts) for layer in model.model.layers[1:]] == [8, 12]
    assert model.model.layers[1].mlp.gate.expert_bias.shape == (8,)
    assert sizes_in_config(read)[0] == BlockSizes(72, 4, 2)
    config["sinkprune_block_sizes"][1]["experts"] = 10
    read = LLaDA2MoeConfig(**{k: v for k, v in config.items() if k != "model_type"})
    with pytest.raises(UsageError, match="decoder block 1 has 10 experts in n_group=4 groups"):
        read.check_supported()

"""The native LLaDA-MoE classes against a plain forward pass, on random checkpoints in the official layout."""

import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from official_checkpoints import TRACE, write_llada, write_llada_moe
from plain_forward import plain_llada_moe
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
from whole_models import load_whole, random_ids

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.decoder_blocks import block_linears, find_decoder_blocks
from sinkprune_plugin.models.experts import MoELayer, Router
from sinkprune_plugin.models.llada.configuration_llada import LLaDAConfig
from sinkprune_plugin.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from sinkprune_plugin.models.sizes_in_config import BlockSizes, sizes_in_config

# Both sides compute in float32 with other orders of operations; logits are of size 1.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


load = functools.partial(load_whole, LLaDAMoEModelLM)


def sized(config, experts):
    """config.json of a model whose layers have these numbers of experts."""
    entries = [{"mlp_channels": 40, "attention_heads": 6, "key_value_heads": 6, "experts": count} for count in experts]
    return {
        **config,
        "head_dim": 8,
        "hidden_act": "silu with sinkprune_block_sizes (load it with sinkprune-plugin)",
        "sinkprune_block_sizes": entries,
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llada-moe")
    config, tensors = write_llada_moe(folder)
    return folder, config, tensors, load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},
        {"tie_word_embeddings": True},
        {"rope_theta": 50.0, "rms_norm_eps": 0.1},
        {"qk_layernorm": False},
        {"attention_bias": True},
        {"moe_layer_freq": [0, 1]},
        {"num_experts": 2},
        {"num_experts_per_tok": 1},
    ],
)
@torch.no_grad()
def test_logits_equal_the_plain_forward(changes, tmp_path):
    config, tensors = write_llada_moe(tmp_path, **changes)
    ids = random_ids(config["vocab_size"], 2, 9)
    torch.testing.assert_close(load(tmp_path)(ids).logits, plain_llada_moe(tensors, config, ids), **CLOSE)


@given(
    kv_heads=st.sampled_from([1, 2, 4]),
    groups=st.integers(1, 3),
    half_head=st.integers(1, 4),
    experts=st.integers(1, 9),
    data=st.data(),
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=12)
@torch.no_grad()
def test_any_shape_with_padding_equals_the_plain_forward(
    tmp_path_factory, kv_heads, groups, half_head, experts, data, lengths, seed
):
    folder = tmp_path_factory.mktemp("llada-moe")
    config, tensors = write_llada_moe(
        folder,
        seed=seed,
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        hidden_size=2 * half_head * kv_heads * groups,
        num_experts=experts,
        num_experts_per_tok=data.draw(st.integers(1, experts)),
    )
    ids = random_ids(config["vocab_size"], len(lengths), max(lengths), seed=seed)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    logits = load(folder)(ids, valid.long()).logits
    torch.testing.assert_close(logits[valid], plain_llada_moe(tensors, config, ids, valid)[valid], **CLOSE)


@torch.no_grad()
def test_logits_of_some_positions(checkpoint):
    *_, model = checkpoint
    ids = random_ids(40, 1, 9)
    # Fewer rows may be summed in another order.
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, model(ids).logits[:, [1, 4]])


def test_layers_with_numbers_of_experts_of_their_own(tmp_path):
    config, tensors = write_llada_moe(tmp_path, experts=[5, 3])
    (tmp_path / "config.json").write_text(json.dumps(sized(config, [5, 3])))
    model = load(tmp_path)
    ids = random_ids(config["vocab_size"], 2, 9)
    torch.testing.assert_close(model(ids).logits, plain_llada_moe(tensors, config, ids), **CLOSE)
    assert sizes_in_config(model.config) == [BlockSizes(40, 6, 6, 5), BlockSizes(40, 6, 6, 3)]
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert written["sinkprune_block_sizes"] == sized(config, [5, 3])["sinkprune_block_sizes"]
    # The official code would look this activation up and stop, before it makes layers of other shapes.
    assert written["hidden_act"] == sized(config, [5, 3])["hidden_act"]
    assert torch.equal(load(tmp_path / "again")(ids).logits, model(ids).logits)


@torch.no_grad()
def test_what_observers_of_experts_rely_on(checkpoint):
    """One routing a layer, and each chosen expert called once with the rows that it names."""
    _, config, _, model = checkpoint
    layer = model.model.layers[1].mlp
    routings, calls = [], []
    hooks = [layer.gate.register_forward_hook(lambda _m, _a, routing: routings.append(routing))]
    for number, expert in enumerate(layer.experts):
        hooks.append(expert.register_forward_hook(lambda _m, args, _o, number=number: calls.append((number, args[0]))))
    hooks.append(layer.register_forward_hook(lambda _m, args, _o: calls.append(("layer", args[0]))))
    model(random_ids(config["vocab_size"], 2, 9))
    for hook in hooks:
        hook.remove()
    *calls, (_, tokens) = calls
    assert len(routings) == 1
    routing, tokens = routings[0], tokens.flatten(0, 1)
    assert routing.experts.shape == routing.weights.shape == (18, config["num_experts_per_tok"])
    numbers = [number for number, _ in calls]
    assert numbers == sorted(set(routing.experts.flatten().tolist()))
    for number, inputs in calls:
        rows, weights = routing.rows_of(number)
        assert torch.equal(inputs, tokens[rows])
        assert torch.equal(weights, (routing.weights * (routing.experts == number)).sum(-1)[rows])


def test_blocks_are_the_layers_and_the_router_is_no_linear(checkpoint):
    model = checkpoint[-1]
    name, blocks = find_decoder_blocks(model)
    assert (name, len(blocks)) == ("model.layers", 2)
    linears = block_linears(model)
    assert f"{name}.1.mlp.experts.5.down_proj" in linears
    assert not any(isinstance(model.get_submodule(linear), Router) for linear in linears)
    # 4 of attention and 3 of each of 6 experts, in both layers.
    assert len(linears) == 2 * (4 + 3 * 6)


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
    ids = random_ids(config["vocab_size"], 1, 8)
    assert torch.equal(load(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("model_type", ["llada", "lladamoe"])
def test_official_files_give_this_class_and_mask_token(model_type, tmp_path):
    """Official files say "llada"; nothing that they name is executed, and LLaDA's mask token isn't taken for theirs."""
    config, _ = write_llada_moe(tmp_path, model_type=model_type, drop=["mask_token_id"])
    assert type(AutoConfig.from_pretrained(tmp_path)) is LLaDAMoEConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is LLaDAMoEModelLM
    assert not (tmp_path / TRACE).exists()
    for read in ({**config, "vocab_size": 157184}, LLaDAMoEConfig(vocab_size=157184)):
        assert resolve_diffusion(read).mask_token_id == 156895
        assert resolve_diffusion(read).name == "llada-moe"


def test_dense_llada_stays_dense_llada(tmp_path):
    write_llada(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LLaDAConfig
    assert resolve_diffusion(AutoConfig.from_pretrained(tmp_path)).name == "llada"


def test_gradients_reach_router_and_experts(checkpoint):
    folder, config, _, _ = checkpoint
    model = load(folder)
    model(random_ids(config["vocab_size"], 2, 32)).logits.logsumexp(-1).sum().backward()
    layer = model.model.layers[0].mlp
    assert isinstance(layer, MoELayer)
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling=.*not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 .*not supported, only None or 1"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8 .*not supported"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True .*not supported"),
        ({"norm_topk_prob": True}, "norm_topk_prob=True .*not supported, only None or False"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid' .*not supported"),
        ({"routed_scaling_factor": 2.5}, r"routed_scaling_factor=2\.5 .*not supported, only None or 1"),
        ({"router_num_group": 8}, "router_num_group=8 .*not supported"),
        ({"router_topk_group": 4}, "router_topk_group=4 .*not supported"),
        ({"clip_qkv": 8.0}, r"clip_qkv=8\.0 .*not supported"),
        ({"num_attention_heads": 5}, "hidden_size=48 over num_attention_heads=5"),
        ({"num_key_value_heads": 4}, "no multiple of num_key_value_heads=4"),
        ({"num_experts": 0}, "num_experts=0 .* whole number of at least 1"),
        ({"num_experts": 1}, "decoder block 0 has 1 experts, fewer than the num_experts_per_tok=2"),
        ({"moe_layer_freq": [1]}, r"moe_layer_freq=\[1\] must hold a 0 or 1 for each of num_hidden_layers=2"),
        ({"moe_layer_freq": [1, 2]}, r"moe_layer_freq=\[1, 2\] must hold a 0 or 1"),
    ],
)
def test_options_that_are_not_computed_are_refused_by_name(changes, words):
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 20}
    sizes |= {"num_experts": 6, "num_experts_per_tok": 2}
    with pytest.raises(UsageError, match=words) as error:
        LLaDAMoEModelLM(LLaDAMoEConfig(**{**sizes, **changes}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ([5, 7], r"sinkprune_block_sizes\[1\]\.experts is 7, more than the 6"),
        ([5, 1], "decoder block 1 has 1 experts, fewer than the num_experts_per_tok=2"),
        ([5, 0], r"sinkprune_block_sizes\[1\]\.experts is 0; it must be a whole number of at least 1"),
        ([5], "has 1 entries for 2 decoder blocks"),
    ],
)
def test_wrong_numbers_of_experts(experts, words, tmp_path):
    config, _ = write_llada_moe(tmp_path)
    config = LLaDAMoEConfig(**{k: v for k, v in sized(config, experts).items() if k != "model_type"})
    with pytest.raises(UsageError, match=words):
        config.check_supported()


def test_entries_say_experts_only_where_there_are_any(tmp_path):
    config, _ = write_llada_moe(tmp_path, moe_layer_freq=[0, 1])
    written = sized(config, [4, 4])
    written["sinkprune_block_sizes"][0]["mlp_channels"] = 30
    with pytest.raises(UsageError, match=r"sinkprune_block_sizes\[0\] must have the keys mlp_channels"):
        LLaDAMoEConfig(**{k: v for k, v in written.items() if k != "model_type"}).check_supported()
    del written["sinkprune_block_sizes"][0]["experts"]
    read = LLaDAMoEConfig(**{k: v for k, v in written.items() if k != "model_type"})
    read.check_supported()
    assert sizes_in_config(read)[0] == BlockSizes(30, 6, 6)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (5, r"model\.layers\.0\.mlp\.gate\.weight is \[6, 48\] in its weights and \[5, 48\] by its config\.json"),
        (7, r"model\.layers\.0\.mlp\.gate\.weight is \[6, 48\] in its weights and \[7, 48\] by its config\.json"),
    ],
)
def test_tensors_that_disagree_with_the_number_of_experts(count, words, tmp_path):
    config, _ = write_llada_moe(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts": count}))
    with pytest.raises(UsageError, match=words):
        load_model(tmp_path)

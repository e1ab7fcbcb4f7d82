"""Heads, common channels and blocks leave mixtures of experts: logits of the plain forward pass with zeros there."""

import json

import pytest
import torch
from official_checkpoints import write_llada2, write_llada_moe
from plain_forward import plain_llada_moe
from plain_llada2 import block_visible, plain_llada2
from safetensors.torch import load_file

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.block_sizes import BlockSizes, block_sizes, keep_units, remove_blocks
from sinkprune_plugin.models.expert_lists import keep_experts, note_kept_experts, set_expert_counts
from sinkprune_plugin.models.sizes_in_config import sizes_in_config

TOKENS = torch.randint(3, 40, (1, 16), generator=torch.Generator().manual_seed(0))
# Sums over the rest in another order, of logits of order 1.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture
def llada2(tmp_path):
    """A dense block of 72 channels, two of 12 experts and a shared one of 32; 4 query heads, 2 key and value heads."""
    config, tensors = write_llada2(tmp_path, num_hidden_layers=3, use_qkv_bias=True, use_bias=True)
    return tmp_path, config, tensors


@pytest.fixture
def llada_moe(tmp_path):
    """A dense block of 72 channels and two of 6 experts; 6 heads."""
    config, tensors = write_llada_moe(tmp_path, num_hidden_layers=3, moe_layer_freq=[1, 0, 1], num_key_value_heads=3)
    return tmp_path, config, tensors


def without_columns(tensors, name, kept, each=1):
    """The reference: nothing is removed, but what would be has no influence."""
    weight = tensors[f"{name}.weight"].unflatten(1, (-1, each))
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[kept] = False
    weight[:, gone] = 0


@torch.no_grad()
def again(model, folder):
    """The same logits and sizes from the saved checkpoint."""
    model.save_pretrained(folder)
    read = load_model(folder)
    # Weights in other places of memory may be summed in another order.
    torch.testing.assert_close(read(TOKENS).logits, model(TOKENS).logits, **CLOSE)
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert block_sizes(read) == sizes_in_config(read.config) == block_sizes(model)
    read.save_pretrained(folder / "again")
    assert (folder / "again/config.json").read_text() == (folder / "config.json").read_text()
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def test_llada2_loses_heads_of_its_one_projection_and_channels_of_dense_and_shared_mlps(llada2, tmp_path):
    folder, config, tensors = llada2
    model = load_model(folder)
    keep_units(model, 0, channels=torch.tensor([0, 3, 71]), heads=torch.tensor([2, 3]))
    keep_units(model, 1, channels=torch.arange(5, 25), heads=torch.tensor([1, 2]))
    layers = "model.layers"
    without_columns(tensors, f"{layers}.0.mlp.down_proj", [0, 3, 71])
    without_columns(tensors, f"{layers}.0.attention.dense", [2, 3], 16)
    without_columns(tensors, f"{layers}.1.mlp.shared_experts.down_proj", list(range(5, 25)))
    without_columns(tensors, f"{layers}.1.attention.dense", [1, 2], 16)
    expected = plain_llada2(tensors, config, TOKENS[0], block_visible(16, config["block_length"]))
    torch.testing.assert_close(model(TOKENS).logits[0], expected, **CLOSE)
    assert block_sizes(model) == [BlockSizes(3, 2, 1), BlockSizes(32, 2, 2, 12, 20), BlockSizes(32, 4, 2, 12, 32)]
    saved = again(model, tmp_path / "small")
    assert saved["sinkprune_block_sizes"][1] == {
        **{"attention_heads": 2, "key_value_heads": 2, "mlp_channels": 32},
        **{"experts": 12, "shared_channels": 20},
    }
    # Alone in its block, so an ordinary option says it.
    assert (saved["intermediate_size"], saved["num_attention_heads"], saved["hidden_act"][:9]) == (3, 4, "silu with")


@torch.no_grad()
def test_llada_moe_loses_heads_everywhere_and_channels_where_there_are_any(llada_moe, tmp_path):
    folder, config, tensors = llada_moe
    model = load_model(folder)
    keep_units(model, 1, channels=torch.arange(8), heads=torch.tensor([0, 1, 4, 5]))
    keep_units(model, 2, heads=torch.tensor([2, 5]))
    without_columns(tensors, "model.layers.1.mlp.down_proj", list(range(8)))
    without_columns(tensors, "model.layers.1.self_attn.o_proj", [0, 1, 4, 5], 8)
    without_columns(tensors, "model.layers.2.self_attn.o_proj", [2, 5], 8)
    torch.testing.assert_close(model(TOKENS).logits, plain_llada_moe(tensors, config, TOKENS), **CLOSE)
    assert block_sizes(model) == [BlockSizes(40, 6, 3, 6), BlockSizes(8, 4, 2), BlockSizes(40, 2, 2, 6)]
    assert again(model, tmp_path / "small")["dense_intermediate_size"] == 8
    before = block_sizes(model)
    with pytest.raises(UsageError, match=r"^model\.layers\.0 has routed experts only, and their channels stay; remove"):
        keep_units(model, 0, channels=torch.arange(8))
    assert block_sizes(model) == before


@pytest.mark.parametrize(
    ("write", "gone", "options"),
    [
        (write_llada2, [0], {"first_k_dense_replace": 0, "num_hidden_layers": 2}),
        (write_llada2, [1], {"first_k_dense_replace": 1, "num_hidden_layers": 2}),
        (write_llada2, [1, 2], {"first_k_dense_replace": 1, "num_hidden_layers": 1}),
        (write_llada_moe, [0], {"moe_layer_freq": [1, 1], "num_hidden_layers": 2}),
        (write_llada_moe, [1], {"moe_layer_freq": [0, 1], "num_hidden_layers": 2}),
    ],
)
def test_where_blocks_go_ordinary_options_say_it(write, gone, options, tmp_path):
    """So that official code loads the checkpoint."""
    changes = {"moe_layer_freq": [0, 1, 1]} if write is write_llada_moe else {}
    dense, _ = write(tmp_path / "dense", num_hidden_layers=3, **changes)
    model = load_model(tmp_path / "dense")
    remove_blocks(model, gone)
    saved = again(model, tmp_path / "small")
    assert {key: saved[key] for key in options} == options
    assert "sinkprune_block_sizes" not in saved
    changed = {key for key in dense if saved.get(key) != dense[key]}
    assert changed <= {*options, "transformers_version", "torch_dtype"}


def test_blocks_channels_and_experts_one_after_the_other(llada2, tmp_path):
    folder, _, tensors = llada2
    model = load_model(folder)
    kept = [0, 1, 3, 4, 6, 7, 9, 10]
    keep_experts(model, 2, kept)
    note_kept_experts(model.config, {2: kept})
    set_expert_counts(model.config, {1: 12, 2: 8})
    remove_blocks(model, [1])
    keep_units(model, 1, channels=torch.arange(8, 32))
    saved = again(model, tmp_path / "small")
    assert saved["sinkprune_kept_experts"] == [[], kept]
    # Of the blocks that are left no other has experts.
    assert (saved["num_experts"], saved["first_k_dense_replace"]) == (8, 1)
    assert block_sizes(model)[1] == BlockSizes(32, 4, 2, 8, 24)
    weights = load_file(tmp_path / "small" / "model.safetensors")
    name = "mlp.experts.{}.up_proj.weight"
    assert torch.equal(weights[f"model.layers.1.{name.format(2)}"], tensors[f"model.layers.2.{name.format(3)}"])
    assert saved["sinkprune_dense_parameters"] == sum(
        tensor.numel() for tensor_name, tensor in tensors.items() if "expert_bias" not in tensor_name
    )


def test_entries_need_not_repeat_the_shared_width_but_must_not_exceed_it(llada2):
    folder, _, _ = llada2
    model = load_model(folder)
    entries = [size.to_json() for size in block_sizes(model)]
    for entry in entries[1:]:
        assert entry.pop("shared_channels") == 32
    model.config.sinkprune_block_sizes = entries
    assert sizes_in_config(model.config) == block_sizes(model)
    entries[2]["shared_channels"] = 33
    with pytest.raises(UsageError, match=r"sinkprune_block_sizes\[2\]\.shared_channels is 33, more than the 32"):
        sizes_in_config(model.config)
    entries[2]["shared_channels"] = 8
    entries[0]["shared_channels"] = 8
    with pytest.raises(
        UsageError, match=r"sinkprune_block_sizes\[0\] must have the keys mlp_channels, attention_heads"
    ):
        sizes_in_config(model.config)


@pytest.mark.parametrize("write", [write_llada2, write_llada_moe])
@torch.no_grad()
def test_experts_keep_channels_of_their_own_as_many_in_a_block(write, tmp_path):
    changes = {"num_shared_experts": 0, "first_k_dense_replace": 0} if write is write_llada2 else {}
    config, tensors = write(tmp_path / "dense", **changes)
    model = load_model(tmp_path / "dense")
    sizes, dense = block_sizes(model), json.loads((tmp_path / "dense/config.json").read_text())
    for block, left in ((0, 8), (1, 8)):
        kept = [torch.arange(number, number + left) for number in range(sizes[block].experts)]
        keep_units(model, block, expert_channels=kept)
        for number, channels in enumerate(kept):
            without_columns(tensors, f"model.layers.{block}.mlp.experts.{number}.down_proj", channels.tolist())
    if write is write_llada2:
        expected = plain_llada2(tensors, config, TOKENS[0], block_visible(16, config["block_length"]))[None]
    else:
        expected = plain_llada_moe(tensors, config, TOKENS)
    torch.testing.assert_close(model(TOKENS).logits, expected, **CLOSE)
    saved = again(model, tmp_path / "small")
    option = "moe_intermediate_size" if write is write_llada2 else "expert_intermediate_size"
    assert saved[option] == 8
    assert "sinkprune_block_sizes" not in saved
    assert {key for key in dense if saved.get(key) != dense[key]} <= {option, "transformers_version", "torch_dtype"}


def test_with_a_shared_expert_fewer_channels_of_the_others_need_the_key(llada2, tmp_path):
    """The ordinary option is the width of both."""
    folder, config, _ = llada2
    model = load_model(folder)
    for block in (1, 2):
        keep_units(model, block, expert_channels=[torch.arange(16)] * 12)
    saved = again(model, tmp_path / "small")
    assert saved["moe_intermediate_size"] == config["moe_intermediate_size"]
    assert [(entry["mlp_channels"], entry.get("shared_channels")) for entry in saved["sinkprune_block_sizes"]] == [
        (72, None),
        (16, 32),
        (16, 32),
    ]


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([torch.arange(8)] * 11, r"channels of 11 experts are given, \[8\] of each; give as many for each of its 12"),
        ([torch.arange(8)] * 11 + [torch.arange(7)], r"12 experts are given, \[7, 8\] of each"),
        ([torch.arange(30, 38)] * 12, "channels of an expert are numbered from 0 to 31; there is none of number 37"),
    ],
)
def test_channels_of_experts_that_cannot_be_kept(kept, words, llada2):
    model = load_model(llada2[0])
    before = block_sizes(model)
    with pytest.raises(UsageError, match=words):
        keep_units(model, 1, expert_channels=kept)
    assert block_sizes(model) == before

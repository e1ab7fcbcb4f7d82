"""Smaller decoder blocks: the same logits as with the removed units set to zero, in memory and read from disk again."""

import json

import pytest
import torch
from official_checkpoints import write_dream, write_llada

from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.block_sizes import BlockSizes, block_sizes, keep_units, remove_blocks, units_of
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks

WRITE = {
    "llada": (write_llada, {"n_layers": 3, "include_bias": True}),
    "llada grouped": (write_llada, {"n_layers": 3, "n_kv_heads": 3}),
    "dream": (write_dream, {"num_hidden_layers": 3, "num_attention_heads": 14, "num_key_value_heads": 7}),
}
CHANNELS, HEADS = torch.tensor([0, 3, 4, 5, 9, 40, 41, 71]), torch.tensor([2, 3, 4, 5])
TOKENS = torch.arange(3, 31).view(2, 14)


@pytest.fixture(params=WRITE)
def folder(request, tmp_path):
    write, changes = WRITE[request.param]
    write(tmp_path / "dense", **changes)
    return tmp_path / "dense"


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def zero_others(model, block, channels=None, heads=None):
    """The reference: nothing is removed, but what would be has no influence."""
    units, head_dim = units_of(model), model.config.head_dim
    block = find_decoder_blocks(model)[1][block]
    with torch.no_grad():
        for name, kept, width in ((units.channel_columns, channels, 1), (units.head_columns, heads, head_dim)):
            if kept is not None:
                weight = block.get_submodule(name).weight
                gone = torch.ones(weight.shape[1] // width, dtype=torch.bool)
                gone[kept] = False
                weight[:, gone.repeat_interleave(width)] = 0


def test_unequal_blocks(folder, tmp_path):
    model, reference = load_model(folder), load_model(folder)
    zero_others(reference, 0, channels=CHANNELS)
    zero_others(reference, 2, channels=CHANNELS[:5], heads=HEADS)
    keep_units(model, 0, channels=CHANNELS.flip(0))
    keep_units(model, 2, channels=CHANNELS[:5], heads=HEADS)
    # Sums over the rest in another order, of logits of order 1.
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    sizes = block_sizes(model)
    whole = block_sizes(reference)[0]
    share = whole.attention_heads // whole.key_value_heads
    assert sizes == [
        BlockSizes(8, whole.attention_heads, whole.key_value_heads),
        whole,
        BlockSizes(5, 4, 4 // share),
    ]
    model.save_pretrained(tmp_path / "pruned")
    again = load_model(tmp_path / "pruned")
    assert torch.equal(logits(again), logits(model))
    assert block_sizes(again) == block_sizes(again.config) == sizes
    # And once more: nothing is lost or written twice on the way.
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "pruned/config.json").read_text()
    assert again.config.sinkprune_dense_parameters == sum(parameter.numel() for parameter in reference.parameters())


def test_equal_blocks_need_no_key(folder, tmp_path):
    """Channels and whole blocks, all alike: ordinary options say it, so that official code loads it."""
    model, reference = load_model(folder), load_model(folder)
    sizes = block_sizes(model)
    for block in range(3):
        keep_units(model, block, channels=CHANNELS)
        zero_others(reference, block, channels=CHANNELS)
    del find_decoder_blocks(reference)[1][1]
    remove_blocks(model, [1])
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned/config.json").read_text())
    dense = json.loads((folder / "config.json").read_text())
    width, layers = (
        ("mlp_hidden_size", "n_layers") if "n_layers" in dense else ("intermediate_size", "num_hidden_layers")
    )
    assert (config[width], config[layers]) == (8, 2)
    changed = {key for key in dense if config.get(key) != dense[key]}
    # transformers' own: its version, and the dtype under its present name.
    assert changed <= {width, layers, "transformers_version", "torch_dtype"}
    assert "sinkprune_block_sizes" not in config
    assert (
        block_sizes(load_model(tmp_path / "pruned"))
        == [BlockSizes(8, sizes[0].attention_heads, sizes[0].key_value_heads)] * 2
    )


def test_equal_blocks_with_fewer_heads_need_the_key(folder, tmp_path):
    """The official code would divide the width by the number of heads."""
    model = load_model(folder)
    for block in range(3):
        keep_units(model, block, heads=HEADS)
    model.save_pretrained(tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned/config.json").read_text())
    assert len(config["sinkprune_block_sizes"]) == 3
    assert config["head_dim"] == model.config.hidden_size // (config.get("n_heads") or config["num_attention_heads"])
    assert torch.equal(logits(load_model(tmp_path / "pruned")), logits(model))

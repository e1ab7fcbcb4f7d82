"""Smaller decoder blocks: the same logits as with the removed units set to zero, in memory and read from disk again."""

import json
from pathlib import Path

import pytest
import torch
from nemotron_labs_checkpoints import write_nemotron_labs
from official_checkpoints import write_dream, write_llada
from sdar_checkpoints import write_sdar
from transformers import LlamaConfig, LlamaForCausalLM

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.block_sizes import BlockSizes, block_sizes, keep_units, remove_blocks, units_of
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.models.dream.configuration_dream import DreamConfig
from sinkprune_plugin.models.dream.modeling_dream import DreamModel
from sinkprune_plugin.models.llada.configuration_llada import LLaDAConfig
from sinkprune_plugin.models.llada.modeling_llada import LLaDAModelLM

WRITE = {
    "llada": (write_llada, {"n_layers": 3, "include_bias": True}),
    "llada grouped": (write_llada, {"n_layers": 3, "n_kv_heads": 3}),
    "nemotron": (write_nemotron_labs, {"num_hidden_layers": 3, "hidden_size": 48}),
    "sdar": (
        write_sdar,
        {"num_hidden_layers": 3, "hidden_size": 80, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
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


def test_as_many_query_heads_of_each_key_and_value_head(tmp_path):
    write_llada(tmp_path, n_kv_heads=3)
    model, reference = load_model(tmp_path), load_model(tmp_path)
    heads = torch.tensor([1, 4])
    keep_units(model, 0, heads=heads)
    zero_others(reference, 0, heads=heads)
    assert block_sizes(model)[0] == BlockSizes(80, 2, 2)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"channels": []}, "blocks.1: channels: none of 80 would stay; keep at least one"),
        ({"channels": [0, 80]}, "channels are numbered from 0 to 79; there is none of number 80"),
        ({"channels": [-1, 4]}, "there is none of number -1"),
        ({"channels": [3, 5, 3]}, "channels: 3 is named twice"),
        ({"channels": [0.0, 1.0]}, "given as torch.float32 of 1 dimensions; give their numbers"),
        ({"heads": []}, "attention heads: none of 6 would stay"),
        ({"heads": [0, 1, 2]}, "key and value head 1 would keep 1 of its 2 query heads and 0 would keep 2"),
    ],
)
def test_units_that_cannot_be_kept(units, message, tmp_path):
    write_llada(tmp_path, n_kv_heads=3)
    model = load_model(tmp_path)
    before = block_sizes(model)
    with pytest.raises(UsageError, match=message):
        keep_units(model, 1, **{name: torch.tensor(kept, dtype=None if kept else int) for name, kept in units.items()})
    assert block_sizes(model) == before


def test_blocks_that_cannot_be_removed(tmp_path):
    write_llada(tmp_path)
    model = load_model(tmp_path)
    with pytest.raises(UsageError, match=r"has no block 2, only 0 to 1"):
        remove_blocks(model, [0, 2])
    with pytest.raises(UsageError, match=r"all 2 blocks .* keep at least one"):
        remove_blocks(model, [0, 1])


def test_shared_weights_are_refused(tmp_path):
    write_llada(tmp_path)
    model = load_model(tmp_path)
    blocks = model.model.transformer.blocks
    blocks[1].up_proj.weight = blocks[0].up_proj.weight
    with pytest.raises(UsageError, match=r"blocks\.0\.up_proj\.weight is shared with another module"):
        keep_units(model, 0, channels=CHANNELS)
    # Not what is shared outside of the units: the vocabulary projection with the embedding.
    write_llada(tmp_path / "tied", weight_tying=True)
    tied = load_model(tmp_path / "tied")
    keep_units(tied, 0, channels=CHANNELS)
    assert tied.config.sinkprune_dense_parameters == sum(
        parameter.numel() for parameter in load_model(tmp_path / "tied").parameters()
    )


def test_weights_that_are_not_there_are_refused(tmp_path):
    write_llada(tmp_path)
    model = load_model(tmp_path)
    before = block_sizes(model)
    model.model.transformer.blocks[0].ff_out.to("meta")
    with pytest.raises(UsageError, match=r"blocks\.0\.ff_out\.weight is on the meta device"):
        keep_units(model, 0, channels=CHANNELS)
    assert block_sizes(model) == before


def test_scales_of_a_quantization_go_with_the_rows(tmp_path):
    write_llada(tmp_path)
    block = (model := load_model(tmp_path)).model.transformer.blocks[0]
    scales = torch.arange(80.0)[:, None]
    block.up_proj.weight_scale = torch.nn.Parameter(scales.clone(), requires_grad=False)
    block.ff_out.weight_scale = torch.nn.Parameter(torch.ones(48, 1), requires_grad=False)
    keep_units(model, 0, channels=CHANNELS)
    assert torch.equal(block.up_proj.weight_scale, scales[CHANNELS])
    assert block.ff_out.weight_scale.shape == (48, 1)
    block.ff_out.weight_scale = torch.nn.Parameter(torch.ones(48, 2), requires_grad=False)
    with pytest.raises(UsageError, match=r"ff_out is quantized by groups of columns"):
        keep_units(model, 0, channels=torch.arange(4))


def test_models_without_units_are_refused(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    with pytest.raises(UsageError, match=r"model_type 'llama'\) has no units .*docs/adding-a-family\.md says how"):
        block_sizes(llama)
    llama.config.model_type = "llada"
    with pytest.raises(UsageError, match=r"isn't this package's class for llada.*load the model without remote code"):
        keep_units(llama, 0, channels=torch.arange(8))


WHOLE = {"mlp_channels": 80, "attention_heads": 6, "key_value_heads": 3}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("two", "sinkprune_block_sizes is of type str; it must be a list"),
        ([WHOLE], "sinkprune_block_sizes has 1 entries for 2 decoder blocks"),
        ([WHOLE, 3], r"sinkprune_block_sizes\[1\] must have the keys mlp_channels, .*, not 3"),
        ([WHOLE, {"mlp_channels": 8}], r"sinkprune_block_sizes\[1\] must have the keys .*, not \['mlp_channels'\]"),
        ([WHOLE, WHOLE | {"experts": 2}], r"must have the keys .*'experts'"),
        ([WHOLE, WHOLE | {"mlp_channels": 0}], r"\[1\].mlp_channels is 0; it must be a whole number of at least 1"),
        ([WHOLE | {"mlp_channels": "8"}, WHOLE], r"\[0\].mlp_channels is '8'; it must be a whole number"),
        ([WHOLE | {"attention_heads": True}, WHOLE], r"\[0\].attention_heads is True"),
        ([WHOLE | {"mlp_channels": 10**12}, WHOLE], r"mlp_channels is 1000000000000, more than the 80 that"),
        ([WHOLE, WHOLE | {"key_value_heads": 4}], r"key_value_heads is 4, more than the 3"),
        ([WHOLE, WHOLE | {"attention_heads": 5}], r"\[1\].attention_heads is 5, no multiple of its 3 key_value_heads"),
    ],
)
def test_invalid_lists_are_refused_before_anything_is_allocated(stored, message):
    sizes = {"d_model": 48, "n_heads": 6, "n_kv_heads": 3, "mlp_hidden_size": 80, "vocab_size": 90, "n_layers": 2}
    config = LLaDAConfig(**sizes, head_dim=8, sinkprune_block_sizes=stored)
    with pytest.raises(UsageError, match=f"{message}.*; correct config.json$"):
        LLaDAModelLM(config)
    dream = DreamConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=3, intermediate_size=80, num_hidden_layers=2,
        vocab_size=90, head_dim=8, sinkprune_block_sizes=stored,
    )  # fmt: skip
    with pytest.raises(UsageError, match=message):
        DreamModel(dream)


def test_a_width_of_heads_that_the_file_must_say(tmp_path):
    sizes = {"d_model": 48, "n_heads": 6, "n_kv_heads": 3, "mlp_hidden_size": 80, "vocab_size": 90, "n_layers": 1}
    with pytest.raises(UsageError, match=r"head_dim=0 .* whole number of at least 1"):
        LLaDAModelLM(LLaDAConfig(**sizes, sinkprune_block_sizes=[WHOLE]))
    with pytest.raises(UsageError, match="over n_heads=6 must give heads of one even width, which head_dim=6 isn't"):
        LLaDAModelLM(LLaDAConfig(**sizes, head_dim=6))


@pytest.mark.parametrize(
    ("name", "option", "value"), [("llada", "block_type", "llama"), ("dream", "hidden_act", "silu")]
)
def test_official_code_meets_an_unknown_formula(name, option, value, tmp_path):
    """LLaDA's raises "Unknown block type: …", Dream's a KeyError of the activation; both were run on these files."""
    write, changes = WRITE[name]
    write(tmp_path / "dense", **changes)
    model = load_model(tmp_path / "dense")
    keep_units(model, 0, channels=CHANNELS)
    model.save_pretrained(tmp_path / "pruned")
    file = tmp_path / "pruned/config.json"
    config = json.loads(file.read_text())
    assert config[option] == f"{value} with sinkprune_block_sizes (load it with sinkprune-plugin)"
    assert getattr(load_model(tmp_path / "pruned").config, option) == value
    # A tool that drops keys it doesn't know leaves a file that nobody mistakes for a whole one.
    del config["sinkprune_block_sizes"]
    file.write_text(json.dumps(config))
    with pytest.raises(UsageError, match="sinkprune_block_sizes"):
        load_model(tmp_path / "pruned")


def test_the_example_of_the_specification():
    page = (Path(__file__).parents[2] / "docs/format.md").read_text().partition("## 11.")[2]
    example = json.loads(page.partition("```json\n")[2].partition("```")[0])
    config = LLaDAConfig(**example)
    assert [sizes.to_json() for sizes in block_sizes(LLaDAModelLM(config))] == example["sinkprune_block_sizes"]
    written = config.to_dict()
    assert {key: written[key] for key in example} == example
    ordinary = {key: example[key] for key in example if not key.startswith(("sinkprune", "block_type"))}
    whole = LLaDAModelLM(LLaDAConfig(**ordinary))
    assert sum(parameter.numel() for parameter in whole.parameters()) == example["sinkprune_dense_parameters"]

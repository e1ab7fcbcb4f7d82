import pytest
import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.decoder_blocks import block_linears, find_decoder_blocks
from sinkprune_plugin.modifiers.targets import resolve_targets


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(4, 4)
        self.up_proj = torch.nn.Linear(4, 8)
        self.norm = torch.nn.LayerNorm(4)


class Model(torch.nn.Module):
    """Two blocks, and a head whose name ends like one of a block's Linears, as in LLaDA."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.up_proj = torch.nn.Linear(4, 10)


def names(model, targets, ignore=()):
    return [target.name for target in resolve_targets(model, list(targets), list(ignore))[0]]


BLOCK_LINEARS = ["blocks.0.q_proj", "blocks.0.up_proj", "blocks.1.q_proj", "blocks.1.up_proj"]


def test_class_names_reach_into_blocks_only():
    assert names(Model(), ["Linear"]) == BLOCK_LINEARS


def test_linears_of_the_blocks_are_what_the_class_name_selects():
    model = Model()
    found = block_linears(model)
    assert [*found] == BLOCK_LINEARS
    assert all(model.get_submodule(name) is module for name, module in found.items())


def test_the_head_is_pruned_only_when_named():
    assert names(Model(), ["Linear", "up_proj"]) == [*BLOCK_LINEARS, "up_proj"]
    assert names(Model(), [r"re:^up_proj$"]) == ["up_proj"]


def test_blocks_stand_for_their_linears():
    assert names(Model(), ["Block"]) == BLOCK_LINEARS
    assert names(Model(), ["blocks.1"]) == BLOCK_LINEARS[2:]


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        (["blocks.0.q_proj"], BLOCK_LINEARS[1:]),
        (["re:.*q_proj"], ["blocks.0.up_proj", "blocks.1.up_proj"]),
        (["blocks.0"], BLOCK_LINEARS[2:]),
        (["up_proj"], BLOCK_LINEARS),
    ],
)
def test_ignored_modules_and_what_is_in_them_are_left_alone(ignore, left):
    assert names(Model(), ["Linear"], ignore) == left


def test_each_target_knows_its_block():
    targets, blocks = resolve_targets(Model(), ["Linear", "up_proj"], [])
    assert [target.block for target in targets] == [0, 0, 1, 1, None]
    assert len(blocks) == 2


def test_nothing_matched_is_an_error():
    with pytest.raises(UsageError, match=r"\['Conv1d'\].*select no Linear of Model.*Linear"):
        names(Model(), ["Conv1d"])
    with pytest.raises(UsageError, match="select no Linear"):
        names(Model(), ["Linear"], ["Linear"])


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UsageError, match="no list of decoder blocks"):
        find_decoder_blocks(torch.nn.Linear(2, 2))


def moe_model(**fields):
    """A real mixture of experts: 2 layers with 8 experts, fused into one parameter."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        **fields,
    )
    return Qwen3MoeForCausalLM(config)


def unfused(model):
    """The same with one Linear for each expert's projection, as llm-compressor and remote code have them."""
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = torch.nn.ModuleList(Block() for _ in range(8))
    return model


@pytest.mark.parametrize("change", [lambda model: model, unfused])
def test_the_blocks_of_a_mixture_are_its_layers_not_its_experts(change):
    name, blocks = find_decoder_blocks(change(moe_model()))
    assert name == "model.layers"
    assert len(blocks) == 2


@pytest.mark.parametrize("change", [lambda model: model, unfused])
def test_routed_experts_are_refused_in_one_line_with_a_remedy_that_works(change):
    # The first layer is dense: experts further in are found too.
    model = change(moe_model(mlp_only_layers=[0]))
    with pytest.raises(UsageError, match=r"model\.layers\.1\.mlp\.experts holds 8 routed experts.*`ignore`") as caught:
        names(model, ["Linear"])
    assert "\n" not in str(caught.value)
    remedy = str(caught.value).split('"')[1]
    left = names(model, ["Linear"], [remedy])
    assert left == [f"model.layers.{layer}.self_attn.{x}_proj" for layer in (0, 1) for x in "qkvo"]


def test_a_config_without_matching_blocks_is_refused():
    model = moe_model()
    model.config.num_hidden_layers = 3
    with pytest.raises(UsageError, match="no list of 3 decoder blocks, as its config says"):
        find_decoder_blocks(model)


def test_blocks_of_several_classes_are_found_by_their_number():
    model = Model()
    model.config = type("Config", (), {"n_layers": 2})()
    model.blocks[1] = torch.nn.Sequential(torch.nn.Linear(4, 4))
    assert find_decoder_blocks(model)[0] == "blocks"

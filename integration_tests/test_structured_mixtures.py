"""Structured pruning of mixtures of experts: heads, common channels and blocks go, routed experts stay as they are."""

import json

import pytest
import torch
from official_checkpoints import write_llada2, write_llada_moe

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.block_sizes import BlockSizes, block_sizes
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.modifiers.experts import ExpertPruningModifier
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

QUICK = {"diffusion_steps": 2, "sample_interval": 1}
WINDOWS = torch.randint(3, 88, (2, 32), generator=torch.Generator().manual_seed(0))


def structured(**fields):
    return SinkAwareStructuredModifier(**QUICK, **fields)


def logits(model):
    with torch.no_grad():
        return model(WINDOWS[:, :16]).logits


@pytest.fixture
def llada2(tmp_path):
    """A dense block of 72 channels, two of 12 experts and a shared one of 32; 4 query heads, 2 key and value heads."""
    write_llada2(tmp_path, num_hidden_layers=3, use_qkv_bias=True)
    return tmp_path


@pytest.fixture
def llada_moe(tmp_path):
    """Three blocks of 6 experts; 6 heads."""
    write_llada_moe(tmp_path, num_hidden_layers=3, moe_layer_freq=[1, 1, 1])
    return tmp_path


def with_units_zeroed(folder, small, modifier):
    """The dense model with the columns of all removed units zero, and those that stay as in the small model."""
    dense = load_model(folder, torch.float32)
    for unit in modifier._units:
        columns = unit.group.columns(modifier._kept[unit.name])
        weight = torch.zeros_like(dense.get_submodule(unit.name).weight)
        weight[:, columns] = small.get_submodule(unit.name).weight.detach()
        dense.get_submodule(unit.name).weight.data = weight
    return dense


def test_llada2_computes_what_the_dense_model_does_with_the_units_zeroed(llada2, tokenizer, tmp_path):
    model = load_model(llada2, torch.float32)
    before = {name: linear.weight.clone() for name, linear in block_linears(model).items() if ".experts." in name}
    modifier = structured(mlp_channels=[0.5, 0.25, 16], attention_heads=2)
    run_oneshot(model, tokenizer, modifier, WINDOWS)
    assert block_sizes(model) == [BlockSizes(40, 2, 1), BlockSizes(32, 2, 1, 12, 24), BlockSizes(32, 2, 1, 12, 16)]
    reference = with_units_zeroed(llada2, model, modifier)
    # Float32 sums over other numbers of terms.
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(weight, model.get_submodule(name).weight) for name, weight in before.items())
    model.save_pretrained(tmp_path / "small")
    again = load_model(tmp_path / "small", torch.float32)
    assert block_sizes(again) == block_sizes(model)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


def test_llada_moe_loses_heads_and_blocks(llada_moe, tokenizer, tmp_path):
    model = load_model(llada_moe, torch.float32)
    # A block that adds almost nothing.
    layer = model.model.layers[1]
    for linear in (layer.self_attn.o_proj, *(expert.down_proj for expert in layer.mlp.experts)):
        linear.weight.data *= 1e-3
    run_oneshot(model, tokenizer, structured(attention_heads=[2, 2, 4], blocks=1), WINDOWS)
    assert block_sizes(model) == [BlockSizes(40, 4, 4, 6), BlockSizes(40, 2, 2, 6)]
    model.save_pretrained(tmp_path / "small")
    saved = json.loads((tmp_path / "small/config.json").read_text())
    assert (saved["moe_layer_freq"], saved["num_hidden_layers"]) == ([1, 1], 2)
    torch.testing.assert_close(logits(load_model(tmp_path / "small", torch.float32)), logits(model))


@pytest.mark.parametrize("within_block", ["sequential", "parallel"])
@pytest.mark.parametrize("family", ["llada2", "llada_moe"])
def test_all_experts_of_a_block_lose_as_many_channels_each_its_own(family, within_block, tokenizer, tmp_path, request):
    folder = request.getfixturevalue(family)
    model = load_model(folder, torch.float32)
    width = block_sizes(model)[-1].mlp_channels
    # Hessians of a few experts at once only: those of 40 channels take twice 6400 bytes.
    fields = {"expert_hessian_gb": 3e-5, "min_expert_tokens": 4, "within_block": within_block}
    modifier = structured(expert_channels=[0, 0.5, width - 8], attention_heads=2, **fields)
    run_oneshot(model, tokenizer, modifier, WINDOWS)
    sizes = block_sizes(model)
    assert [size.mlp_channels for size in sizes[1:]] == [16 if family == "llada2" else 24, 8]
    reference = with_units_zeroed(folder, model, modifier)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    kept = [modifier._kept[unit.name] for unit in modifier._units if unit.kind == "expert_channels" and unit.block == 1]
    assert len(kept) == sizes[1].experts
    assert len({tuple(each.tolist()) for each in kept}) > 1
    model.save_pretrained(tmp_path / "small")
    again = load_model(tmp_path / "small", torch.float32)
    assert block_sizes(again) == sizes
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


def test_the_channels_that_stay_are_those_that_the_routed_tokens_need(llada_moe, tokenizer):
    """Wanda's score with plain sums over an expert's own tokens, each with the router's weight."""
    dense, model = (load_model(llada_moe, torch.float32) for _ in range(2))
    fields = {"score": "wanda", "compensate": False, "calibrate_on": "clean", "min_expert_tokens": 0, "sink_std": 1e6}
    modifier = structured(expert_channels=[16, 0, 0], **fields)
    run_oneshot(model, tokenizer, modifier, WINDOWS)
    layer, inputs, routing = dense.model.layers[0].mlp, {}, []
    for number, expert in enumerate(layer.experts):
        expert.down_proj.register_forward_pre_hook(lambda _m, args, number=number: inputs.update({number: args[0]}))
    layer.gate.register_forward_hook(lambda _m, _args, found: routing.append(found))
    with torch.no_grad():
        dense(WINDOWS)
        for number, expert in enumerate(layer.experts):
            _, weights = routing[0].rows_of(number)
            moment = (inputs[number] * weights[:, None]).pow(2).sum(0)
            # With the modifier's dampening.
            expected = (expert.down_proj.weight.pow(2).sum(0) * (moment + 0.01 * moment.mean())).topk(24).indices
            kept = modifier._kept[f"model.layers.0.mlp.experts.{number}.down_proj"]
            assert set(kept.tolist()) == set(expected.tolist()), number


def test_with_experts_and_single_weights_removed_in_one_recipe(llada2, tokenizer, tmp_path):
    model = load_model(llada2, torch.float32)
    recipe = [
        structured(mlp_channels=0.5, blocks=1),
        ExpertPruningModifier(experts=4),
        SinkAwareWandaModifier(mask_structure="2:4", **QUICK),
    ]
    run_oneshot(model, tokenizer, recipe, WINDOWS)
    sizes = block_sizes(model)
    assert len(sizes) == 2
    assert all(size.common_channels in (40, 16) and size.experts in (0, 8) for size in sizes)
    for name, linear in block_linears(model).items():
        assert bool(((linear.weight.unflatten(1, (-1, 4)) == 0).sum(-1) >= 2).all()), name
    model.save_pretrained(tmp_path / "dense")
    convert_checkpoint(tmp_path / "dense", tmp_path / "sparse", "sparse-24-bitmask", progress=False)
    again = load_model(tmp_path / "sparse", torch.float32)
    assert block_sizes(again) == sizes
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("allocation", ["error", "search"])
def test_a_budget_of_parameters(allocation, llada2, tokenizer):
    dense, model = (load_model(llada2, torch.float32) for _ in range(2))
    modifier = structured(allocation=allocation, budget="1.1x", budget_of="parameters", search_budget=4000)
    run_oneshot(model, tokenizer, modifier, WINDOWS)
    count = [sum(parameter.numel() for parameter in each.parameters()) for each in (dense, model)]
    # A step is a few hundred of 108 thousand parameters.
    assert 1.1 <= count[0] / count[1] < 1.13


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (
            "llada2",
            {"expert_channels": [8, 8, 8]},
            "expert_channels: decoder block 0 has no routed experts",
        ),
        ("llada2", {"expert_channels": 5}, "expert_channels 5 leaves 27 of 32 channels of each expert.*: 24"),
        (
            "llada_moe",
            {"mlp_channels": 0.5},
            "mlp_channels: every decoder block has routed experts only",
        ),
        (
            "llada_moe",
            {"mlp_channels": [0, 0.5, 0], "attention_heads": 2},
            "mlp_channels: decoder block 1 has routed experts only; .*`expert_channels` for theirs, or remove",
        ),
        ("llada2", {"budget": "1.2x", "allocation": "error"}, "budget_of latency isn't known for routed experts"),
        (
            "llada2",
            {"budget": "1.2x", "allocation": "search", "budget_of": "flops"},
            "budget_of flops isn't known for routed experts, .*use `budget_of: parameters`",
        ),
        (
            "llada2",
            {"attention_heads": 1},
            "attention_heads 1 leaves 3 of 4 .*share a key and value head",
        ),
    ],
)
def test_what_is_not_removed_is_refused_before_any_pass(family, fields, message, tokenizer, request, monkeypatch):
    monkeypatch.setattr(SinkAwareStructuredModifier, "_calibrate_and_prune", lambda *_: pytest.fail("a pass was run"))
    model = load_model(request.getfixturevalue(family), torch.float32)
    sizes = block_sizes(model)
    with pytest.raises(UsageError, match=message) as caught:
        run_oneshot(model, tokenizer, structured(**fields), WINDOWS)
    assert "\n" not in str(caught.value)
    assert block_sizes(model) == sizes

"""Wrong input to structured pruning: one clear line each before any pass, the weights untouched."""

import pytest
import torch
from llmcompressor.modifiers.quantization import QuantizationModifier
from official_checkpoints import write_dream
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier as Structured
from sinkprune_plugin.modifiers.unit_targets import resolve_units


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "nothing to remove; give `mlp_channels`"),
        ({"mlp_channels": 0, "attention_heads": [0, 0]}, "nothing to remove"),
        ({"mlp_channels": 1.0}, r"mlp_channels 1 is neither a share to remove in \[0, 1\) nor a whole number"),
        ({"attention_heads": -0.1}, r"attention_heads -0\.1 is neither a share"),
        ({"blocks": 1.5}, r"blocks 1\.5 is neither a share"),
        ({"mlp_channels": [0.5, -3]}, "mlp_channels -3 is neither a share"),
        ({"mlp_channels": float("nan")}, "mlp_channels nan is neither a share"),
        ({"mlp_channels": 0.5, "granularity": {"channels": 0}}, "granularity of channels is 0"),
        ({"mlp_channels": 0.5, "granularity": {"layers": 2}}, "granularity"),
        ({"mlp_channels": 0.5, "sparsity": 0.5}, "no field `sparsity`: units are removed"),
        ({"mlp_channels": 0.5, "mask_structure": "2:4"}, "no field `mask_structure`: .*N:M follow in the recipe"),
        ({"mlp_channels": 0.5, "targets": ["Linear"]}, "no field `targets`: .*`ignore` leaves"),
        ({"expert_channels": 1.5}, r"expert_channels 1\.5 is neither a share"),
        (
            {"expert_channels": 0.5, "mlp_channels": 0.5, "allocation": "error"},
            "allocation error doesn't choose widths for experts, .*a SinkAwareStructuredModifier of its own",
        ),
        ({"mlp_channels": 0.5, "compensate": False}, "score obs prices the removal"),
        ({"mlp_channels": 0.5, "score": "taylor"}, "magnitude"),
        ({"mlp_channels": [0.5, 0.4], "allocation": "error"}, "which a list fixes"),
        ({"blocks": 1, "allocation": "error"}, "spreads removed units over the blocks and none are removed"),
        ({"budget": "1.5x"}, "a budget is met by choosing widths; set `allocation: search`"),
        ({"budget": "1.5", "allocation": "search"}, r'budget "1\.5" isn\'t a ratio .*"1\.5x"'),
        ({"budget": "0.5x", "allocation": "search"}, "a ratio of dense to pruned above 1"),
        ({"budget": "2x", "allocation": "search", "mlp_channels": 0.5}, "both say how much is removed"),
    ],
)
def test_fields_that_contradict(fields, message):
    with pytest.raises(ValidationError, match=message):
        Structured(**fields)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([Structured(mlp_channels=100)], r"mlp_channels 100 leaves 412 of 512 MLP channels.*can stay: 408 and 416"),
        ([Structured(mlp_channels=0.999)], r"leaves 0\.512 of 512 MLP channels.*can stay: 8"),
        ([Structured(mlp_channels=0.5, granularity={"channels": 1024})], r"granularity 1024\); the nearest.*: 512"),
        ([Structured(attention_heads=6)], r"attention_heads 6 leaves 0 of 6 attention heads.*can stay: 1"),
        ([Structured(blocks=6)], r"blocks 6 would remove 6 of 6 .*nearest number is `blocks: 5`"),
        ([Structured(blocks=0.01)], r"blocks 0\.01 would remove 0 of 6 .*nearest number is `blocks: 1`"),
        ([Structured(mlp_channels=[0.5, 0.5])], "mlp_channels has 2 values, but the model has 6 decoder blocks"),
        ([Structured(mlp_channels=0.5, ignore=["re:.*"])], "leaves no units of LLaDAModelLM to remove"),
        (
            [Structured(mlp_channels=0.3), SinkAwareSparseGPTModifier(mask_structure="8:32")],
            r"mask_structure 8:32 of SinkAwareSparseGPTModifier needs columns in groups of 32.*left with 360; "
            r"set `granularity: {channels: 32}`",
        ),
        (
            [Structured(mlp_channels=0.3), QuantizationModifier(scheme="W4A16", targets=[r"re:.*\.blocks\..*ff_out"])],
            r"group size of QuantizationModifier needs columns in groups of 128.*set `granularity: {channels: 128}`",
        ),
        (
            [Structured(blocks=1), SinkAwareSparseGPTModifier(sparsity=[0.5] * 6)],
            "sparsity of SinkAwareSparseGPTModifier has 6 values, but 5 decoder blocks stay",
        ),
    ],
)
def test_what_the_model_or_the_recipe_does_not_allow(recipe, message, model, tokenizer, golden_windows, monkeypatch):
    monkeypatch.setattr(Structured, "_calibrate_and_prune", lambda *_: pytest.fail("a pass was run"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        run_oneshot(model, tokenizer, recipe, golden_windows[:1, :64])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)


def test_groups_of_query_heads_name_the_nearest_numbers(tmp_path):
    write_dream(tmp_path, num_attention_heads=14, num_key_value_heads=7)
    with pytest.raises(UsageError, match=r"attention_heads 3 leaves 11 of 14.*share a key and value head.*10 and 12"):
        run_oneshot(load_model(tmp_path), None, Structured(attention_heads=3), torch.arange(3, 35).view(1, 32))


def test_shared_weights(model, tokenizer, golden_windows):
    blocks = find_decoder_blocks(model)[1]
    blocks[1].ff_out.weight = blocks[0].ff_out.weight
    with pytest.raises(UsageError, match=r"blocks\.0\.ff_out\.weight is shared with another module"):
        run_oneshot(model, tokenizer, Structured(mlp_channels=0.5), golden_windows[:1, :64])


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("llama", r"model_type 'llama'\) has no units in .*catalogue\.py.*docs/adding-a-family\.md says how to add"),
        ("Dream", "isn't this package's class for Dream.*load the model without remote code"),
    ],
)
def test_a_family_without_units_and_a_foreign_class(model_type, message):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.config.model_type = model_type
    with pytest.raises(UsageError, match=message):
        resolve_units(model, [], {})

"""Wrong input to the modifiers in oneshot(): one clear line each, the weights untouched."""

import pytest
import torch
from llmcompressor import oneshot
from pydantic import ValidationError
from torch.utils.data import DataLoader

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

BOTH = [SinkAwareWandaModifier, SinkAwareSparseGPTModifier]
QUICK = {"diffusion_steps": 4, "sample_interval": 2}


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.7}, r"sparsity 1\.7 is outside \(0, 1\)"),
        ({}, "sparsity is missing"),
        ({"sparsity": 0.3, "mask_structure": "2:4"}, "sparsity 0.3 contradicts mask_structure 2:4"),
        ({"sparsity": 0.5, "mask_structure": "4:2"}, '"4:2" removes 4 of every 2'),
        ({"sparsity": 0.5, "mask_structure": "2:0"}, '"2:0" removes 2 of every 0'),
        ({"sparsity": 0.5, "sink_scope": "some"}, "all"),
        ({"sparsity": 0.5, "diffusion_steps": 0}, "diffusion_steps"),
        ({"sparsity": 0.5, "sample_interval": -1}, "sample_interval"),
        ({"sparsity": 0.5, "diffusion_steps": 5, "sample_interval": 6}, "sample_interval"),
        ({"sparsity": 0.5, "sparsity_profile": "owl"}, "doesn't support `sparsity_profile`.*list with one value"),
        ({"sparsity": 0.5, "timestep_weighting": "cubic"}, "inverse_square"),
        ({"sparsity": 0.5, "no_such_field": 1}, "no_such_field"),
        ({"sparsity": 0.5, "save_format": "sparse-24-bitmask"}, "needs mask_structure 2:4, not 0:0"),
        ({"sparsity": float("nan")}, r"sparsity nan is outside \(0, 1\)"),
        ({"sparsity": 0.5, "noise_eps": float("nan")}, "noise_eps\n.*finite"),
        ({"sparsity": 0.5, "sink_std": -1.0}, "sink_std\n.*greater than or equal to 0"),
        ({"sparsity": 0.5, "sink_std": float("inf")}, "sink_std\n.*finite"),
        ({"sparsity": 0.5, "sink_alpha": float("inf")}, "sink_alpha\n.*finite"),
        ({"sparsity": 0.5, "sink_alpha": 0.0}, "sink_alpha\n.*greater than 0"),
        ({"sparsity": 0.5, "sink_persistence": 0.0}, "sink_persistence\n.*greater than 0"),
        ({"sparsity": 0.5, "sink_persistence": 1.5}, "sink_persistence\n.*less than or equal to 1"),
        ({"sparsity": [0.5, 0.6], "allocation": "early_sparser"}, "a list of sparsities fixes"),
        ({"mask_structure": "2:4", "allocation": "late_sparser"}, "mask_structure 2:4 fixes"),
        ({"sparsity": 0.5, "save_format": "os:system"}, "sparse-24-bitmask"),
    ],
)
def test_fields_out_of_range_are_refused(cls, fields, message):
    with pytest.raises(ValidationError, match=message):
        cls(**fields)


def test_combinations_of_sparsegpt():
    with pytest.raises(ValidationError, match=r"dampening_frac\n.*finite"):
        SinkAwareSparseGPTModifier(sparsity=0.5, dampening_frac=float("inf"))
    with pytest.raises(ValidationError, match="always propagates error"):
        SinkAwareSparseGPTModifier(sparsity=0.5, propagate_error=False)
    with pytest.raises(ValidationError, match="clean samples have no timestep"):
        SinkAwareSparseGPTModifier(sparsity=0.5, calibrate_on="clean", timestep_weighting="inverse")
    assert SinkAwareSparseGPTModifier(sparsity=0.5, propagate_error=True).sparsity == 0.5


def refused(model, modifier, message, tokenizer, windows):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=message) as caught:
        run_oneshot(model, tokenizer, modifier, windows)
    assert "\n" not in str(caught.value)
    for key, value in model.state_dict().items():
        assert torch.equal(before[key], value), key
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@pytest.mark.parametrize("cls", BOTH)
def test_model_and_targets(cls, model, tokenizer, golden_windows):
    windows = golden_windows[:1]
    refused(model, cls(sparsity=0.5, targets=["Conv9"], **QUICK), "select no Linear", tokenizer, windows)
    refused(
        model,
        cls(sparsity=3 / 5, mask_structure="3:5", **QUICK),
        r"blocks\.0\.\w+ has 192 input columns.*groups of 5",
        tokenizer,
        windows,
    )
    refused(
        model, cls(sparsity=[0.5, 0.5], **QUICK), "2 values, but the model has 6 decoder blocks", tokenizer, windows
    )
    refused(model, cls(sparsity=0.5, mask_token_id=9999, **QUICK), "9999.*vocabulary of 2048", tokenizer, windows)


@pytest.mark.parametrize("cls", BOTH)
def test_calibration_data(cls, model, tokenizer, golden_windows):
    refused(
        model,
        cls(sparsity=0.5, **QUICK),
        "all 2 calibration samples have fewer than 8 tokens",
        tokenizer,
        golden_windows[:2, :7],
    )
    with pytest.raises(UsageError, match="needs calibration data and got none"):
        oneshot(model=model, tokenizer=tokenizer, recipe=[cls(sparsity=0.5, **QUICK)])
    with pytest.raises(UsageError, match="without `input_ids`"):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=DataLoader([{"text": "x"}]),
            recipe=[cls(sparsity=0.5, **QUICK)],
        )


@pytest.mark.parametrize("cls", BOTH)
def test_an_unknown_family_is_named_with_the_way_to_add_one(cls, tokenizer, golden_windows, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=2048, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    refused(
        model, cls(sparsity=0.5, **QUICK), "'llama' is no known family.*adding-a-family", tokenizer, golden_windows[:1]
    )


@pytest.mark.parametrize("cls", BOTH)
def test_a_target_that_is_never_reached(cls, model, tokenizer, golden_windows):
    block = model.model.transformer.blocks[0]
    block.spare_proj = torch.nn.Linear(192, 192)
    refused(
        model, cls(sparsity=0.5, **QUICK), r"never reached 1 target\(s\): .*spare_proj", tokenizer, golden_windows[:1]
    )


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(cls, value, model, tokenizer, golden_windows):
    with torch.no_grad():
        model.model.transformer.blocks[2].ff_norm.weight[3] = value
    windows = golden_windows[:1]
    with pytest.raises(UsageError, match=r"batch 0 (has NaN or Inf|is not finite)"):
        run_oneshot(model, tokenizer, cls(sparsity=0.5, **QUICK), windows)


@pytest.mark.parametrize("cls", BOTH)
def test_attention_that_cannot_be_intercepted(cls, model, tokenizer, golden_windows, monkeypatch):
    """A block that computes softmax itself, as eager remote code does."""

    def eager(self, hidden_states, *args, **kwargs):
        q, k = self.q_proj(hidden_states), self.k_proj(hidden_states)
        return hidden_states + self.attn_out((q @ k.transpose(-1, -2)).softmax(-1) @ self.v_proj(hidden_states))

    monkeypatch.setattr(type(model.model.transformer.blocks[0]), "forward", eager)
    refused(model, cls(sparsity=0.5, **QUICK), "attn_implementation|sdpa", tokenizer, golden_windows[:1])


def test_quantized_weights_are_refused(model, tokenizer, golden_windows):
    linear = model.model.transformer.blocks[0].q_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UsageError, match=r"q_proj has torch.float8_e4m3fn weights; prune before quantizing"):
        run_oneshot(model, tokenizer, SinkAwareWandaModifier(sparsity=0.5, **QUICK), golden_windows[:1])

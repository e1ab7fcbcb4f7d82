"""A mixture of experts in oneshot(), which splits fused experts before the modifiers see the model."""

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from sinkprune_plugin.diffusion import DiffusionFamily
from sinkprune_plugin.diffusion.families import _FAMILIES
from sinkprune_plugin.modifiers.blockwise_recovery import BlockwiseRecoveryModifier
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

QUICK = {"diffusion_steps": 4, "sample_interval": 2}


@pytest.fixture
def mixture(monkeypatch, tmp_path):
    """Mixtral, 2 layers with 8 experts, registered as a family for the length of a test."""
    monkeypatch.setitem(_FAMILIES, "mixture", DiffusionFamily("mixture", ("mixtral",), default_mask_token_id=2))
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    return MixtralForCausalLM.from_pretrained(tmp_path).eval()


def test_its_experts_are_pruned_on_the_tokens_that_are_routed_to_them(mixture, tokenizer, golden_windows):
    modifier = SinkAwareWandaModifier(sparsity=0.5, save_format="dense", **QUICK)
    run_oneshot(mixture, tokenizer, modifier, golden_windows[:1])
    assert sum("experts" in name for name in linears(mixture)) == 2 * 8 * 3
    for name, module in linears(mixture).items():
        if "lm_head" not in name:
            assert float((module.weight == 0).float().mean()) == 0.5, name


def test_blockwise_recovery_trains_its_experts_and_keeps_their_zeros(mixture, tokenizer, golden_windows):
    recovery = BlockwiseRecoveryModifier(epochs=2, held_out=0.0, step_windows=2, **QUICK)
    pruned = {}

    class Noting(SinkAwareWandaModifier):
        def _log_summary(self, seconds):
            pruned.update({name: module.weight.clone() for name, module in linears(mixture).items()})
            super()._log_summary(seconds)

    run_oneshot(mixture, tokenizer, [Noting(sparsity=0.5, **QUICK), recovery], golden_windows[:2, :48])
    for name, module in linears(mixture).items():
        assert torch.equal(module.weight == 0, pruned[name] == 0), name
        # 96 tokens in two passes go to two of eight experts each, so all get some.
        assert torch.equal(module.weight, pruned[name]) == ("lm_head" in name), name


def test_its_attention_is_pruned_where_the_experts_are_ignored(mixture, tokenizer, golden_windows):
    modifier = SinkAwareWandaModifier(sparsity=0.5, ignore=[r"re:.*\.mlp(\..*)?$"], save_format="dense", **QUICK)
    run_oneshot(mixture, tokenizer, modifier, golden_windows[:1])
    for name, module in linears(mixture).items():
        assert float((module.weight == 0).float().mean()) == (0.5 if "self_attn" in name else 0.0), name


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}

"""`allocation: error` and `search` for single weights of a mixture: experts are measured and searched over as well."""

import re

import pytest
import torch
from official_checkpoints import write_llada_moe

from sinkprune_plugin.loading import load_model
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier
from sinkprune_plugin.pruning import level_grid, search_rounds

QUICK = {"diffusion_steps": 4, "sample_interval": 2, "save_format": "dense"}
FAST = {SinkAwareADMMModifier: {"iterations": 2, "gradual_iterations": 1, "refine": "none"}}
ALL = [SinkAwareWandaModifier, SinkAwareSparseGPTModifier, SinkAwareADMMModifier]
# Two windows of 24 tokens at two timesteps; 4 candidates on one pass, 2 on two, 2 on all four.
ONE_ROUND = (4 * 1 + 2 * 2 + 2 * 4) * 24
# With a recovery step on eight passes that count five times, and the dense model's run on the four measured ones.
RECOVERED_ROUND = ONE_ROUND + 2 * (5 * 8 + 4) * 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense layer and two of six experts, so blocks of different sizes."""
    folder = tmp_path_factory.mktemp("moe")
    sizes = {"num_hidden_layers": 3, "moe_layer_freq": [0, 1, 1]}
    write_llada_moe(folder, vocab_size=2048, num_experts=6, num_experts_per_tok=2, torch_dtype="float32", **sizes)
    return folder


@pytest.fixture(autouse=True)
def small_search(monkeypatch):
    """Five levels instead of eleven, and a quarter of the candidates."""
    monkeypatch.setattr(level_grid, "LEVELS_ASIDE", 2)
    for name, value in {"OFFSPRING": 4, "SECOND": 2, "LAST": 1}.items():
        monkeypatch.setattr(search_rounds, name, value)


def pruned_by(modifier, folder, tokenizer):
    model = load_model(folder, torch.float32)
    windows = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
    run_oneshot(model, tokenizer, modifier, windows)
    return model


def shares_of_zeros(model):
    """Of each block, and of all."""
    counts = []
    for layer in model.model.layers:
        weights = [module.weight for module in layer.modules() if isinstance(module, torch.nn.Linear)]
        counts.append((sum(int((W == 0).sum()) for W in weights), sum(W.numel() for W in weights)))
    return [zeros / size for zeros, size in counts], sum(zeros for zeros, _ in counts) / sum(size for _, size in counts)


@pytest.mark.parametrize("allocation", ["error", "search"])
@pytest.mark.parametrize("cls", ALL)
def test_the_total_over_all_experts_is_exact(cls, allocation, folder, tokenizer):
    modifier = cls(sparsity=0.75, allocation=allocation, search_budget=2 * ONE_ROUND, **QUICK, **FAST.get(cls, {}))
    of_blocks, total = shares_of_zeros(pruned_by(modifier, folder, tokenizer))
    # Wanda removes floor(40 · s) to floor(72 · s) weights of each row; the others floor(n · s) of 1920 and more.
    close = 0.025 if cls is SinkAwareWandaModifier else 6e-4
    assert of_blocks == pytest.approx(modifier.allocation, abs=close)
    assert total == pytest.approx(0.75, abs=close)
    if allocation == "error":
        assert max(modifier.allocation) > min(modifier.allocation)
    else:
        note = modifier.allocation_note
        assert note.startswith(f"search: {2 * ONE_ROUND} forward tokens in 2 rounds")
        best, uniform = map(float, re.search(r"predictions (\S+) nats per token \(uniform (\S+)\)", note).groups())
        assert best <= uniform


def test_experts_in_groups_give_the_same_allocation(folder, tokenizer):
    """With Hessians of one expert at once (48 and 40 columns in float32, 15.6 kB) instead of all six."""
    found = []
    for limit in (8.0, 1.6e-5):
        modifier = SinkAwareSparseGPTModifier(sparsity=0.75, allocation="error", expert_hessian_gb=limit, **QUICK)
        pruned_by(modifier, folder, tokenizer)
        found.append(modifier.allocation)
    assert found[0] == pytest.approx(found[1], abs=1e-9)


def test_finalists_with_experts_are_recovered(folder, tokenizer):
    modifier = SinkAwareWandaModifier(
        sparsity=0.75, allocation="search", search_budget=RECOVERED_ROUND, search_recovery_steps=1, **QUICK
    )
    of_blocks, _ = shares_of_zeros(pruned_by(modifier, folder, tokenizer))
    assert of_blocks == pytest.approx(modifier.allocation, abs=0.025)
    assert f"search: {RECOVERED_ROUND} forward tokens in 1 rounds, 1 recovery steps" in modifier.allocation_note

"""How often an offloaded model's weights are onloaded, counted where compressed-tensors does it."""

import pytest
import torch
from compressed_tensors.offload.cache import CPUCache

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.modifiers import hessian_base
from sinkprune_plugin.modifiers import wanda as wanda_base
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

CASES = [
    (SinkAwareWandaModifier, {}),
    (SinkAwareWandaModifier, {"propagate_error": True}),
    (SinkAwareSparseGPTModifier, {}),
    (SinkAwareSparseGPTModifier, {"calibrate_on": "clean"}),
    (SinkAwareSparseGPTModifier, {"offload_hessians": True}),
    (SinkAwareADMMModifier, {}),
    (SinkAwareADMMModifier, {"within_block": "parallel", "target": "dense", "offload_hessians": True}),
]


@pytest.fixture
def traffic(monkeypatch):
    """Bytes onloaded since the test began; each time a copy, as from another device."""
    brought_in = []
    original = CPUCache.onload

    def onload(self, offloaded):
        onloaded = original(self, offloaded)
        if onloaded is None:
            return None
        brought_in.append(onloaded.numel() * onloaded.element_size())
        copy = onloaded.detach().clone()
        return torch.nn.Parameter(copy, requires_grad=False) if isinstance(onloaded, torch.nn.Parameter) else copy

    monkeypatch.setattr(CPUCache, "onload", onload)
    return brought_in


@pytest.mark.parametrize(("cls", "fields"), CASES)
def test_weights_come_in_once_for_each_sweep(cls, fields, tokenizer, golden_windows, traffic, monkeypatch):
    """20 passes: bytes over the whole run at most 1.2 × three sweeps, and no more with twice the samples."""
    # No model that is offloaded is small enough for one sweep.
    monkeypatch.setattr(wanda_base, "ONE_SWEEP_BYTES", 0)
    moved = []
    for samples in (2, 4):
        model = load_model(EMBEDDED_MODEL, torch.float32)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        traffic.clear()
        run_oneshot(model, tokenizer, cls(sparsity=0.5, **fields), golden_windows[:samples, :32])
        moved.append(sum(traffic))
    assert moved[0] == moved[1]
    assert moved[0] <= 1.2 * 3 * size


@pytest.mark.parametrize(("cls", "fields"), CASES)
def test_offloaded_weights_get_the_same_zeros(cls, fields, tokenizer, golden_windows, request, monkeypatch):
    """What is onloaded is a copy here, so weights that aren't written back, or solved on a stale copy, show."""
    monkeypatch.setattr(wanda_base, "ONE_SWEEP_BYTES", 0)
    pruned = []
    for offloaded in (False, True):
        if offloaded:
            request.getfixturevalue("traffic")
        model = load_model(EMBEDDED_MODEL, torch.float32)
        modifier = cls(sparsity=0.5, diffusion_steps=4, sample_interval=2, **fields)
        run_oneshot(model, tokenizer, modifier, golden_windows[:2, :64])
        pruned.append(model.state_dict())
    assert all(torch.equal(pruned[0][name], pruned[1][name]) for name in pruned[0])


@pytest.mark.parametrize("samples", [1, 3])
def test_an_offloaded_hessian_moves_once_for_each_block(samples, model, tokenizer, golden_windows, monkeypatch):
    moved = []
    original = hessian_base._to_main_memory
    monkeypatch.setattr(hessian_base, "_to_main_memory", lambda H: (moved.append(H.shape), original(H))[1])
    modifier = SinkAwareSparseGPTModifier(sparsity=0.5, diffusion_steps=4, sample_interval=2, offload_hessians=True)
    run_oneshot(model, tokenizer, modifier, golden_windows[:samples, :32])
    # Four distinct inputs in each of six blocks, however many passes there were.
    assert len(moved) == 4 * 6

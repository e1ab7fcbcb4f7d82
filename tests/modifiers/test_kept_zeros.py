"""Zeros that a later modifier fills, in a module whose weight is brought in anew for every call."""

import torch
from compressed_tensors.offload import offload_module, update_offload_parameter
from compressed_tensors.offload.cache import CPUCache

from sinkprune_plugin.modifiers.kept_zeros import KeptZeros


class GPTQModifier:
    """Goes by its name."""


def test_zeros_are_put_back_before_each_call_that_follows_a_change(monkeypatch):
    """A weight brought in anew often has the address of the one before, and a version as new."""
    onload = CPUCache.onload
    monkeypatch.setattr(
        CPUCache,
        "onload",
        lambda self, offloaded: (
            None if offloaded is None else torch.nn.Parameter(onload(self, offloaded).detach().clone(), False)
        ),
    )
    linear = torch.nn.Linear(8, 4, bias=False).requires_grad_(False)
    pruned = torch.randn(4, 8)
    pruned[:, ::2] = 0.0
    offload_module(linear, torch.device("cpu"), torch.device("cpu"))
    update_offload_parameter(linear, "weight", pruned)
    kept = KeptZeros("SinkAwareWandaModifier", [GPTQModifier()])
    kept.remember("linear", linear, pruned)
    x = torch.randn(3, 8)
    for _ in range(20):
        linear(x)
        update_offload_parameter(linear, "weight", pruned + 1.0)
        torch.testing.assert_close(linear(x), x[:, 1::2] @ (pruned[:, 1::2] + 1.0).T)
    kept.finish()
    assert not linear._forward_pre_hooks
    assert bool((linear.weight[:, ::2] == 0).all())

"""Parity of attention mass and sink masks with the published program (commit 6ef32c9), on its recorded noisy inputs."""

import pytest
import torch
from golden_data import GOLDEN
from safetensors.torch import load_file

from sinkprune_plugin.sinks import capture_attention_mass, soft_sink_mask


@pytest.mark.parametrize("run", ["sink_wanda_50", "sink_sparsegpt_50"])
def test_mass_and_mask_equal_the_published_program(model, run):
    recorded = load_file(GOLDEN / f"sinks_{run}.safetensors")
    windows, steps, tokens = recorded["noisy_ids"].shape
    masses, masks = [], []
    # All ten timesteps of a window in one batch; the published program runs them one by one.
    for noisy_ids in recorded["noisy_ids"].long():
        with torch.no_grad(), capture_attention_mass() as capture:
            model(input_ids=noisy_ids)
        masses.append(capture.mass)
        masks.append(soft_sink_mask(capture.mass, sink_std=2.0, sink_alpha=5.0))
    assert torch.stack(masses).shape == (windows, steps, tokens)
    # Float32 on both sides: the order of sums over 6 layers, 6 heads and 256 queries differs, and batched products
    # round differently from single ones.
    torch.testing.assert_close(torch.stack(masses), recorded["sink_mass"], rtol=1e-4, atol=0)
    # Next to the threshold the sigmoid turns a difference of 1e-5 · mass into 5/4 of it.
    torch.testing.assert_close(torch.stack(masks), recorded["sink_mask"], rtol=0, atol=1e-3)


def test_the_layers_add_up(model, golden_windows):
    with torch.no_grad(), capture_attention_mass() as capture:
        model(input_ids=golden_windows[:2])
    config = model.config
    assert len(capture.layers) == config.num_hidden_layers
    # Every query hands out 1 in each head of each layer.
    total = config.num_hidden_layers * config.num_attention_heads * golden_windows.shape[1]
    torch.testing.assert_close(capture.mass.sum(dim=1), torch.full((2,), float(total)), rtol=1e-5, atol=0)

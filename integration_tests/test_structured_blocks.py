"""Structured pruning of a model that denoises block by block, with a budget of each kind."""

import pytest
import torch
from loguru import logger
from nemotron_labs_checkpoints import write_nemotron_labs

from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.block_sizes import block_sizes
from sinkprune_plugin.modifiers import block_latency
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier

WINDOWS = torch.randint(3, 40, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("budget_of", ["latency", "parameters", "flops"])
def test_a_budget_is_met_by_the_costs_it_is_counted_in(budget_of, tokenizer, tmp_path, monkeypatch):
    # Wide enough that a pass's time isn't all overhead, which channels don't change.
    write_nemotron_labs(tmp_path, num_hidden_layers=2, hidden_size=128, intermediate_size=2048, block_size=8)
    monkeypatch.setattr(block_latency, "SECONDS", 0.05)
    dense, model = (load_model(tmp_path, torch.float32) for _ in range(2))
    lines = []
    handle = logger.add(lambda line: lines.append(str(line)), level="INFO")
    fields = {"budget": "1.1x", "budget_of": budget_of, "granularity": {"channels": 256}}
    # The quickest score, as what is chosen doesn't matter here.
    fields |= {"score": "magnitude", "compensate": False, "diffusion_steps": 2, "sample_interval": 1}
    modifier = SinkAwareStructuredModifier(allocation="error", **fields)
    run_oneshot(model, tokenizer, modifier, WINDOWS)
    logger.remove(handle)
    (line,) = [line for line in lines if "widths chosen by error" in line]
    assert float(line.split("error, ")[1].split(f"x of {budget_of}")[0]) >= 1.1
    assert sum(size.mlp_channels for size in block_sizes(model)) < sum(size.mlp_channels for size in block_sizes(dense))
    assert model(WINDOWS).logits.isfinite().all()

"""A check of `sinkprune recover` that every family has to pass."""

import json

import torch
from command_line import run_here

from sinkprune_plugin.loading import load_model

__all__ = ["check_recovery_keeps_the_zeros"]


def check_recovery_keeps_the_zeros(dense, pruned, output, *, structure="2:4", changing=".mlp.experts."):
    """Recover a pruned model for two steps: its zeros and its format stay, weights of the ``changing`` ones don't."""
    short = ("--steps", 2, "--seq-len", 32, "--batch-size", 2, "--evaluations", 1, "--device", "cpu")
    done = run_here("recover", dense, pruned, "--output", output, *short)
    assert done.returncode == 0, done.stderr
    before, after = (json.loads(run_here("info", path, "--json").stdout) for path in (pruned, output))
    assert after["total"]["zeros"] == before["total"]["zeros"]
    assert (after["format"], after["total"]["structure"]) == (before["format"], structure)
    weights = [load_model(path, torch.float32).state_dict() for path in (pruned, output)]
    changed = [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])]
    assert any(changing in name for name in changed)

"""Which experts should go: ELBO perplexity of a mixture after expert pruning, with every score.

    python benchmarks/study_experts.py MODEL [--calibration TEXT] [--test TEXT] [--shares 0.25 0.5]

Each score prunes the same model on the same calibration windows; `random` removes experts at random, with as many seeds
as asked for. All are measured on the same windows of the test text with the same noise, so that differences are paired:
the table gives the change of the perplexity against REAP on clean text with a 95 % interval over the windows.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from study_statistics import paired_difference, perplexity

from sinkprune_plugin.diffusion import score_windows
from sinkprune_plugin.loading import load_model, load_tokenizer
from sinkprune_plugin.models.expert_lists import expert_counts, keep_experts, set_expert_counts
from sinkprune_plugin.modifiers import load_oneshot_flow
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows

REFERENCE = "reap, clean"
METHODS: dict[str, dict[str, Any]] = {
    "aimer": {"score": "aimer"},
    "magnitude": {"score": "magnitude"},
    "frequency, clean": {"score": "frequency", "calibrate_on": "clean"},
    "frequency, trajectory": {"score": "frequency"},
    REFERENCE: {"score": "reap", "calibrate_on": "clean"},
    # Sinks begin where no attention mass reaches.
    "reap, trajectory, sinks kept": {"score": "reap", "sink_std": 1e6},
    "reap, trajectory": {"score": "reap"},
    "reap, trajectory, allocation error": {"score": "reap", "allocation": "error"},
}


def losses(model: torch.nn.Module, windows: torch.Tensor, noises: int) -> list[float]:
    """Nats per token of each window."""
    scores = score_windows(model, windows, num_samples=noises, batch_size=8)
    return ((scores.nll / scores.p_mask).mean(dim=1) / scores.tokens).tolist()


def prune_at_random(model: Any, share: float, seed: int) -> None:
    """Remove this share of the experts of each block."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for index, count in expert_counts(model.config).items():
        order = torch.randperm(count, generator=generator).tolist()
        kept[index] = sorted(order[round(share * count) :])
        keep_experts(model, index, kept[index])
    set_expert_counts(model.config, {index: len(numbers) for index, numbers in kept.items()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, default=embedded_text("calibration"))
    parser.add_argument("--test", type=Path, default=embedded_text("test"))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--windows", type=int, default=32, help="test windows")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--noises", type=int, default=8, help="noise samples of each test window")
    parser.add_argument("--random", type=int, default=3, help="seeds of random choice")
    options = parser.parse_args(arguments)
    flow, tokenizer = load_oneshot_flow(), load_tokenizer(options.model)
    from sinkprune_plugin.modifiers.experts import ExpertPruningModifier

    calibration = token_windows(read_documents(options.calibration), tokenizer, options.seq_len, options.samples)
    test = token_windows(read_documents(options.test), tokenizer, options.seq_len, options.windows)
    dense = losses(load_model(options.model, torch.float32), test, options.noises)
    print(f"dense: {perplexity([dense]):.2f}", flush=True)
    rows = []
    for share in options.shares:
        found: dict[str, list[list[float]]] = {}
        seconds: dict[str, float] = {}
        for name, fields in METHODS.items():
            model = load_model(options.model, torch.float32)
            started = time.monotonic()
            flow.run_oneshot(model, tokenizer, ExpertPruningModifier(experts=share, **fields), calibration)
            seconds[name] = time.monotonic() - started
            found[name] = [losses(model, test, options.noises)]
        found["random"] = []
        for seed in range(options.random):
            model = load_model(options.model, torch.float32)
            prune_at_random(model, share, seed)
            found["random"].append(losses(model, test, options.noises))
        for name, runs in found.items():
            against = paired_difference(found[REFERENCE] * len(runs), runs)
            low, high = against.percent_ends
            change = f"{against.percent:+.1f} % ({low:+.1f} to {high:+.1f})"
            rows.append(
                {
                    "removed": share,
                    "method": name,
                    "perplexity": round(perplexity(runs), 2),
                    "percent": [round(value, 1) for value in (against.percent, low, high)],
                    "seconds": round(seconds.get(name, 0.0), 1),
                }
            )
            print(f"| {share:.0%} | {name} | {rows[-1]['perplexity']} | {change} |", flush=True)
    print(json.dumps({"dense": round(perplexity([dense]), 2), "model": options.model.name, "rows": rows}))


if __name__ == "__main__":
    main()

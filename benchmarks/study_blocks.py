"""Pruning a model that denoises block by block: ELBO perplexity after each method, on the same text and noise.

    python benchmarks/study_blocks.py MODEL [--seeds 3] [--patterns 50 75 2:4] [--methods NAME ...] [--against NAME]

MODEL is one that `tools/train_tiny_llada.py --block-length` makes, or any block-diffusion LM. A seed chooses the
calibration windows and the noise on them. Differences are paired: the table gives the change of the perplexity against
SparseGPT of llm-compressor (or another method) with a 95 % interval over the test windows, and its range over the
seeds.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from study_experts import losses
from study_statistics import in_percent, in_words, paired_difference, perplexity
from tqdm import tqdm

from sinkprune_plugin.loading import load_model, load_tokenizer
from sinkprune_plugin.modifiers import load_oneshot_flow
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.oneshot_flow import stock_modifier
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows

PATTERNS = {"50": (0.5, "0:0"), "75": (0.75, "0:0"), "2:4": (0.5, "2:4")}
# llm-compressor's own modifiers see a window as the model reads one: a causal context, and its last block open.
STOCK = {"Wanda": "WandaPruningModifier", "SparseGPT": "SparseGPTModifier"}
OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sink-aware Wanda, 1/t²": (SinkAwareWandaModifier, {"timestep_weighting": "inverse_square"}),
    "sink-aware SparseGPT": (SinkAwareSparseGPTModifier, {}),
    "sink-aware ADMM, clean": (SinkAwareADMMModifier, {"calibrate_on": "clean"}),
    # No position is so far above the mean.
    "ADMM, no sink mask": (SinkAwareADMMModifier, {"sink_std": 1e6}),
    "sink-aware ADMM": (SinkAwareADMMModifier, {}),
}
METHODS = (*STOCK, *OURS)


def modifier_of(method: str, pattern: str, seed: int) -> Any:
    """What prunes.

    :param method: one of :data:`METHODS`
    :param pattern: one of :data:`PATTERNS`
    :param seed: of the noise
    """
    sparsity, structure = PATTERNS[pattern]
    if method in STOCK:
        return stock_modifier(STOCK[method], sparsity, structure)
    kind, fields = OURS[method]
    return kind(sparsity=sparsity, mask_structure=structure, seed=seed, **fields)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--patterns", nargs="+", choices=[*PATTERNS], default=[*PATTERNS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--against", choices=METHODS, default="SparseGPT")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--windows", type=int, default=24, help="test windows")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--noises", type=int, default=8, help="noise samples of each test window")
    parser.add_argument("--seeds", type=int, default=1, help="of calibration windows and their noise")
    options = parser.parse_args(arguments)
    logger.remove()
    flow, tokenizer = load_oneshot_flow(), load_tokenizer(options.model)
    calibration = list(read_documents(embedded_text("calibration")))
    test = token_windows(read_documents(embedded_text("test")), tokenizer, options.seq_len, options.windows)

    def run(method: str, pattern: str, seed: int) -> list[float]:
        windows = token_windows(calibration, tokenizer, options.seq_len, options.samples, seed=seed)
        model = load_model(options.model, torch.float32)
        flow.run_oneshot(model, tokenizer, modifier_of(method, pattern, seed), windows)
        return losses(model, test, options.noises)

    dense = losses(load_model(options.model, torch.float32), test, options.noises)
    print(f"dense: {perplexity([dense]):.2f}", flush=True)
    methods = [options.against, *(name for name in options.methods if name != options.against)]
    rows: list[dict[str, Any]] = []
    progress = tqdm(total=len(options.patterns) * len(methods) * options.seeds, unit="run", disable=None)
    for pattern in options.patterns:
        reference: list[list[float]] = []
        for method in methods:
            runs = []
            for seed in range(options.seeds):
                runs.append(run(method, pattern, seed))
                progress.update()
            reference = reference or runs
            against = paired_difference(reference, runs)
            rows.append(
                {
                    "pattern": pattern,
                    "method": method,
                    "perplexity": round(perplexity(runs), 2),
                    **in_percent(against),
                }
            )
            print(f"| {pattern} | {method} | {rows[-1]['perplexity']} | {in_words(against)} |", flush=True)
    progress.close()
    print(json.dumps({"dense": round(perplexity([dense]), 2), "model": options.model.name, "rows": rows}))


if __name__ == "__main__":
    main()

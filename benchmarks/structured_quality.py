"""Quality of structured pruning on tiny-llada: channels, heads and blocks, scores, targets and allocations.

    python benchmarks/structured_quality.py                # a quarter of an hour on one core
    python benchmarks/structured_quality.py --only heads

Each row prunes tiny-llada without training, with the modifier's defaults but for the fields that its label names, on
the 16 windows of the golden runs, and gives the ELBO perplexity on their evaluation text, whose corruption is recorded.
Prints a table and ends in one JSON line.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch
from loguru import logger
from recovery import GOLDEN
from row_table import print_rows
from safetensors.torch import load_file
from tqdm import tqdm

from sinkprune_plugin.diffusion import perplexity_on
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier

# Kept widths of tiny-llada's 512 channels; the default, 64, is for models of real size.
STEP = {"granularity": {"channels": 8}}
HALF = {"mlp_channels": 0.5, **STEP}
ROWS: dict[str, dict[str, Any]] = {
    **{f"channels {share:.0%}": {"mlp_channels": share, **STEP} for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)},
    "channels 30%, target current": {"mlp_channels": 0.3, "target": "current", **STEP},
    "channels 50%, target current": {"target": "current", **HALF},
    "channels 50%, score wanda": {"score": "wanda", **HALF},
    "channels 50%, score magnitude": {"score": "magnitude", **HALF},
    "channels 50%, score wanda, no compensation": {"score": "wanda", "compensate": False, **HALF},
    "channels 50%, no sink mask": {"sink_std": 1e6, **HALF},
    **{f"channels 50%, seed {seed}": {"seed": seed, **HALF} for seed in (1, 2)},
    **{f"channels 50%, no sink mask, seed {seed}": {"sink_std": 1e6, "seed": seed, **HALF} for seed in (1, 2)},
    "channels 30%, no sink mask": {"mlp_channels": 0.3, "sink_std": 1e6, **STEP},
    "channels 50%, allocation error": {"allocation": "error", **HALF},
    "channels 50%, allocation search": {"allocation": "search", "search_budget": 262144, **HALF},
    **{f"heads {number} of 6": {"attention_heads": number / 6} for number in (1, 2, 3, 4)},
    "heads 2 of 6, target current": {"attention_heads": 2 / 6, "target": "current"},
    **{f"blocks {number} of 6": {"blocks": number} for number in (1, 2, 3)},
    "channels 30%, heads 1 of 6": {"mlp_channels": 0.3, "attention_heads": 1 / 6, **STEP},
    "channels 50%, heads 2 of 6": {"attention_heads": 2 / 6, **HALF},
}


def measure(fields: dict[str, Any]) -> dict[str, float]:
    """Prune and evaluate.

    :param fields: of the modifier
    :return: parameters, as a share of the dense model's; perplexity; seconds of pruning
    """
    model = load_model(EMBEDDED_MODEL, torch.float32)
    before = sum(parameter.numel() for parameter in model.parameters())
    windows = load_file(GOLDEN / "calibration.safetensors")["input_ids"].long()
    started = time.perf_counter()
    if fields:
        run_oneshot(model, load_tokenizer(EMBEDDED_MODEL), SinkAwareStructuredModifier(**fields), windows)
    seconds = time.perf_counter() - started
    recorded = load_file(GOLDEN / "evaluation.safetensors")
    clean, noisy = (recorded[name].long() for name in ("clean_ids", "noisy_ids"))
    perplexity, *_ = perplexity_on(model, clean, noisy, recorded["p_mask"], batch_size=16)
    left = sum(parameter.numel() for parameter in model.parameters()) / before
    return {"parameters": round(left, 4), "perplexity": round(perplexity, 2), "seconds": round(seconds, 1)}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", help="rows with TEXT in their label")
    arguments = parser.parse_args()
    logger.remove()
    chosen = {"dense": {}, **{label: fields for label, fields in ROWS.items() if (arguments.only or "") in label}}
    rows = []
    for label, fields in tqdm(chosen.items(), unit="row", disable=None):
        rows.append({"removed": label, **measure(fields)})
        tqdm.write(json.dumps(rows[-1]), file=sys.stderr)
    print_rows("structured pruning of tiny-llada, no training", rows, left=("removed",))
    sys.stdout.write(json.dumps({"rows": rows}) + "\n")


if __name__ == "__main__":
    main()

"""What blockwise recovery gives on tiny-llada, with few and with many windows, with and without held-out ones.

    python benchmarks/recovery_blockwise.py --text train.jsonl
    python benchmarks/recovery_blockwise.py --text train.jsonl --windows 128 --held-out 0.125 0 --cases 75%

Pruning is that of `recovery.py`, always on the 16 windows of the golden runs; the blocks are then fitted on so many
windows of the text, 16 being those of the golden runs again. Evaluation is the golden one.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from recovery import CASES, SEQ_LEN, calibration_windows, evaluate, prune
from row_table import print_rows

from sinkprune_plugin.inputs import training_windows
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.modifiers.blockwise_recovery import BlockwiseRecoveryModifier
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot

HEADINGS = ("case", "windows", "held_out", "pruned", "recovered", "cpu_seconds")


def measure(pruned: Path, windows: torch.Tensor, held_out: float) -> dict[str, Any]:
    """Fit a pruned checkpoint's blocks.

    :param pruned: its directory
    :param windows: (N, T) int64
    :param held_out: share of the windows that are held out
    """
    model, tokenizer = load_model(pruned, torch.float32), load_tokenizer(EMBEDDED_MODEL)
    started = time.process_time()
    modifier = BlockwiseRecoveryModifier(dense_model=str(EMBEDDED_MODEL), held_out=held_out)
    run_oneshot(model, tokenizer, modifier, windows)
    return {"recovered": evaluate(model), "cpu_seconds": round(time.process_time() - started)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="text to fit on")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=["75%"])
    parser.add_argument("--windows", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--held-out", nargs="+", type=float, default=[0.125, 0.0])
    arguments = parser.parse_args()
    config, tokenizer = load_model(EMBEDDED_MODEL).config, load_tokenizer(EMBEDDED_MODEL)
    rows = []
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            pruned = prune(case, Path(folder) / "pruned")
            before = evaluate(load_model(pruned, torch.float32))
            for count in arguments.windows:
                windows = calibration_windows()
                if count != len(windows):
                    text = str(arguments.text)
                    windows = training_windows(config, tokenizer, text, length=SEQ_LEN, most=count, seed=0)
                for held_out in arguments.held_out:
                    row = {"case": case, "windows": len(windows), "held_out": held_out, "pruned": before}
                    rows.append(row | measure(pruned, windows, held_out))
                    print(rows[-1], flush=True)
    print_rows("ELBO perplexity", rows, HEADINGS, left=("case",))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

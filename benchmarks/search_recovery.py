"""Whether recovering a search's finalists before the choice pays: perplexity after the same recovery, on tiny-llada.

    python benchmarks/search_recovery.py --text train.jsonl
    python benchmarks/search_recovery.py --text train.jsonl --cases 50%-channels --steps 0 2 8 --budget 4194304

Every search has the same budget, in which the recoveries count, so one with them makes fewer rounds. Pruning is on the
16 windows of the golden runs; then follow the same steps of `sinkprune recover`, and the golden evaluation.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from recovery import SEQ_LEN, calibration_windows, evaluate
from row_table import print_rows

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.inputs import training_windows
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier
from sinkprune_plugin.recovery.options import RecoveryOptions
from sinkprune_plugin.recovery.recover import recover

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "50%-channels": (SinkAwareStructuredModifier, {"mlp_channels": 0.5}),
    "75%": (SinkAwareADMMModifier, {"sparsity": 0.75}),
}
HEADINGS = ("case", "recovery_steps", "pruned", "recovered", "chosen", "cpu_seconds")


def measure(case: str, steps: int, budget: int, text: Path, recovery: RecoveryOptions) -> dict[str, Any]:
    """One search and what follows.

    :param case: of :data:`CASES`
    :param steps: ``search_recovery_steps``
    :param budget: ``search_budget``
    :param text: text to recover on
    :param recovery: of the pruned model
    """
    modifier, fields = CASES[case]
    model, tokenizer = load_model(EMBEDDED_MODEL, torch.float32), load_tokenizer(EMBEDDED_MODEL)
    lines: list[str] = []
    handle = logger.add(lines.append, level="INFO", format="{message}")
    started = time.process_time()
    searching = modifier(allocation="search", search_budget=budget, search_recovery_steps=steps, **fields)
    run_oneshot(model, tokenizer, searching, calibration_windows())
    seconds = time.process_time() - started
    logger.remove(handle)
    (found,) = [line.split("search: ")[1].strip() for line in lines if "forward tokens in" in line]
    config = model.config
    windows = training_windows(
        config, tokenizer, str(text), length=SEQ_LEN, most=recovery.steps * recovery.batch_size, seed=recovery.seed
    )
    with tempfile.TemporaryDirectory() as folder:
        pruned, output = Path(folder) / "pruned", Path(folder) / "recovered"
        model.to(torch.bfloat16).save_pretrained(pruned)
        tokenizer.save_pretrained(pruned)
        before = evaluate(load_model(pruned, torch.float32))
        recover(EMBEDDED_MODEL, pruned, output, windows, resolve_diffusion(config), recovery, use_cpu=True)
        after = evaluate(load_model(output, torch.float32))
    chosen = searching.mlp_channels if case != "75%" else [round(each, 4) for each in searching.allocation]
    return {
        "case": case,
        "recovery_steps": steps,
        "pruned": before,
        "recovered": after,
        "chosen": chosen,
        "search": found,
        "cpu_seconds": round(seconds),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="text to recover on")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 4], help="search_recovery_steps to compare")
    parser.add_argument("--budget", type=int, default=2**20, help="search_budget")
    parser.add_argument("--recovery", type=json.loads, default={"steps": 300}, help="options of the recovery, as JSON")
    arguments = parser.parse_args()
    rows = []
    for case in arguments.cases:
        for steps in arguments.steps:
            options = RecoveryOptions(**arguments.recovery)
            rows.append(measure(case, steps, arguments.budget, arguments.text, options))
            print(rows[-1], flush=True)
    print_rows(f"ELBO perplexity, search_budget {arguments.budget}", rows, HEADINGS, left=("case", "chosen"))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

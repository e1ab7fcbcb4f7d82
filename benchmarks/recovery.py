"""What recovery gives on tiny-llada, and what it would take on a model of real size.

    python benchmarks/recovery.py --text train.jsonl          # prunes, recovers, evaluates: 6 minutes a row on one core
    python benchmarks/recovery.py --text train.jsonl --cases 75% --options '{"patience": 0}'
    python benchmarks/recovery.py --text train.jsonl --cases 50%-channels 90%
    python benchmarks/recovery.py --dry-run                   # memory and operations for LLaDA-8B, nothing is run

Pruning is the ADMM modifier's default, or the structured modifier's, on the 16 windows of the golden runs; evaluation
is the recorded corruption of the golden runs, on text that is in neither. The dry run counts the operations of a
forward and backward pass without memory (torch's FlopCounterMode on the meta device) and the bytes of what must be
held; its times are those numbers divided by rates of a card, an estimate and not a measurement.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from llmcompressor.modifiers import Modifier
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from scale import CARDS, PUBLISHED, build
from torch.utils.flop_counter import FlopCounterMode

from sinkprune_plugin.diffusion import perplexity_on, resolve_diffusion
from sinkprune_plugin.inputs import training_windows
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier
from sinkprune_plugin.recovery.options import RecoveryOptions
from sinkprune_plugin.recovery.recover import recover

GOLDEN = Path(__file__).parent.parent / "tests" / "fixtures" / "golden"
# The modifier of each case, and its fields.
CASES: dict[str, tuple[type[Modifier], dict[str, Any]]] = {
    "75%": (SinkAwareADMMModifier, {"sparsity": 0.75}),
    "2:4": (SinkAwareADMMModifier, {"mask_structure": "2:4"}),
    "90%": (SinkAwareADMMModifier, {"sparsity": 0.9}),
    "50%-channels": (SinkAwareStructuredModifier, {"mlp_channels": 0.5}),
}
SEQ_LEN = 256
ADAPTER_RANK = 16


def evaluate(model: torch.nn.Module) -> float:
    """ELBO perplexity on the golden evaluation text."""
    recorded = load_file(GOLDEN / "evaluation.safetensors")
    clean, noisy = (recorded[name].long() for name in ("clean_ids", "noisy_ids"))
    return round(perplexity_on(model, clean, noisy, recorded["p_mask"], batch_size=16)[0], 2)


def calibration_windows() -> torch.Tensor:
    """The (16, 256) int64 windows that the golden runs were calibrated on."""
    return load_file(GOLDEN / "calibration.safetensors")["input_ids"].long()


def prune(case: str, directory: Path) -> Path:
    """Prune tiny-llada and save it in its own precision."""
    modifier, fields = CASES[case]
    model, tokenizer = load_model(EMBEDDED_MODEL, torch.float32), load_tokenizer(EMBEDDED_MODEL)
    run_oneshot(model, tokenizer, modifier(**fields), calibration_windows())
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def measure(text: Path | None, cases: list[str], options: RecoveryOptions) -> list[dict[str, Any]]:
    """One row for each case.

    :param text: text to train on; None takes the 16 calibration windows
    :param cases: names of :data:`CASES`
    :param options: of the recovery
    """
    config = load_model(EMBEDDED_MODEL).config
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    if text is None:
        windows = calibration_windows()
    else:
        most = options.steps * options.batch_size
        windows = training_windows(config, tokenizer, str(text), length=SEQ_LEN, most=most, seed=options.seed)
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            pruned = prune(case, Path(folder) / "pruned")
            output = Path(folder) / "recovered"
            started = time.monotonic()
            result = recover(EMBEDDED_MODEL, pruned, output, windows, resolve_diffusion(config), options, use_cpu=True)
            seconds = time.monotonic() - started
            rows.append(
                {
                    "case": case,
                    "pruned": evaluate(load_model(pruned, torch.float32)),
                    "recovered": evaluate(load_model(output, torch.float32)) if output.exists() else None,
                    "best_step": result.best_step,
                    "steps": result.steps,
                    "held_out": [round(result.held_out_before, 4), round(result.held_out_after, 4)],
                    "seconds": round(seconds),
                }
            )
            # One row takes minutes: what is known isn't lost with the rest.
            print(rows[-1], flush=True)
    return rows


def count_operations(model: torch.nn.Module, seq_len: int, *, backward: bool) -> int:
    """Operations of one window, multiplications and additions counted separately.

    :param model: on the meta device
    :param seq_len: tokens of the window
    :param backward: the backward pass as well
    """
    ids = torch.zeros(1, seq_len, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = model(input_ids=ids).logits
        if backward:
            logits.backward(torch.empty_like(logits))
    return counter.get_total_flops()


def dry_run(seq_len: int, steps: int, batch_size: int) -> list[dict[str, Any]]:
    """Memory and time of three ways to recover a model of real size."""
    rows = []
    for name in PUBLISHED:
        # Any: the classes of transformers are known when they are loaded.
        model: Any = build(name).train()
        weights = sum(parameter.numel() for parameter in model.parameters())
        linears = block_linears(model)
        trained = sum(module.weight.numel() for module in linears.values())
        model.requires_grad_(requires_grad=False)
        for module in linears.values():
            module.weight.requires_grad = True
        forward = count_operations(model, seq_len, backward=False)
        both = count_operations(model, seq_len, backward=True)
        adapters = sum(ADAPTER_RANK * sum(module.weight.shape) for module in linears.values())
        hidden, layers, vocabulary = model.config.d_model, model.config.n_layers, model.config.vocab_size
        # With gradient checkpointing, which makes a second forward pass: the input of each block, one block's products,
        # the logits and their gradient.
        activations = 2 * seq_len * (hidden * layers + 2 * vocabulary)
        block = max(m.weight.numel() for m in linears.values()) * 4 + 2 * trained // layers
        ways = {
            "weights, teacher beside": (
                16 * trained + 4 * (weights - trained) + 2 * weights + activations,
                both + 2 * forward,
            ),
            "weights, teacher on disk": (16 * trained + 4 * (weights - trained) + activations, both + forward),
            f"lora {ADAPTER_RANK}, teacher on disk": (
                2 * weights + 16 * adapters + activations + block,
                both + forward,
            ),
        }
        for way, (held, operations) in ways.items():
            total = operations * steps * batch_size
            rows.append(
                {
                    "model": name,
                    "way": way,
                    "gigabytes": round(held / 1e9, 1),
                    "operations": total,
                    "hours": {card: round(total / rates.half / 3600, 2) for card, rates in CARDS.items()},
                }
            )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table, then as one JSON line."""
    table = Table(title=title, title_justify="left")
    for heading in rows[0]:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(f"{value:.2e}" if heading == "operations" else str(value) for heading, value in row.items()))
    Console().print(table)
    print(json.dumps(rows))


def main() -> None:
    """Measure, or count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, help="text to train on (default: the 16 calibration windows)")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=["75%", "2:4"])
    parser.add_argument("--options", type=json.loads, default={}, help="options of the recovery, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="count for published shapes instead")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a window of the dry run")
    arguments = parser.parse_args()
    options = RecoveryOptions(**arguments.options)
    if arguments.dry_run:
        title = f"{options.steps} steps of {options.batch_size} × {arguments.seq_len} tokens, estimated"
        show(title, dry_run(arguments.seq_len, options.steps, options.batch_size))
    else:
        show("ELBO perplexity", measure(arguments.text, arguments.cases, options))


if __name__ == "__main__":
    main()

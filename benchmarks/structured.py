"""Speed of structured pruning: dense against models with fewer FFN channels, attention heads and blocks.

Both models generate the same number of tokens with the same sampler, in the plain loop of this package ("transformers")
and in vLLM's engine, taking turns as in `sinkprune verify`, whose statistics and verdict these are. Which units are
removed doesn't matter for speed, so they are chosen at random, except for "budget 1.5x", where the modifier chooses by
its table of latencies. Prints a table, ends in one JSON line.

With `--clock cpu` the CPU time of this process counts instead of wall time, for a CPU that is shared with so much other
work that wall times say little; with one thread both are the same on a machine of one's own.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from serving import random_llada
from tqdm import tqdm

from sinkprune_plugin.devices import choose_device
from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.models.block_sizes import block_sizes, keep_units, remove_blocks
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier
from sinkprune_plugin.verification.speed import (
    Sampler,
    SpeedComparison,
    Workload,
    compare_speed,
    transformers_sampler,
    vllm_sampler,
)
from sinkprune_plugin.vllm.cpu import prepare

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Kept widths are multiples, as with `granularity` of the modifier.
CHANNEL_MULTIPLE = 64


def share_of_channels(model: Any, removed: float) -> None:
    """Keep a random share of each block's FFN channels."""
    generator = torch.Generator().manual_seed(0)
    for number, sizes in enumerate(block_sizes(model)):
        multiple = min(CHANNEL_MULTIPLE, sizes.mlp_channels // 8)
        kept = max(1, round(sizes.mlp_channels * (1 - removed) / multiple)) * multiple
        keep_units(model, number, channels=torch.randperm(sizes.mlp_channels, generator=generator)[:kept])


def share_of_heads(model: Any, removed: float) -> None:
    """Keep a random share of each block's attention heads."""
    generator = torch.Generator().manual_seed(1)
    for number, sizes in enumerate(block_sizes(model)):
        kept = max(1, round(sizes.attention_heads * (1 - removed)))
        keep_units(model, number, heads=torch.randperm(sizes.attention_heads, generator=generator)[:kept])


def share_of_blocks(model: Any, removed: float) -> None:
    """Remove a share of the blocks, from the middle."""
    number = len(block_sizes(model))
    gone = max(1, round(number * removed))
    first = (number - gone) // 2
    remove_blocks(model, range(first, first + gone))


def both(model: Any) -> None:
    """Half of the FFN channels and a quarter of the heads."""
    share_of_channels(model, 0.5)
    share_of_heads(model, 0.25)


def within_budget(model: Any) -> None:
    """Channels and heads removed until a denoising step of 8 × 64 tokens should take 1 / 1.5 of the time."""
    modifier = SinkAwareStructuredModifier(
        allocation="error",
        budget="1.5x",
        latency_batch_size=8,
        granularity={"channels": 64},
        # The weights are random, so how well the choice is made doesn't matter here.
        score="magnitude",
        compensate=False,
        diffusion_steps=2,
        sample_interval=1,
    )
    windows = torch.randint(5, 2000, (1, 64), generator=torch.Generator().manual_seed(0))
    run_oneshot(model, load_tokenizer(EMBEDDED_MODEL), modifier, windows)


VARIANTS: dict[str, Callable[[Any], None]] = {
    # The null: a second copy of the dense model.
    "dense again": lambda _: None,
    "FFN channels 30 %": lambda model: share_of_channels(model, 0.3),
    "FFN channels 50 %": lambda model: share_of_channels(model, 0.5),
    "blocks 25 %": lambda model: share_of_blocks(model, 0.25),
    "FFN 50 %, heads 25 %": both,
    "budget 1.5x": within_budget,
}


def workload(name: str, batch: int, cache: str, seconds: float) -> Workload:
    """One cell, so that each has a verdict of its own."""
    prompt, gen_length, block_length, steps = {"tiny": (32, 32, 16, 8), "100M": (32, 32, 32, 4)}[name]
    prompts = torch.randint(5, 300, (batch, prompt), generator=torch.Generator().manual_seed(batch))
    return Workload(prompts, gen_length, block_length, steps, (batch,), (cache,), seconds)


def measure(name: str, directory: Path, folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one model: each variant against the dense model in each backend, batch size and cache mode."""
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    device = choose_device()
    dense = load_model(directory, dtype, device)
    total = sum(parameter.numel() for parameter in dense.parameters())
    chosen = [variant for variant in VARIANTS if not arguments.variants or variant in arguments.variants]
    rows = []
    dense_engine: Sampler | None = None
    for variant in chosen:
        model = load_model(directory, torch.float32)
        VARIANTS[variant](model)
        path = folder / f"{name} {variant}".replace(" ", "-").replace("%", "").replace(",", "")
        model.to(dtype).save_pretrained(path)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        model.to(device)
        for backend in arguments.backends:
            largest = workload(name, max(arguments.batches), "none", 0)
            if backend == "vllm":
                # One engine of the dense model serves all comparisons.
                if dense_engine is None:
                    dense_engine = vllm_sampler(directory, largest, dtype, skip_tokenizer_init=True)
                sides = [dense_engine, vllm_sampler(path, largest, dtype, skip_tokenizer_init=True)]
            else:
                sides = [transformers_sampler(each, resolve_diffusion(each.config)) for each in (dense, model)]
            for batch in arguments.batches:
                for cache in arguments.caches:
                    work = workload(name, batch, cache, arguments.seconds)
                    compared = compare_speed(sides[0], sides[1], work, progress=True, clock=CLOCKS[arguments.clock])
                    rows.append(row(name, variant, backend, parameters / total, compared))
                    tqdm.write(json.dumps(rows[-1]), file=sys.stderr)
            del sides
            gc.collect()
    return rows


def row(model: str, variant: str, backend: str, parameters: float, compared: SpeedComparison) -> dict[str, Any]:
    """One line of the table."""
    found = asdict(compared)
    (cell,) = found.pop("rows")
    return {
        "model": model,
        "variant": variant,
        "parameters": round(parameters, 4),
        "backend": backend,
        "batch": cell["batch"],
        "cache": cell["cache"],
        "dense_tokens_per_s": round(cell["dense_tokens_per_s"], 2),
    } | {key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line for each comparison."""
    table = Table(title="times the dense model's speed (99 % interval)", title_justify="left")
    headings = ("model", "removed", "parameters", "backend", "batch", "cache", "dense tokens/s", "ratio", "interval")
    for heading in (*headings, "verdict"):
        table.add_column(heading)
    for each in rows:
        table.add_row(
            each["model"],
            each["variant"],
            f"{100 * each['parameters']:.0f} %",
            each["backend"],
            str(each["batch"]),
            each["cache"],
            f"{each['dense_tokens_per_s']:.1f}",
            f"{each['ratio']:.2f}",
            f"{each['ratio_low']:.2f} to {each['ratio_high']:.2f}",
            each["verdict"],
        )
    Console(width=150).print(table)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=["tiny", "100M"], default=["tiny", "100M"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--backends", nargs="+", choices=["transformers", "vllm"], default=["transformers", "vllm"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--caches", nargs="+", default=["none", "dual"])
    parser.add_argument("--seconds", type=float, default=20.0, help="measuring time of a row; at least 15 repetitions")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if "vllm" in arguments.backends:
        prepare()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        directories = {"tiny": EMBEDDED_MODEL, "100M": Path(folder, "dense-100M")}
        if "100M" in arguments.models:
            random_llada(directories["100M"])
        for name in arguments.models:
            rows += measure(name, directories[name], Path(folder), arguments)
    print_table(rows)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    summary = {"rows": rows, "threads": torch.get_num_threads(), "torch": torch.__version__, "device": device}
    summary["clock"] = arguments.clock
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()

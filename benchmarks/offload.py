"""Pruning an offloaded model: bytes of weights onloaded, and time per forward token, compared with llm-compressor.

Workload: a random LLaDA of about 500 million parameters (16 blocks, d_model 1536, MLP 4096, float32), whose weights are
offloaded to main memory as llm-compressor's pipelines do it, windows of 256 random tokens, 50 % sparsity.

- *ours*: SinkAwareSparseGPTModifier, every window at two timesteps. Each pass goes through a block three times: to find
  the sinks, to gather the Hessians, and through the pruned block.
- *stock SparseGPT*: llm-compressor's SparseGPTModifier, whose passes go through a block twice. It gets three times as
  many windows, so that the number of forward tokens (tokens × runs of a block) is the same.
- *before*: our modifier in another checkout of this repository, given with ``--before DIRECTORY``; as many windows as
  ours.

Each run is a separate process; they take turns over several rounds. Bytes are counted where compressed-tensors
brings a weight to the device (without an accelerator it stays where it is, so the time has no transfer in it). The
ratios are medians of the ratios round by round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

TIMESTEPS, TOKENS, BLOCKS = 2, 256, 16
SIZE = {"d_model": 1536, "n_heads": 12, "n_kv_heads": 12, "mlp_hidden_size": 4096, "vocab_size": 16384}


def make_model(directory: str, blocks: int) -> None:
    """Write the random model."""
    from sinkprune_plugin.models.llada import LLaDAConfig, LLaDAModelLM

    torch.manual_seed(0)
    config = LLaDAConfig(
        **SIZE, n_layers=blocks, embedding_size=SIZE["vocab_size"], max_sequence_length=TOKENS, mask_token_id=2
    )
    LLaDAModelLM(config).save_pretrained(directory)


def run_cell(method: str, directory: str, windows: int) -> dict[str, float]:
    """Prune once, in this process.

    :param method: ``ours`` or ``stock``
    :param directory: the model
    :param windows: calibration windows of ours
    :return: seconds, bytes onloaded, bytes of the model's blocks
    """
    from compressed_tensors.offload.cache import CPUCache
    from loguru import logger

    from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
    from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot, stock_modifier
    from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier

    logger.remove()
    brought_in = 0
    original = CPUCache.onload

    def onload(self: CPUCache, offloaded: torch.Tensor | None) -> torch.Tensor | None:
        nonlocal brought_in
        brought_in += 0 if offloaded is None else offloaded.numel() * offloaded.element_size()
        return original(self, offloaded)

    CPUCache.onload = onload
    model = load_model(directory, torch.float32)
    of_blocks = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if ".blocks." in name)
    generator = torch.Generator().manual_seed(1)
    count = windows if method == "ours" else windows * TIMESTEPS * 3 // 2
    rows = torch.randint(3, SIZE["vocab_size"], (count, TOKENS), generator=generator)
    modifier: Any = (
        SinkAwareSparseGPTModifier(sparsity=0.5, diffusion_steps=TIMESTEPS, sample_interval=1)
        if method == "ours"
        else stock_modifier("SparseGPTModifier", 0.5)
    )
    started = time.perf_counter()
    run_oneshot(model, load_tokenizer(EMBEDDED_MODEL), modifier, rows)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "brought_in": brought_in, "blocks": of_blocks}


def run_in_process(method: str, directory: str, windows: int, checkout: Path | None) -> dict[str, float]:
    """Run a cell in a separate process, with the package of a checkout."""
    command = [sys.executable, __file__, "--cell", method, "--model", directory, "--windows", str(windows)]
    root = checkout or Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root.resolve())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="rounds of the runs (default 2)")
    parser.add_argument("--windows", type=int, default=4, help="calibration windows of ours (default 4)")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"decoder blocks (default {BLOCKS})")
    parser.add_argument("--before", type=Path, help="a checkout of another version to compare with")
    parser.add_argument("--cell", choices=["ours", "stock"], help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(run_cell(options.cell, options.model, options.windows)))
        return

    cells = {"ours": ("ours", None), "stock SparseGPT": ("stock", None)}
    if options.before:
        cells["before"] = ("ours", options.before)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in cells}
    with tempfile.TemporaryDirectory() as directory:
        make_model(directory, options.blocks)
        for _ in range(options.rounds):
            for name, (method, checkout) in cells.items():
                results[name].append(run_in_process(method, directory, options.windows, checkout))

    seconds = {name: [result["seconds"] for result in found] for name, found in results.items()}
    ratios = {
        name: statistics.median(mine / theirs for mine, theirs in zip(seconds["ours"], values, strict=True))
        for name, values in seconds.items()
    }
    sweeps = {name: found[0]["brought_in"] / found[0]["blocks"] for name, found in results.items()}
    table = Table(
        title=f"pruning an offloaded model, {options.blocks} blocks, "
        f"{results['ours'][0]['blocks'] / 1e9:.2f} GB of block weights, {torch.get_num_threads()} threads"
    )
    for heading in ("method", "median s", "min", "max", "ours / this", "brought in, GB", "× blocks"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, values in seconds.items():
        table.add_row(
            name,
            *(f"{f(values):.1f}" for f in (statistics.median, min, max)),
            f"{ratios[name]:.2f}",
            f"{results[name][0]['brought_in'] / 1e9:.2f}",
            f"{sweeps[name]:.1f}",
        )
    Console(width=110).print(table)
    print(
        json.dumps(
            {
                "benchmark": "offload",
                "seconds": seconds,
                "time_over_stock_sparsegpt": round(ratios["stock SparseGPT"], 3),
                "brought_in_over_blocks": {name: round(value, 2) for name, value in sweeps.items()},
                "threads": torch.get_num_threads(),
                "cpus": os.cpu_count(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()

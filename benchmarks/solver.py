"""Time of the ADMM solver, alone and in a whole calibration, against this package's SparseGPT.

- *solver*: ``pruning.admm.solve`` against SparseGPT's loop over columns (``pruning.sparsegpt.sparsify_weight``), each
  with its own preparation of the same random Hessian, on one weight (``--rows`` × ``--columns``, float32). The widest
  Linear of an 8 B model is 4096 × 12288: minutes on a CPU.
- *removal*: ``pruning.obs.obs_path``, which removes half of the columns one at a time, against the same loop.
- *calibration*: both modifiers through oneshot() at equal passes (``within_block: parallel``, ``target: current``), on
  the embedded model and, with ``--large``, on benchmarks/offload.py's random model of 500 million parameters; and ADMM
  with its defaults (``sequential``, ``target: dense``), which takes more passes. The solver's share of the time, and so
  the ratio, depends on the number of passes: ``--windows`` × ``--timesteps``.

The runs take turns; the ratios are medians of the ratios round by round. Models and data are outside the timing. Beside
the time that passed stands the processor's own, of all threads, which other programs on the machine disturb less.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from loguru import logger
from offload import BLOCKS, SIZE, make_model
from rich.console import Console
from rich.table import Table

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.pruning import admm, obs, sparsegpt
from sinkprune_plugin.pruning.hessian import prepare_hessian
from sinkprune_plugin.pruning.patterns import MaskStructure


class Timing(NamedTuple):
    """Seconds that passed, and of the processor over all threads."""

    seconds: float
    processor: float


def measure(run: Callable[[], Any]) -> tuple[Any, Timing]:
    """Time one run.

    :param run: called once
    :return: its result and its time
    """
    started = time.perf_counter(), time.process_time()
    result = run()
    return result, Timing(time.perf_counter() - started[0], time.process_time() - started[1])


SPARSITY = 0.75
UNSTRUCTURED = MaskStructure(0, 0)


def solver_runs(rows: int, columns: int, rival: str) -> dict[str, Callable[[], Any]]:
    """One weight with a random Hessian of correlated inputs, and what solves it.

    :param rows: of the weight
    :param columns: of the weight
    :param rival: ``ADMM`` or ``OBS``, beside SparseGPT
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * columns, columns, generator=generator)
    # Neighbouring features correlate.
    x = x + x.roll(1, dims=1) + x.roll(2, dims=1)
    W, H = torch.randn(rows, columns, generator=generator), x.T @ x
    del x

    def columns_in_turn() -> Any:
        factor = sparsegpt.invert_hessian(H.clone(), 0.01, "weight")
        return sparsegpt.sparsify_weight(W, factor, SPARSITY, UNSTRUCTURED, block_size=128)

    def together() -> Any:
        return admm.solve(W, prepare_hessian(H.clone(), 0.01, "weight"), SPARSITY, UNSTRUCTURED)

    def one_at_a_time() -> Any:
        return obs.obs_path(W, prepare_hessian(H.clone(), 0.01, "weight", invertible=True), 1, columns // 2)

    return {"SparseGPT": columns_in_turn, rival: {"ADMM": together, "OBS": one_at_a_time}[rival]}


def calibration_runs(model_name: Any, windows: torch.Tensor, grid: dict[str, int]) -> dict[str, Callable[[], Any]]:
    """Three modifiers on one model, which each run loads again, outside of its time.

    :param model_name: of the model
    :param windows: (windows, tokens) int64
    :param grid: the modifiers' fields of the timesteps
    """
    fields: dict[str, Any] = {"sparsity": SPARSITY, **grid}
    modifiers: dict[str, Callable[[], Any]] = {
        "SparseGPT": lambda: SinkAwareSparseGPTModifier(**fields),
        "ADMM": lambda: SinkAwareADMMModifier(within_block="parallel", **fields),
        "ADMM, sequential": lambda: SinkAwareADMMModifier(**fields),
    }

    def run(make: Callable[[], Any]) -> Timing:
        model = load_model(model_name, torch.float32)
        return measure(lambda: run_oneshot(model, load_tokenizer(EMBEDDED_MODEL), make(), windows))[1]

    return {name: functools.partial(run, make) for name, make in modifiers.items()}


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[Timing]]:
    """Time of every run; a run that returns a :class:`Timing` has measured itself."""
    found: dict[str, list[Timing]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            result, timing = measure(run)
            timing = result if isinstance(result, Timing) else timing
            found[name].append(timing)
            # A run may take minutes: what is known stays known if the rest is given up.
            print(f"round {number}: {name} {timing.seconds:.1f} s, {timing.processor:.1f} s of processor time",
                  file=sys.stderr, flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the runs (default 3)")
    parser.add_argument("--rows", type=int, default=1024, help="rows of the weight (default 1024)")
    parser.add_argument("--columns", type=int, default=3072, help="columns of the weight (default 3072)")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 256 tokens (default 16)")
    parser.add_argument("--timesteps", type=int, default=10, help="passes of each window (default 10)")
    parser.add_argument("--large", action="store_true", help="the model of 500 million parameters as well")
    parser.add_argument(
        "--blocks", type=int, default=BLOCKS, help=f"decoder blocks of the model of 500 million (default all {BLOCKS})"
    )
    parser.add_argument("--only", choices=["solver", "removal", "tiny-llada", "500 M"], help="one workload instead")
    options = parser.parse_args()
    logger.remove()

    chosen = (
        {options.only}
        if options.only
        else {"solver", "removal", "tiny-llada"} | ({"500 M"} if options.large else set())
    )
    generator = torch.Generator().manual_seed(1)
    grid = {"diffusion_steps": options.timesteps, "sample_interval": 1}
    cells = {}
    if "solver" in chosen:
        cells[f"solver, {options.rows} × {options.columns}"] = solver_runs(options.rows, options.columns, "ADMM")
    if "removal" in chosen:
        cells[f"removal, {options.rows} × {options.columns}"] = solver_runs(options.rows, options.columns, "OBS")
    if "tiny-llada" in chosen:
        windows = torch.randint(3, 2048, (options.windows, 256), generator=generator)
        cells["tiny-llada"] = calibration_runs(EMBEDDED_MODEL, windows, grid)
    with tempfile.TemporaryDirectory() as directory:
        if "500 M" in chosen:
            make_model(directory, options.blocks)
            windows = torch.randint(3, SIZE["vocab_size"], (options.windows, 256), generator=generator)
            # Blocks are alike, so a few of them give the same ratio but for the embedding and the head.
            name = "500 M" if options.blocks == BLOCKS else f"500 M, {options.blocks} blocks"
            cells[name] = calibration_runs(directory, windows, grid)
        timings = {cell: timed(runs, options.rounds) for cell, runs in cells.items()}

    table = Table(title=f"ADMM against SparseGPT, float32, {torch.get_num_threads()} threads")
    for heading in ("workload", "method", "median s", "min", "max", "× SparseGPT", "processor s", "× SparseGPT"):
        table.add_column(heading, justify="left" if heading in ("workload", "method") else "right")
    ratios: dict[str, dict[str, list[float]]] = {}
    for cell, found in timings.items():
        for name, values in found.items():
            both = [
                statistics.median(
                    mine[part] / theirs[part] for mine, theirs in zip(values, found["SparseGPT"], strict=True)
                )
                for part in range(2)
            ]
            ratios.setdefault(cell, {})[name] = both
            passed = [timing.seconds for timing in values]
            shown = (f"{f(passed):.2f}" for f in (statistics.median, min, max))
            processor = statistics.median(timing.processor for timing in values)
            table.add_row(cell, name, *shown, f"{both[0]:.2f}", f"{processor:.2f}", f"{both[1]:.2f}")
    Console(width=120).print(table)
    result = {
        "benchmark": "solver",
        "timings": timings,
        "over_sparsegpt": {
            cell: {name: [round(ratio, 3) for ratio in both] for name, both in found.items()}
            for cell, found in ratios.items()
        },
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

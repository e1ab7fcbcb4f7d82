"""What a step of the vLLM adapter costs on the host: planning it, for batches of 8 to 256 requests.

The plan is made before each step and nothing overlaps it. Prints a table and ends in one JSON line; needs no vLLM.
"""

import argparse
import json
import statistics
import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from sinkprune_plugin.sampling.options import CACHES, SamplingOptions
from sinkprune_plugin.vllm.step_plan import BatchLayout, SlotTable

BATCHES = (8, 32, 64, 256)
PROMPT, GENERATION, BLOCK = 256, 256, 32


def prepared(batch: int, *, mixed: bool) -> tuple[SlotTable, BatchLayout]:
    """A table full of requests, and a step of all of them.

    :param batch: requests
    :param mixed: all caches, temperatures and filters, instead of greedy requests without a cache
    """
    table = SlotTable(batch, 1024)
    for slot in range(batch):
        options = {"cache": CACHES[slot % 4], "temperature": 0.5 * (slot % 3), "top_k": slot % 2} if mixed else {}
        table.add(slot, PROMPT, SamplingOptions.resolve(gen_length=GENERATION, block_length=BLOCK, **options))  # type: ignore[arg-type]
    query = np.full(batch, PROMPT + GENERATION)
    return table, BatchLayout(np.arange(batch), np.zeros(batch, np.int64), query, np.full(batch, GENERATION))


def milliseconds(table: SlotTable, layout: BatchLayout, repeats: int) -> list[float]:
    """Time of each plan, and of packing it for the copy to the device."""
    taken = []
    for _ in range(repeats):
        # Each step is a block's first, when all of its positions are masked.
        table.block_start[:] = -1
        started = time.perf_counter()
        plan = table.plan(layout)
        np.concatenate([plan.table.ravel(), plan.row_request, plan.needs.filtered])
        taken.append(1000 * (time.perf_counter() - started))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=500)
    arguments = parser.parse_args()
    rows = []
    for batch in BATCHES:
        for mixed in (False, True):
            table, layout = prepared(batch, mixed=mixed)
            milliseconds(table, layout, 20)
            taken = milliseconds(table, layout, arguments.repeats)
            row: dict[str, int | float | str] = {
                "batch": batch,
                "requests": "mixed" if mixed else "greedy",
                "rows": batch * BLOCK,
            }
            row |= {"median_ms": round(statistics.median(taken), 4), "fastest_ms": round(min(taken), 4)}
            rows.append(row)
    view = Table(title="planning one step", title_justify="left")
    for heading in rows[0]:
        view.add_column(heading.replace("_", " "), justify="right")
    for row in rows:
        view.add_row(*map(str, row.values()))
    Console().print(view)
    sys.stdout.write(json.dumps({"rows": rows}) + "\n")


if __name__ == "__main__":
    main()

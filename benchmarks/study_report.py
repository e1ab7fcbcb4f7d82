"""From the study's cells to docs/study-results.json, the tables of docs/study.md and docs/images/study.png."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from study_cells import PATTERNS, SUM_OF_SQUARES, SWEEPS, SWEPT, SWEPT_PATTERNS, cells, methods
from study_statistics import Difference, Windows, paired_difference, perplexity

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.files.shard_reader import read_json

__all__ = ["COMPARISONS", "DOCS", "Runs", "committed_records", "load_runs", "tables", "write_report"]

DOCS = Path(__file__).parent.parent / "docs"
DIGITS = 6  # of a window's loss in the committed results

# What is compared → method before, method after. Only one thing changes, or the label says what else does.
COMPARISONS = {
    "Wanda": {
        "corrupted inputs alone (both propagated)": ("Wanda", "Wanda, corrupted, no mask, propagated"),
        "no longer propagating (corrupted, no mask)": (
            "Wanda, corrupted, no mask, propagated",
            "Wanda, corrupted, no mask",
        ),
        "sink mask (corrupted)": ("Wanda, corrupted, no mask", "sink-aware Wanda"),
        "sink mask (corrupted, propagated, 1/t²)": (
            "Wanda, corrupted, no mask, propagated, 1/t²",
            "sink-aware Wanda, propagated, 1/t²",
        ),
        "transient scope instead of all": ("sink-aware Wanda", "sink-aware Wanda, transient"),
        "sum of squares instead of norms": ("sink-aware Wanda", SUM_OF_SQUARES),
        "1/t weights (sums of squares)": (SUM_OF_SQUARES, "sink-aware Wanda, 1/t"),
        "1/t² weights (sums of squares)": (SUM_OF_SQUARES, "sink-aware Wanda, 1/t²"),
        "propagating": ("sink-aware Wanda", "sink-aware Wanda, propagated"),
        "propagating (1/t²)": ("sink-aware Wanda, 1/t²", "sink-aware Wanda, propagated, 1/t²"),
    },
    "SparseGPT": {
        "our implementation (clean, no mask)": ("SparseGPT", "our SparseGPT, clean, no mask"),
        "corrupted inputs alone": ("our SparseGPT, clean, no mask", "SparseGPT, corrupted, no mask"),
        "sink mask (clean)": ("our SparseGPT, clean, no mask", "sink-aware SparseGPT, clean"),
        "sink mask (corrupted)": ("SparseGPT, corrupted, no mask", "sink-aware SparseGPT"),
    },
}

Runs = Mapping[tuple[str, str, str, str], Sequence[Windows]]


def committed_records(docs: Path) -> Iterator[dict[str, Any]]:
    """Cells of the committed results.

    :param docs: folder with study-results.json
    """
    content = read_json(docs / "study-results.json")
    for key, cell in content["cells"].items():
        yield {"key": key, **cell}


def load_runs(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str, str], list[Windows]]:
    """Window losses by group, method, pattern and swept value, one list for each seed in the order of the seeds.

    :param records: all cells
    :raises UsageError: if a cell is missing or has another number of windows
    """
    by_key = {str(record["key"]): record["windows"] for record in records}
    expected = cells()
    missing = [cell.key for cell in expected if cell.key not in by_key]
    if missing:
        raise UsageError(f"{len(missing)} of {len(expected)} cells are not done, first {missing[0]!r}; run them first")
    count = len(by_key[expected[0].key])
    runs: dict[tuple[str, str, str, str], list[Windows]] = {}
    for cell in sorted(expected, key=lambda each: each.seed):
        if len(by_key[cell.key]) != count:
            raise UsageError(
                f"cell {cell.key!r} has {len(by_key[cell.key])} test windows, the dense one has {count}; "
                "start a new results file"
            )
        windows = [round(loss, DIGITS) for loss in by_key[cell.key]]
        runs.setdefault((cell.group, cell.method, cell.pattern, cell.value), []).append(windows)
    return runs


def of_method(runs: Runs, method: str, pattern: str) -> Sequence[Windows] | None:
    """Losses of a method in the grid or the controls; None where it wasn't run.

    :param runs: see :func:`load_runs`
    :param method: its name
    :param pattern: sparsity pattern
    """
    found = (runs.get((group, method, pattern, "")) for group in ("grid", "controls"))
    return next((run for run in found if run is not None), None)


def show(difference: Difference) -> str:
    """A change of the perplexity in percent, with the wider half of its interval; bold where it is clear.

    :param difference: to show
    """
    low, high = difference.percent_ends
    text = f"{difference.percent:+.1f} ± {max(high - difference.percent, difference.percent - low):.1f}"
    return f"**{text.replace('-', '−')}**" if difference.clear else text.replace("-", "−")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Markdown tables of the page, by name.

    :param records: all cells
    """
    runs = load_runs(records)
    return {
        "grid": _grid_table(runs, records),
        **{f"parts-{family}": _parts_table(runs, family) for family in COMPARISONS},
        "sweeps": _sweep_table(runs),
    }


def _grid_table(runs: Runs, records: Sequence[Mapping[str, Any]]) -> str:
    seconds = {str(record["key"]): float(record["seconds"]) for record in records}
    dense = runs["grid", "dense", "", ""]
    rows = [["dense", *[f"{perplexity(dense):.1f}"] * len(PATTERNS), ""]]
    for method in methods():
        stock = "SparseGPT" if "SparseGPT" in method else "Wanda"
        row = [method]
        for pattern in PATTERNS:
            run = runs["grid", method, pattern, ""]
            change = "" if method == stock else f" ({show(paired_difference(runs['grid', stock, pattern, ''], run))})"
            row.append(f"{perplexity(run):.1f}{change}")
        times = [seconds[cell.key] for cell in cells() if cell.group == "grid" and cell.method == method]
        # The minimum: other work on the machine only adds time.
        rows.append([*row, f"{min(times):.1f}"])
    return _table(["method", *PATTERNS, "seconds"], rows)


def _parts_table(runs: Runs, family: str) -> str:
    rows = []
    for label, (before, after) in COMPARISONS[family].items():
        pairs = [(of_method(runs, before, pattern), of_method(runs, after, pattern)) for pattern in PATTERNS]
        rows.append([label, *["" if a is None or b is None else show(paired_difference(a, b)) for a, b in pairs]])
    return _table([family, *PATTERNS], rows)


def _sweep_table(runs: Runs) -> str:
    rows = []
    for sweep, values in SWEEPS.items():
        for value in values:
            row = [f"`{sweep}` {value:g}" if sweep != "windows" else f"{value} windows"]
            for method in SWEPT:
                for pattern in SWEPT_PATTERNS:
                    default, run = runs["grid", method, pattern, ""][:1], runs[sweep, method, pattern, str(value)]
                    row.append(f"{perplexity(run):.1f} ({show(paired_difference(default, run))})")
            rows.append(row)
    return _table(["", *[f"{method}, {pattern}" for method in SWEPT for pattern in SWEPT_PATTERNS]], rows)


def write_report(records: Sequence[Mapping[str, Any]], docs: Path) -> None:
    """Write the compact results, the figure and the page's tables.

    :param records: all cells
    :param docs: folder with study.md
    """
    from study_figure import draw

    runs = load_runs(records)
    page = docs / "study.md"
    text = page.read_text(encoding="utf-8")
    for name, table in tables(records).items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise UsageError(f"{page.name} has no single place {start} … {end} for a table; put one in")
        before, rest = text.split(start)
        text = f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"
    page.write_text(text, encoding="utf-8")
    (docs / "study-results.json").write_text(_compact(records), encoding="utf-8")
    draw(runs, docs / "images" / "study.png")


def _compact(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per cell: small, and a diff shows exactly the cells that changed."""
    by_key = {str(record["key"]): record for record in records}
    means: dict[str, Any] = {}
    for (group, method, pattern, value), run in load_runs(records).items():
        name = "/".join(part for part in (group, method, pattern, value) if part)
        means[name] = [round(perplexity([seed]), 3) for seed in run]
    kept: dict[str, Any] = {}
    for cell in cells():
        record = by_key[cell.key]
        windows = [round(loss, DIGITS) for loss in record["windows"]]
        kept[cell.key] = {"seconds": record["seconds"], "zeros": record["zeros"], "windows": windows}
    about = "perplexity: one for each seed. windows: negative Monte-Carlo ELBO of each test window, nats per token"
    return f'{{\n"about": {json.dumps(about)},\n"perplexity": {_lines(means)},\n"cells": {_lines(kept)}\n}}\n'


def _lines(entries: Mapping[str, Any]) -> str:
    lines = [
        f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, separators=(',', ':'))}"
        for key, value in entries.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}"

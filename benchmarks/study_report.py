"""From the study's lines to docs/study-results.json, docs/images/study.png and the tables of docs/study.md."""

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Difference", "paired_difference", "write_report"]

DOCS = Path(__file__).parent.parent / "docs"
QUANTILE = 1.96

Difference = tuple[float, float, float]
Windows = Sequence[float]


def paired_difference(first: Sequence[Windows], second: Sequence[Windows]) -> Difference:
    """Mean difference of two methods, second less first, with a 95 % confidence interval.

    Windows are the clusters: the seeds of one window share its text and noise, so their differences are averaged
    before the spread between windows is taken.

    :param first: a list of window losses for each seed
    :param second: the same for the other method, in the same order
    :return: difference in nats per token, lower and upper end
    """
    by_window = [
        statistics.fmean(b[window] - a[window] for a, b in zip(first, second, strict=True))
        for window in range(len(first[0]))
    ]
    mean = statistics.fmean(by_window)
    error = statistics.stdev(by_window) / math.sqrt(len(by_window)) if len(by_window) > 1 else math.inf
    return mean, mean - QUANTILE * error, mean + QUANTILE * error


def perplexity(runs: Sequence[Windows]) -> float:
    """Perplexity over all windows and seeds.

    :param runs: window losses for each seed
    """
    return math.exp(statistics.fmean(loss for run in runs for loss in run))


def percent(difference: Difference) -> str:
    """A difference of losses as a change of the perplexity.

    :param difference: in nats per token
    """
    middle, low, high = (100 * (math.exp(value) - 1) for value in difference)
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def collect(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str, str], list[Windows]]:
    """Window losses by group, method, pattern and value, one list for each seed in the order of the seeds.

    :param records: lines of the results
    """
    found: dict[tuple[str, str, str, str], dict[str, Windows]] = {}
    for record in records:
        # Names of methods hold no slash but in "1/t".
        group, *middle, pattern, seed, value = str(record["key"]).split("/")
        found.setdefault((group, "/".join(middle), pattern, value), {})[seed] = record["windows"]
    return {key: [runs[seed] for seed in sorted(runs)] for key, runs in found.items()}


def write_report(records: Sequence[Mapping[str, Any]]) -> None:
    """Write the compact results and the figure, and print the tables as Markdown.

    :param records: lines of the results
    """
    from study import PATTERNS, SEEDS, SWEEPS, SWEPT, methods

    runs = collect(records)
    names = list(methods())
    seconds: dict[str, list[float]] = {}
    for record in records:
        parts = str(record["key"]).split("/")
        if parts[0] == "grid":
            seconds.setdefault("/".join(parts[1:-3]), []).append(float(record["seconds"]))
    print_line = sys.stdout.write
    print_line(f"dense: {perplexity(runs['grid', 'dense', '', '']):.2f}\n\n")
    print_line("| method | " + " | ".join(PATTERNS) + " | seconds |\n| --- |" + " --- |" * (len(PATTERNS) + 1) + "\n")
    table: dict[str, Any] = {}
    for name in names:
        row = {}
        for pattern in PATTERNS:
            cell = runs.get(("grid", name, pattern, ""))
            if cell and len(cell) == len(SEEDS):
                row[pattern] = {
                    "perplexity": round(perplexity(cell), 3),
                    "by_seed": [round(perplexity([run]), 3) for run in cell],
                }
        table[name] = row
        shown = [f"{row[pattern]['perplexity']:.1f}" if pattern in row else "" for pattern in PATTERNS]
        print_line(f"| {name} | {' | '.join(shown)} | {statistics.median(seconds.get(name, [0])):.1f} |\n")
    comparisons = {
        "calibrating Wanda on corrupted inputs (no mask) against Wanda": ("Wanda", "Wanda, corrupted, no mask"),
        "the sink mask for Wanda (corrupted)": ("Wanda, corrupted, no mask", "sink-aware Wanda"),
        "sink-aware Wanda against Wanda": ("Wanda", "sink-aware Wanda"),
        "transient scope against all": ("sink-aware Wanda", "sink-aware Wanda, transient"),
        "1/t weights against none": ("sink-aware Wanda", "sink-aware Wanda, 1/t"),
        "1/t² weights against none": ("sink-aware Wanda", "sink-aware Wanda, 1/t²"),
        "propagating against not": ("sink-aware Wanda", "sink-aware Wanda, propagated"),
        "propagating with 1/t² against neither": ("sink-aware Wanda", "sink-aware Wanda, propagated, 1/t²"),
        "calibrating SparseGPT on corrupted inputs (no mask) against SparseGPT": (
            "SparseGPT",
            "SparseGPT, corrupted, no mask",
        ),
        "the sink mask for SparseGPT (clean)": ("SparseGPT", "sink-aware SparseGPT, clean"),
        "the sink mask for SparseGPT (corrupted)": ("SparseGPT, corrupted, no mask", "sink-aware SparseGPT"),
        "sink-aware SparseGPT against SparseGPT": ("SparseGPT", "sink-aware SparseGPT"),
        "sink-aware SparseGPT against sink-aware Wanda": ("sink-aware Wanda", "sink-aware SparseGPT"),
    }
    print_line("\n| change of the perplexity in % | " + " | ".join(PATTERNS) + " |\n")
    print_line("| --- |" + " --- |" * len(PATTERNS) + "\n")
    differences: dict[str, Any] = {}
    for what, (first, second) in comparisons.items():
        shown = []
        differences[what] = {}
        for pattern in PATTERNS:
            a, b = runs.get(("grid", first, pattern, "")), runs.get(("grid", second, pattern, ""))
            if a and b and len(a) == len(b) == len(SEEDS):
                difference = paired_difference(a, b)
                differences[what][pattern] = [round(value, 6) for value in difference]
                clear = difference[1] > 0 or difference[2] < 0
                shown.append(f"**{percent(difference)}**" if clear else percent(difference))
            else:
                shown.append("")
        print_line(f"| {what} | {' | '.join(shown)} |\n")
    sweeps: dict[str, Any] = {}
    for sweep, values in SWEEPS.items():
        headings = [f"{pattern} {value}" for pattern in ("60 %", "2:4") for value in values]
        print_line(f"\n| {sweep} | {' | '.join(headings)} |\n| --- |" + " --- |" * len(headings) + "\n")
        for name in SWEPT:
            cells = {
                f"{pattern} {value}": round(perplexity(cell), 3)
                for pattern in ("60 %", "2:4")
                for value in values
                if (cell := runs.get((sweep, name, pattern, str(value))))
            }
            sweeps.setdefault(sweep, {})[name] = cells
            print_line(f"| {name} | {' | '.join(f'{cells[h]:.1f}' if h in cells else '' for h in headings)} |\n")
    dense = round(perplexity(runs["grid", "dense", "", ""]), 3)
    content = {"dense": dense, "perplexity": table, "differences_nats": differences, "sweeps": sweeps}
    (DOCS / "study-results.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(table, dense, DOCS / "images" / "study.png")


def draw(table: Mapping[str, Any], dense: float, file: Path) -> None:
    """The figure: perplexity relative to dense, by pattern and method.

    :param table: method → pattern → numbers
    :param dense: perplexity of the dense model
    :param file: PNG to write
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    patterns = list(next(iter(table.values())))
    figure = Figure(figsize=(11, 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(patterns), sharey=True)
    names = list(table)
    for panel, pattern in zip(panels, patterns, strict=True):
        for place, name in enumerate(names):
            if pattern not in table[name]:
                continue
            color = "#d1495b" if "SparseGPT" in name else "#3b6ea8" if "Wanda" in name else "#888888"
            change = [100 * (each / dense - 1) for each in table[name][pattern]["by_seed"]]
            panel.plot(statistics.fmean(change), place, marker="o", color=color)
            panel.plot([min(change), max(change)], [place, place], color=color, linewidth=1.5)
        panel.set_title(pattern, fontsize=10)
        panel.set_xscale("symlog", linthresh=20)
        panel.grid(alpha=0.25)
        panel.set_xlabel("% over dense", fontsize=9)
    panels[0].set_yticks(range(len(names)), names, fontsize=9)
    panels[0].invert_yaxis()
    figure.suptitle("ELBO perplexity over dense, tiny-llada, three seeds (dot: mean, line: range)", x=0.01, ha="left")
    figure.savefig(file)

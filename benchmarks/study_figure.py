"""The study's figure: perplexity of every method, and what mask and corrupted inputs each change."""

import statistics
from pathlib import Path
from typing import Any

from study_cells import PATTERNS, methods
from study_report import Runs, of_method
from study_statistics import paired_difference, perplexity

__all__ = ["PARTS", "draw"]

WANDA, SPARSEGPT, OTHER, MASK = "#3b6ea8", "#c8553d", "#8a8a8a", "#4a9b6e"
# What the lower row shows → method before, method after. Only the grid's, so that every pattern has them.
PARTS = {
    "Wanda: corrupted inputs,\nnot propagated": ("Wanda", "Wanda, corrupted, no mask", WANDA),
    "Wanda: sink mask": ("Wanda, corrupted, no mask", "sink-aware Wanda", MASK),
    "Wanda: 1/t² weights": ("sink-aware Wanda", "sink-aware Wanda, 1/t²", WANDA),
    "SparseGPT: corrupted inputs": ("SparseGPT", "SparseGPT, corrupted, no mask", SPARSEGPT),
    "SparseGPT: sink mask": ("SparseGPT, corrupted, no mask", "sink-aware SparseGPT", MASK),
}


def draw(runs: Runs, file: Path) -> None:
    """Draw it.

    :param runs: losses of all cells
    :param file: PNG to write
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(2, len(PATTERNS), sharey="row", height_ratios=[13, 7])
    dense = perplexity(runs["grid", "dense", "", ""])
    for column, pattern in enumerate(PATTERNS):
        _methods_panel(rows[0, column], runs, pattern, dense)
        _parts_panel(rows[1, column], runs, pattern)
    names = list(methods())
    rows[0, 0].set_yticks(range(len(names)), names, fontsize=9)
    rows[0, 0].invert_yaxis()
    rows[1, 0].set_yticks(range(len(PARTS)), list(PARTS), fontsize=9)
    rows[1, 0].invert_yaxis()
    figure.suptitle(
        "tiny-llada. Above: ELBO perplexity over dense (dot: three seeds, line: their range). "
        "Below: what each part changes, with 95 % interval",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.savefig(file)


def _methods_panel(panel: Any, runs: Runs, pattern: str, dense: float) -> None:
    for place, name in enumerate(methods()):
        run = runs["grid", name, pattern, ""]
        color = SPARSEGPT if "SparseGPT" in name else WANDA if "Wanda" in name else OTHER
        changes = [100 * (perplexity([seed]) / dense - 1) for seed in run]
        stock = name in ("Wanda", "SparseGPT")
        panel.plot([min(changes), max(changes)], [place, place], color=color, linewidth=2)
        panel.plot(statistics.fmean(changes), place, "D" if stock else "o", color=color, markersize=7 if stock else 5)
    panel.set_title(pattern, fontsize=10)
    panel.set_xlim(left=0)
    panel.grid(alpha=0.25)
    panel.set_xlabel("% over dense", fontsize=9)
    panel.tick_params(axis="x", labelsize=8)


def _parts_panel(panel: Any, runs: Runs, pattern: str) -> None:
    panel.axvline(0, color="black", linewidth=0.8)
    for place, (before, after, color) in enumerate(PARTS.values()):
        first, second = of_method(runs, before, pattern), of_method(runs, after, pattern)
        if first is None or second is None:
            continue
        difference = paired_difference(first, second)
        low, high = difference.percent_ends
        panel.plot([low, high], [place, place], color=color, linewidth=2)
        panel.plot(difference.percent, place, "o", color=color, fillstyle="full" if difference.clear else "none")
    panel.grid(alpha=0.25)
    panel.set_xlabel("% change", fontsize=9)
    panel.tick_params(axis="x", labelsize=8)

"""The study's figures, one for each model: perplexity of the methods, and what each part of ours is worth."""

import statistics
from pathlib import Path
from typing import Any

from study_cells import CHANGE_PATTERNS, GRID_PATTERNS, MAIN, OURS, changes
from study_report import Runs
from study_statistics import perplexity
from study_tables import difference_of

__all__ = ["draw"]

OURS_COLOR, OTHER, MASK = "#c8553d", "#3b6ea8", "#4a9b6e"


def draw(runs: Runs, model: str, file: Path) -> None:
    """Draw a model's figure.

    :param runs: losses of all cells
    :param model: name of the model
    :param file: PNG to write
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[len(MAIN), len(changes())])
    above, below = parts
    panels = above.subplots(1, len(GRID_PATTERNS), sharey=True)
    for panel, pattern in zip(panels, GRID_PATTERNS, strict=True):
        _methods_panel(panel, runs, model, pattern)
    panels[0].set_yticks(range(len(MAIN)), MAIN, fontsize=9)
    panels[0].invert_yaxis()
    panels = below.subplots(1, len(CHANGE_PATTERNS), sharey=True)
    for panel, pattern in zip(panels, CHANGE_PATTERNS, strict=True):
        _changes_panel(panel, runs, model, pattern)
    panels[0].set_yticks(range(len(changes())), list(changes()), fontsize=9)
    panels[0].invert_yaxis()
    figure.suptitle(
        f"{model}. Above: ELBO perplexity over dense (dot: mean of the seeds, line: their range). "
        f"Below: one change in {OURS}, with 95 % interval",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.savefig(file)


def _methods_panel(panel: Any, runs: Runs, model: str, pattern: str) -> None:
    dense = runs.dense(model)
    for place, name in enumerate(MAIN):
        run = runs.of_method(model, name, pattern)
        if not run:
            continue
        color = OURS_COLOR if name == OURS else OTHER
        over = [100 * (perplexity([seed]) / dense - 1) for seed in run.values()]
        panel.plot([min(over), max(over)], [place, place], color=color, linewidth=2)
        panel.plot(statistics.fmean(over), place, "o", color=color, markersize=5)
    panel.set_title(pattern, fontsize=10)
    panel.set_xlim(left=0)
    panel.grid(alpha=0.25)
    panel.set_xlabel("% over dense", fontsize=9)
    panel.tick_params(axis="x", labelsize=8)


def _changes_panel(panel: Any, runs: Runs, model: str, pattern: str) -> None:
    panel.axvline(0, color="black", linewidth=0.8)
    for place, change in enumerate(changes()):
        difference = difference_of(runs.of_method(model, OURS, pattern), runs.of(model, "changes", change, pattern))
        if difference is None:
            continue
        low, high = difference.percent_ends
        color = MASK if "sink" in change else OTHER
        panel.plot([low, high], [place, place], color=color, linewidth=2)
        panel.plot(difference.percent, place, "o", color=color, fillstyle="full" if difference.clear else "none")
    panel.set_title(pattern, fontsize=10)
    panel.grid(alpha=0.25)
    panel.set_xlabel("% change", fontsize=9)
    panel.tick_params(axis="x", labelsize=8)

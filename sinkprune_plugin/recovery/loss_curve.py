"""What a recovery's training looked like: numbers, a picture, a page."""

import json
from pathlib import Path
from typing import Any

from sinkprune_plugin import __version__
from sinkprune_plugin.embedded_pictures import data_url

__all__ = ["CURVE_FOLDER", "CURVE_PICTURE", "write_curve"]

# Within the recovered model's directory.
CURVE_FOLDER, CURVE_PICTURE = "recovery", "loss.png"
_TEMPLATE = Path(__file__).parent / "curve.html.jinja"
_TRAINING, _HELD_OUT, _CHOSEN = "#b9c6d8", "#d1495b", "#1a7f4b"
# Steps that a point of the smoothed line averages over, as a share of all.
_SMOOTHING = 0.05


def write_curve(directory: Path, history: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Write recovery.json, loss.png and recovery.html.

    :param directory: the recovered model's directory
    :param history: the Trainer's log, entries with ``step`` and ``loss`` or ``eval_loss``
    :param summary: what else is to be shown, by title; ``best_step`` among it
    """
    folder = directory / CURVE_FOLDER
    folder.mkdir()
    training = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    content = summary | {"training_loss": training, "held_out_loss": held_out}
    (folder / "recovery.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _draw(folder / CURVE_PICTURE, training, held_out, summary["best_step"])
    from jinja2 import Environment, StrictUndefined

    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    page = template.render(
        summary=summary, held_out=held_out, picture=data_url(folder / CURVE_PICTURE), version=__version__
    )
    (folder / "recovery.html").write_text(page, encoding="utf-8")


def _draw(file: Path, training: list[tuple[int, float]], held_out: list[tuple[int, float]], best_step: int) -> None:
    # No pyplot: it would keep figures in global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*_columns(training), color=_TRAINING, linewidth=0.8, label="training, each step")
    axes.plot(*_columns(_smoothed(training)), color="#3b6ea8", label="training, smoothed")
    axes.plot(*_columns(held_out), color=_HELD_OUT, marker="o", markersize=4, label="held out")
    axes.axvline(best_step, color=_CHOSEN, linestyle=":", label=f"chosen: step {best_step}")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    width = max(1, round(_SMOOTHING * len(points)))
    values = [y for _, y in points]
    return [
        (points[end - 1][0], sum(values[max(0, end - width) : end]) / (end - max(0, end - width)))
        for end in range(1, len(points) + 1)
    ]

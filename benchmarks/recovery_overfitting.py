"""What recovery learns by heart from little text, on tiny-llada at 75 %.

    python benchmarks/recovery_overfitting.py                                 # distillation and the text's own loss
    python benchmarks/recovery_overfitting.py --figure docs/images/recovery-overfitting.png
    python benchmarks/recovery_overfitting.py --methods elbo --steps 100

The data is the 16 calibration windows alone, of which one is held out; patience is off, so that training goes on to the
end. At each look at the held-out window the model is evaluated on the golden text too, which is in neither. From the
curve follows what the default, which stops after three looks without a new best and takes the best, would have kept.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from recovery import calibration_windows, evaluate, prune
from rich.console import Console
from rich.table import Table

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.recovery.options import RecoveryOptions
from sinkprune_plugin.recovery.recover import recover

PATIENCE = RecoveryOptions().patience
COLOURS = {"distill": "#3b6ea8", "elbo": "#d1495b"}


def measure(pruned: Path, method: str, steps: int) -> list[dict[str, float]]:
    """The curve of one method: step, loss on the held-out window, perplexity on the golden text.

    :param pruned: checkpoint to train
    :param method: of the recovery
    :param steps: optimiser steps
    """
    curve: list[dict[str, float]] = []

    def look(step: int, loss: float, model: torch.nn.Module) -> None:
        curve.append({"step": step, "held_out": round(loss, 4), "perplexity": evaluate(model)})
        print(method, curve[-1], flush=True)

    options = RecoveryOptions(method=method, steps=steps, patience=0)  # type: ignore[arg-type]
    spec = resolve_diffusion(load_model(EMBEDDED_MODEL).config)
    output = pruned.with_name(method)
    recover(EMBEDDED_MODEL, pruned, output, calibration_windows(), spec, options, use_cpu=True, after_evaluation=look)
    return curve


def kept_by_default(curve: list[dict[str, float]]) -> dict[str, float]:
    """The state that the default would have written, and where it would have stopped."""
    best, missed, stopped = curve[0], 0, curve[-1]
    for point in curve[1:]:
        best, missed = (point, 0) if point["held_out"] < best["held_out"] else (best, missed + 1)
        if missed == PATIENCE:
            stopped = point
            break
    return {"step": best["step"], "perplexity": best["perplexity"], "stopped": stopped["step"]}


def draw(file: Path, curves: dict[str, list[dict[str, float]]]) -> None:
    """Held-out loss and golden perplexity over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for method, curve in curves.items():
        steps = [point["step"] for point in curve]
        kept = kept_by_default(curve)
        for axes, key in ((left, "held_out"), (right, "perplexity")):
            # The losses of the two methods have other units: each relative to its own beginning.
            first = curve[0][key] if key == "held_out" else 1.0
            values = {point["step"]: point[key] / first for point in curve}
            axes.plot(steps, values.values(), color=COLOURS[method], marker="o", markersize=3, label=method)
            axes.plot(kept["step"], values[kept["step"]], "s", color=COLOURS[method], markersize=9, fillstyle="none")
    left.set_ylabel("loss on the held-out window, of that before")
    right.set_ylabel("perplexity on other text")
    for axes in (left, right):
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8, title="square: kept by default", title_fontsize=8)
    figure.savefig(file)


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=sorted(COLOURS), default=["distill", "elbo"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--figure", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pruned = prune("75%", Path(folder) / "pruned")
        curves = {method: measure(pruned, method, arguments.steps) for method in arguments.methods}
    table = Table(title="16 windows, one of them held out", title_justify="left")
    for heading in ("method", "step", "held-out loss", "perplexity"):
        table.add_column(heading)
    result: dict[str, Any] = {}
    for method, curve in curves.items():
        for point in curve:
            table.add_row(method, *(str(value) for value in point.values()))
        result[method] = {"curve": curve, "default": kept_by_default(curve)}
    Console().print(table)
    if arguments.figure is not None:
        draw(arguments.figure, curves)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

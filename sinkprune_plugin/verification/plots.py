"""Pictures of a report, as PNG files."""

from pathlib import Path
from typing import Any

__all__ = ["draw_plots"]

DENSE_COLOR, PRUNED_COLOR = "#3b6ea8", "#d1495b"
_SIZE = (6.4, 3.6)
_DOTS_PER_INCH = 130


def draw_plots(directory: Path, content: dict[str, Any]) -> dict[str, str]:
    """Draw the results that are easier to see than to read.

    :param directory: where the files go
    :param content: a report
    :return: title → file name, in the order of the report
    """
    plots = {
        "Loss by noise level": ("perplexity.png", _perplexity),
        "Agreement of greedy answers": ("agreement.png", _agreement),
        "Speed": ("speed.png", _speed),
        "Sparsity by decoder block": ("sparsity.png", _sparsity),
    }
    for title, (file, draw) in plots.items():
        # Here and not above: matplotlib takes a second to import. No pyplot: it would keep figures in global state.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=_SIZE, dpi=_DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(alpha=0.25)
        draw(axes, content)
        figure.savefig(directory / file)
    return {title: file for title, (file, _) in plots.items()}


def _perplexity(axes: Any, content: dict[str, Any]) -> None:
    curve = content["quality"]["curve"]
    noise = [level["p_mask"] for level in curve]
    axes.plot(noise, [level["dense"] for level in curve], marker="o", color=DENSE_COLOR, label="dense")
    axes.plot(noise, [level["pruned"] for level in curve], marker="o", color=PRUNED_COLOR, label="pruned")
    axes.set_xlabel("share of masked tokens")
    axes.set_ylabel("nats per masked token")
    axes.legend(frameon=False)


def _agreement(axes: Any, content: dict[str, Any]) -> None:
    along = content["samples"]["along"]
    axes.plot([10 * (step + 1) for step in range(len(along))], [100 * share for share in along], marker="o",
              color=PRUNED_COLOR)  # fmt: skip
    axes.set_xlabel("share of the denoising steps (%)")
    axes.set_ylabel("same tokens (%)")
    axes.set_ylim(0, 102)


def _speed(axes: Any, content: dict[str, Any]) -> None:
    """Ratios with intervals, the whole above the cells, so that a noisy cell can't be mistaken for a result."""
    speed = content["speed"]
    rows = list(reversed(speed["rows"]))
    names = [f"batch {row['batch']}, {row['cache']}" for row in rows] + ["all"]
    for place, row in enumerate([*rows, speed]):
        whole = place == len(rows)
        ends = [[row["ratio"] - row["ratio_low"]], [row["ratio_high"] - row["ratio"]]]
        axes.errorbar([row["ratio"]], [place], xerr=ends, fmt="D" if whole else "o", capsize=3,
                      linewidth=2.5 if whole else 1.2, color=PRUNED_COLOR if whole else DENSE_COLOR)  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(f"times the dense model's speed ({100 * speed['confidence']:g} % intervals)")
    axes.set_title(f"Speed: {speed['verdict']}", loc="left", fontsize=11)


def _sparsity(axes: Any, content: dict[str, Any]) -> None:
    blocks = content["sparsity"]["by_block"]
    types = list(content["sparsity"]["by_type"])
    for name in types:
        shares = [100 * block[name]["sparsity"] if name in block else float("nan") for block in blocks.values()]
        axes.plot(range(len(shares)), shares, marker=".", label=name)
    axes.set_xlabel("decoder block")
    axes.set_ylabel("zeros (%)")
    axes.set_ylim(0, 102)
    legend = axes.legend(frameon=False, fontsize=8, ncols=2)
    for text in legend.get_texts():
        # A name from the checkpoint with two dollar signs isn't a formula.
        text.set_parse_math(False)

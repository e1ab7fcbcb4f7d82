"""The picture of a sink measurement: attention mass by position and step, with the path of the dominant sink."""

from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.sinks.dynamics import SinkDynamics
from sinkprune_plugin.sinks.observe import SinkObservation

__all__ = ["plot_sinks"]

# With more columns than this, one is narrower than a pixel, and a sink is one column wide.
_MAXIMUM_COLUMNS = 512
_DOTS_PER_INCH = 130
_COLOR_TICKS = (0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
_PATH_COLOR, _SINK_COLOR, _DOMINANT_COLOR = "#35d0ff", "#c2446e", "#1f7fb0"


def plot_sinks(
    observation: SinkObservation, dynamics: SinkDynamics, path: Path, *, title: str, window: int = 0
) -> None:
    """Draw one window's heat map of positions × steps, and the mean number and weight of the sinks at each step.

    Rows run downwards in the order of generation: from t = 1 to the smallest timestep, or from the shortest prefix to
    the whole window.

    :param observation: what was measured
    :param dynamics: its summary
    :param path: PNG file to write
    :param title: first line of the title; the summary follows
    :param window: index of the window in the heat map
    """
    # Here and not above: matplotlib takes a second to import. No pyplot: it would keep figures in global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count, steps, _ = observation.mass.shape
    # Denoising starts at t = 1, a growing context at its beginning.
    order = list(range(steps))[:: -1 if observation.axis == "timestep" else 1]
    figure = Figure(figsize=(12.5, 1.9 + 0.36 * max(steps, 6)), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    heat, number, weight = figure.subplots(1, 3, sharey=True, width_ratios=(6.4, 1.2, 1.2))
    # A name with two dollar signs isn't a formula.
    heading = f"{title}\n{_summary(observation, dynamics)}"
    figure.suptitle(heading, x=0.012, ha="left", fontsize=11.5, parse_math=False)

    image = _draw_mass(heat, observation, order, window)
    positions = [dynamics.dominant_positions[window][step] + 0.5 for step in order]
    rows = range(steps)
    heat.plot(positions, rows, color="black", linewidth=3, alpha=0.5)
    (line,) = heat.plot(positions, rows, color=_PATH_COLOR, lw=1.4, marker="o", ms=6, mec="black", clip_on=False)
    # Above the axes: inside, it would cover some part of the path.
    heat.legend([line], ["dominant sink"], loc="lower right", bbox_to_anchor=(1, 1), fontsize=9, frameon=False)
    heat.set_title(f"window {window + 1} of {count}", fontsize=10, loc="left")
    heat.set_ylabel(
        "timestep t (1 = all masked)\ndenoising runs downwards"
        if observation.axis == "timestep"
        else "tokens in the context\ncontext grows downwards"
    )
    heat.set_yticks(list(rows), [_row_label(observation, step) for step in order])
    bar = figure.colorbar(image, ax=heat, pad=0.012, fraction=0.03, extend="min")
    bar.set_label("attention mass, multiple of the mean", fontsize=9)
    top = image.norm.vmax
    bar.set_ticks([value for value in _COLOR_TICKS if value <= top])
    bar.minorticks_off()
    bar.ax.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    bar.ax.tick_params(labelsize=8)

    counts = [dynamics.sinks_per_timestep[step] for step in order]
    number.barh(list(rows), counts, color=_SINK_COLOR, height=0.7)
    number.set_title("number of sinks", fontsize=10, loc="left")
    number.set_xlabel("positions (mean)")
    number.set_xlim(0, max([*counts, 1]) * 1.25)
    for row, value in enumerate(counts):
        number.text(value, row, f" {value:.1f}", va="center", fontsize=7)

    for shares, label, color in (
        (dynamics.sink_mass_share, "all sinks", _SINK_COLOR),
        (dynamics.dominant_mass_share, "dominant", _DOMINANT_COLOR),
    ):
        weight.plot([100 * shares[step] for step in order], list(rows), color=color, marker="o", ms=4, label=label)
    weight.set_title("share of mass", fontsize=10, loc="left")
    weight.set_xlabel("percent (mean)")
    weight.set_xlim(left=0)
    weight.legend(fontsize=7, loc="best", framealpha=0.85)
    for axes in (number, weight):
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.savefig(path, format="png")


def _draw_mass(axes: Any, observation: SinkObservation, order: list[int], window: int) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    tokens = observation.mass.shape[2]
    mass = observation.mass[window]
    present = observation.present
    relative = mass / mass.sum(dim=1, keepdim=True) * present.sum(dim=1, keepdim=True)
    relative = relative.masked_fill(~present, torch.nan)
    bins = -(-tokens // max(-(-tokens // _MAXIMUM_COLUMNS), 1))
    width = -(-tokens // bins)
    padded = torch.nn.functional.pad(relative, (0, bins * width - tokens), value=torch.nan)
    # The maximum and not the mean of a bin: a sink is one position. NaN to zero first, as amax would return it.
    cells = padded.unflatten(1, (bins, width)).nan_to_num(-1.0).amax(dim=2)
    cells = cells.masked_fill(cells < 0, torch.nan)
    colors = colormaps["magma"].with_extremes(bad="#dddddd")
    edges = (torch.arange(bins + 1) * width).clamp(max=tokens).tolist()
    top = max(float(cells.nan_to_num(0.0).max()), 2.0)
    image = axes.pcolormesh(
        edges,
        [row - 0.5 for row in range(len(order) + 1)],
        cells[order].numpy(),
        cmap=colors,
        norm=LogNorm(vmin=0.5, vmax=top),
        rasterized=True,
    )
    axes.set_xlim(0, tokens)
    axes.set_ylim(len(order) - 0.5, -0.5)
    for row in range(1, len(order)):
        axes.axhline(row - 0.5, color="white", linewidth=0.4, alpha=0.5)
    each = f"; each column is the maximum of {width}" if width > 1 else ""
    axes.set_xlabel(f"token position (0 to {tokens - 1}{each})")
    return image


def _row_label(observation: SinkObservation, step: int) -> str:
    return f"{observation.steps[step]:g}" if observation.axis == "timestep" else str(observation.lengths[step])


def _summary(observation: SinkObservation, dynamics: SinkDynamics) -> str:
    count, _, tokens = observation.mass.shape
    spread = tokens * dynamics.dominant_variance**0.5
    return (
        f"{count} window{'s' if count > 1 else ''} of {tokens} tokens: the dominant sink moves in "
        f"{100 * dynamics.dominant_moves:.0f} % of the steps (std {spread:.0f} positions), "
        f"{100 * dynamics.transient_share:.0f} % of the sinks are transient"
    )

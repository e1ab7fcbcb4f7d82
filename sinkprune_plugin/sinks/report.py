"""Measurement of a model's sinks as files: sinks.json, sinks.png, and a short table for the terminal."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sinkprune_plugin.diffusion import DiffusionSpec
from sinkprune_plugin.errors import short
from sinkprune_plugin.outputs import new_directory
from sinkprune_plugin.provenance import provenance
from sinkprune_plugin.sinks.dynamics import SinkDynamics, sink_dynamics
from sinkprune_plugin.sinks.observe import SinkObservation, SinkSettings, find_spec, observe_sinks
from sinkprune_plugin.sinks.plot import plot_sinks

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["SCHEMA_VERSION", "SinkReport", "print_sink_report", "sink_report"]

SCHEMA_VERSION = 1
JSON_FILE, PLOT_FILE = "sinks.json", "sinks.png"


@dataclass(frozen=True)
class SinkReport:
    """A finished measurement.

    :param directory: where sinks.json and sinks.png are
    :param model_name: what the report calls the model
    :param family: name of the diffusion family; None for a model that was measured over growing prefixes
    :param settings: grid, detection and seed
    :param observation: masses and masks
    :param dynamics: their summary
    """

    directory: Path
    model_name: str
    family: str | None
    settings: SinkSettings
    observation: SinkObservation
    dynamics: SinkDynamics


def sink_report(
    model: Any,
    tokenizer_or_spec: Any,
    windows: torch.Tensor,
    output_dir: Path | str,
    *,
    seed: int | None = None,
    settings: SinkSettings | None = None,
    model_name: str | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
) -> SinkReport:
    """Measure where the sinks of a model are at every step and write the numbers and a plot.

    The model is a diffusion LM if its ``model_type`` belongs to a known family, or if a spec is passed; any other is
    treated as autoregressive and measured over growing prefixes, see :func:`observe_sinks`.

    :param model: transformers model
    :param tokenizer_or_spec: its tokenizer (for the mask token), or a :class:`DiffusionSpec`, or None
    :param windows: (N, T) int64 token ids without padding
    :param output_dir: directory to write; it appears whole or not at all
    :param seed: seed of the corruption, in place of the one in ``settings``
    :param settings: grid, detection and seed
    :param model_name: name in the report; default: where the model was loaded from
    :param batch_size: windows in a forward pass; None takes as many as have 2048 tokens
    :param overwrite: replace an output directory that has something in it
    :return: what was measured and written
    :raises UsageError: if the output is taken, windows don't fit or the attention can't be intercepted
    """
    settings = settings or SinkSettings()
    settings = settings if seed is None else replace(settings, seed=seed)
    if isinstance(tokenizer_or_spec, DiffusionSpec):
        spec: DiffusionSpec | None = tokenizer_or_spec
    else:
        spec = find_spec(model.config, tokenizer_or_spec)
    name = short(model_name or Path(getattr(model.config, "_name_or_path", "") or type(model).__name__).name)
    with new_directory(Path(output_dir), overwrite=overwrite) as directory:
        observation = observe_sinks(model, windows, spec, settings, batch_size=batch_size)
        dynamics = sink_dynamics(
            observation.mass, observation.masks, settings.sink_persistence, present=observation.present
        )
        report = SinkReport(Path(output_dir), name, spec.name if spec else None, settings, observation, dynamics)
        text = json.dumps(_as_json(report, getattr(model.config, "model_type", None)), indent=2)
        (directory / JSON_FILE).write_text(text + "\n", encoding="utf-8")
        plot_sinks(observation, dynamics, directory / PLOT_FILE, title=_title(report))
    return report


def print_sink_report(report: SinkReport, console: "Console") -> None:
    """Print a table with one row per step, and the movement of the dominant sink below it.

    :param report: finished measurement
    :param console: where to print
    """
    from rich.table import Table
    from rich.text import Text

    observation, dynamics = report.observation, report.dynamics
    # Text: a name with brackets isn't markup.
    title = Text(_title(report), style="table.title")
    table = Table(title=title, title_justify="left", caption=_caption(report), caption_justify="left")
    first = "timestep" if observation.axis == "timestep" else "tokens"
    for heading in (first, "sinks", "mass on sinks", "mass on dominant", "dominant position (window 1)"):
        table.add_column(heading, justify="right")
    for index, step in enumerate(observation.steps):
        table.add_row(
            f"{step:g}" if observation.axis == "timestep" else str(observation.lengths[index]),
            f"{dynamics.sinks_per_timestep[index]:.1f}",
            f"{100 * dynamics.sink_mass_share[index]:.1f} %",
            f"{100 * dynamics.dominant_mass_share[index]:.1f} %",
            str(dynamics.dominant_positions[0][index]),
        )
    console.print(table)


def _title(report: SinkReport) -> str:
    if report.observation.axis == "timestep":
        return f"{report.model_name} ({report.family} diffusion LM): attention sinks over denoising timesteps"
    return f"{report.model_name} (no known diffusion family): attention sinks over a growing context"


def _caption(report: SinkReport) -> str:
    count, _, tokens = report.observation.mass.shape
    dynamics = report.dynamics
    return (
        f"{count} windows of {tokens} tokens. The dominant sink moves in {100 * dynamics.dominant_moves:.0f} % of the "
        f"steps; variance of its position / T²: {dynamics.dominant_variance:.4f}. A window has "
        f"{dynamics.sinks_ever:.1f} positions that are ever a sink, {100 * dynamics.transient_share:.0f} % of them "
        "transient."
    )


def _as_json(report: SinkReport, model_type: str | None) -> dict[str, Any]:
    observation, dynamics = report.observation, report.dynamics
    count, _, tokens = observation.mass.shape
    return {
        "schema": "sinkprune.sinks",
        "schema_version": SCHEMA_VERSION,
        "model": {"name": report.model_name, "model_type": model_type, "family": report.family},
        "settings": {**asdict(report.settings), "windows": count, "seq_len": tokens},
        "axis": observation.axis,
        "steps": [_step_as_json(report, index) for index in range(len(observation.steps))],
        "dynamics": {
            "dominant_variance": dynamics.dominant_variance,
            "dominant_moves": dynamics.dominant_moves,
            "sinks_ever": dynamics.sinks_ever,
            "persistence": dynamics.persistence,
            "transient_share": dynamics.transient_share,
        },
        "provenance": provenance(),
    }


def _step_as_json(report: SinkReport, index: int) -> dict[str, Any]:
    observation, dynamics = report.observation, report.dynamics
    return {
        # A timestep in (0, 1], or the prefix's share of the window.
        "step": observation.steps[index],
        "tokens": observation.lengths[index],
        "sinks": dynamics.sinks_per_timestep[index],
        "sink_mass_share": dynamics.sink_mass_share[index],
        "dominant_mass_share": dynamics.dominant_mass_share[index],
        "dominant_positions": [positions[index] for positions in dynamics.dominant_positions],
        "sink_positions": _positions(observation.masks[:, index]),
    }


def _positions(masks: torch.Tensor) -> Sequence[Sequence[int]]:
    """Positions of the sinks in each window.

    :param masks: (N, T) soft masks
    :return: one list per window
    """
    return [row.nonzero().flatten().tolist() for row in masks > 0.5]

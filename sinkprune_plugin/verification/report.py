"""The report of a verification: JSON for machines, one HTML file for people, a table for the terminal."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkprune_plugin import __version__
from sinkprune_plugin.embedded_pictures import data_url
from sinkprune_plugin.verification.plots import draw_plots
from sinkprune_plugin.verification.recovered import curve_picture, three_columns
from sinkprune_plugin.verification.speed_verdict import NO_DIFFERENCE

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["HTML_FILE", "JSON_FILE", "SCHEMA_VERSION", "print_report", "write_report"]

SCHEMA_VERSION = 2
JSON_FILE, HTML_FILE = "report.json", "report.html"
TEMPLATE = Path(__file__).parent / "report.html.jinja"


def write_report(directory: Path, content: dict[str, Any], recovered: Path | None = None) -> None:
    """Write report.json, the plots and report.html.

    :param directory: where they go; the sink plots are there already
    :param content: the report, JSON-serialisable
    :param recovered: directory of the recovered model, if there is one, for the picture of its training
    """
    plots = draw_plots(directory, content)
    (directory / JSON_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    pictures = {title: data_url(directory / file) for title, file in plots.items()}
    sinks = {name: data_url(directory / each["plot"]) for name, each in content["sinks"].items()}
    (directory / HTML_FILE).write_text(_html(content, pictures, sinks, recovered), encoding="utf-8")


def _html(content: dict[str, Any], pictures: dict[str, str], sinks: dict[str, str], recovered: Path | None) -> str:
    from jinja2 import Environment, StrictUndefined

    # The page shows text written by models: everything is escaped.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["megabytes"] = lambda size: f"{size / 1e6:,.2f} MB"
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=content,
        pictures=pictures,
        sinks=sinks,
        headline=headline(content),
        columns=three_columns(content) if "recovered" in content else [],
        curve=None if recovered is None else curve_picture(recovered),
        version=__version__,
    )


def headline(content: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The answers in one table.

    :param content: a report
    :return: question, answer, and what it is compared with
    """
    quality, samples, size = content["quality"], content["samples"], content["size"]
    total = content["sparsity"]["total"]
    return [
        (
            "ELBO perplexity",
            f"{quality['elbo_pruned']:.2f} ± {quality['elbo_pruned_error']:.2f}",
            f"dense {quality['elbo_dense']:.2f}; {quality['increase_percent']:+.1f} % "
            f"(95 %: {100 * (quality['ratio_low'] - 1):+.1f} to {100 * (quality['ratio_high'] - 1):+.1f})",
        ),
        (
            "masked-token perplexity",
            f"{quality['masked_pruned']:.2f}",
            f"dense {quality['masked_dense']:.2f}",
        ),
        (
            "same tokens as dense",
            f"{100 * samples['agreement']:.1f} %",
            f"first difference after {samples['first_difference']:.1f} tokens",
        ),
        (
            "repetition",
            f"{100 * samples['repetition_pruned']:.1f} %",
            f"dense {100 * samples['repetition_dense']:.1f} %; distinct pairs {100 * samples['distinct_pruned']:.1f} % "
            f"and {100 * samples['distinct_dense']:.1f} %",
        ),
        ("zeros", f"{100 * total['sparsity']:.1f} %", f"structure {total['structure']}"),
        (
            "weight files",
            f"{size['pruned']['file_bytes'] / 1e6:.2f} MB",
            f"dense {size['dense']['file_bytes'] / 1e6:.2f} MB; {100 * size['file_ratio']:.1f} %, "
            f"{size['pruned']['format']}",
        ),
        (
            "weights in memory",
            f"{size['pruned']['memory_bytes'] / 1e6:.2f} MB",
            # As the transformers models hold them.
            f"dense {size['dense']['memory_bytes'] / 1e6:.2f} MB; {100 * size['memory_ratio']:.1f} %",
        ),
        *_peaks(size),
        ("speed", *_speed(content["speed"])),
    ]


def _peaks(size: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The most memory that each took, where it was measured."""
    if "peak" not in size["pruned"]:
        return []
    pruned, dense = size["pruned"]["peak"], size["dense"]["peak"]
    rows = [
        (
            "peak memory",
            f"{pruned['peak_bytes'] / 1e6:.0f} MB",
            f"dense {dense['peak_bytes'] / 1e6:.0f} MB; before a checkpoint is opened "
            f"{pruned['start_bytes'] / 1e6:.0f} and {dense['start_bytes'] / 1e6:.0f} MB",
        )
    ]
    if pruned["device_bytes"] is not None:
        text = f"dense {dense['device_bytes'] / 1e6:.0f} MB"
        rows.append(("peak memory of the device", f"{pruned['device_bytes'] / 1e6:.0f} MB", text))
    return rows


def _speed(speed: dict[str, Any]) -> tuple[str, str]:
    """The verdict, and what it rests on: the whole, never the best of the cells."""
    interval = f"{100 * speed['confidence']:g} %: {speed['ratio_low']:.2f} to {speed['ratio_high']:.2f}"
    ratio = f"{speed['ratio']:.2f} ×"
    measured = f"{speed['repetitions']} repetitions, {speed['backend']}"
    why = f"; {speed['why_not_faster']}" if speed["why_not_faster"] else ""
    if speed["verdict"] == NO_DIFFERENCE:
        return speed["verdict"], f"{ratio} dense ({interval}), {measured}{why}"
    return f"{ratio}, {speed['verdict']}", f"dense is 1 ({interval}), {measured}{why}"


def print_report(content: dict[str, Any], console: "Console") -> None:
    """Print the answers, and the limits if there are any.

    :param content: a report
    :param console: where to print
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        # Text: a name with brackets isn't markup.
        title=Text(f"{content['pruned']} against {content['dense']}", style="table.title"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for heading in ("", "pruned", "compared with"):
        table.add_column(heading, overflow="fold")
    for row in headline(content):
        table.add_row(*map(Text, row))
    console.print(table)
    if "recovered" in content:
        beside = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for heading in ("", "dense", "pruned", "recovered"):
            beside.add_column(heading, overflow="fold")
        for columns in three_columns(content):
            beside.add_row(*map(Text, columns))
        console.print(beside)
    for bar in content["bars"]:
        verdict = "reached" if bar["passed"] else "MISSED"
        console.print(f"--{bar['name']} {bar['limit']:g}: {bar['value']:.4g}, {verdict}")

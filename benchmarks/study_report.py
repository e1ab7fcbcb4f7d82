"""From the study's cells to docs/study-results.json, the tables of docs/study.md and the figures in docs/images."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from study_cells import ALL_MODELS, EMBEDDED, MODELS, Cell, cells
from study_statistics import Windows, perplexity

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.files.shard_reader import read_json

__all__ = ["DOCS", "Runs", "committed_records", "figure_name", "load_runs", "write_report"]

DOCS = Path(__file__).parent.parent / "docs"
DIGITS = 6  # of a window's loss in the committed results


class Runs:
    """Window losses of all finished cells.

    :param losses: losses of the test windows by cell
    :param shares: for each model, what each mask takes out, see ``study.Bench.sink_shares``
    """

    def __init__(self, losses: Mapping[Cell, Windows], shares: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        self.shares = shares
        self._losses: dict[tuple[str, str, str, str, str], dict[int, Windows]] = {}
        for cell, windows in losses.items():
            key = (cell.model, cell.group, cell.method, cell.pattern, cell.value)
            self._losses.setdefault(key, {})[cell.seed] = windows

    def of(self, model: str, group: str, method: str, pattern: str, value: str = "") -> Mapping[int, Windows]:
        """Losses by seed; empty where nothing was run.

        :param model: name of the model
        :param group: group of cells
        :param method: name of the method
        :param pattern: sparsity pattern
        :param value: what is swept
        """
        return self._losses.get((model, group, method, pattern, value), {})

    def of_method(self, model: str, method: str, pattern: str) -> Mapping[int, Windows]:
        """Losses of a method in the grid or the controls.

        :param model: name of the model
        :param method: name of the method
        :param pattern: sparsity pattern
        """
        return self.of(model, "grid", method, pattern) or self.of(model, "controls", method, pattern)

    def dense(self, model: str) -> float:
        """Perplexity of the unpruned model.

        :param model: name of the model
        """
        return perplexity(list(self.of(model, "grid", "dense", "").values()))


def committed_records(docs: Path) -> Iterator[dict[str, Any]]:
    """Cells of the committed results.

    :param docs: folder with study-results.json
    """
    content = read_json(docs / "study-results.json")
    for key, cell in content["cells"].items():
        yield {"key": key, **cell}
    for model, shares in content["sink shares"].items():
        yield {"key": f"{model}/sink shares", "shares": shares}


def load_runs(records: Sequence[Mapping[str, Any]]) -> Runs:
    """Window losses of the study's cells that have been run.

    :param records: cells, perhaps not all
    :raises UsageError: if a dense model is missing, or a cell has another number of windows
    """
    by_key = {str(record["key"]): record["windows"] for record in records if "windows" in record}
    losses: dict[Cell, Windows] = {}
    for model in ALL_MODELS:
        dense = Cell("grid", "dense", "", 0, model=model).key
        if dense not in by_key:
            raise UsageError(f"cell {dense!r} is not done, which all others are compared with; run it first")
        count = len(by_key[dense])
        for cell in (each for each in cells() if each.model == model and each.key in by_key):
            if len(by_key[cell.key]) != count:
                raise UsageError(
                    f"cell {cell.key!r} has {len(by_key[cell.key])} test windows, the dense one has {count}; "
                    "start a new results file"
                )
            losses[cell] = [round(loss, DIGITS) for loss in by_key[cell.key]]
    return Runs(losses, _shares(records))


def _shares(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {str(record["key"]).split("/")[0]: record["shares"] for record in records if "shares" in record}


def figure_name(model: str) -> str:
    """File of a model's figure in docs/images.

    :param model: name of the model
    """
    return "study.png" if model == EMBEDDED else f"study-{model}.png"


def write_report(records: Sequence[Mapping[str, Any]], docs: Path) -> None:
    """Write the compact results, the figures and the page's tables.

    :param records: all cells
    :param docs: folder with study.md
    """
    from study_figure import draw
    from study_tables import tables

    runs = load_runs(records)
    page = docs / "study.md"
    text = page.read_text(encoding="utf-8")
    for name, table in tables(runs).items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise UsageError(f"{page.name} has no single place {start} … {end} for a table; put one in")
        before, rest = text.split(start)
        text = f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"
    page.write_text(text, encoding="utf-8")
    (docs / "study-results.json").write_text(_compact(records), encoding="utf-8")
    for model in MODELS:
        draw(runs, model, docs / "images" / figure_name(model))


def _compact(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per cell: small, and a diff shows exactly the cells that changed."""
    by_key = {str(record["key"]): record for record in records}
    means: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for cell in cells():
        record = by_key.get(cell.key)
        if record is None:
            continue
        windows = [round(loss, DIGITS) for loss in record["windows"]]
        means[cell.key] = round(perplexity([windows]), 3)
        kept[cell.key] = {"seconds": record["seconds"], "zeros": record["zeros"], "windows": windows}
    about = "perplexity of each cell. windows: negative Monte-Carlo ELBO of each test window, nats per token"
    parts = {"perplexity": means, "sink shares": _shares(records), "cells": kept}
    body = ",\n".join(f'"{name}": {_lines(entries)}' for name, entries in parts.items())
    return f'{{\n"about": {json.dumps(about)},\n{body}\n}}\n'


def _lines(entries: Mapping[str, Any]) -> str:
    lines = [
        f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, separators=(',', ':'))}"
        for key, value in entries.items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}"

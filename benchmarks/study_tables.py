"""The tables of docs/study.md."""

from collections.abc import Mapping, Sequence

from study_cells import (
    ALL_MODELS,
    CHANGE_PATTERNS,
    EMBEDDED,
    GRID_PATTERNS,
    MAIN,
    MODELS,
    OURS,
    SEEDS,
    SUM_OF_SQUARES,
    SWEEPS,
    SWEPT,
    SWEPT_PATTERNS,
    changes,
    methods,
)
from study_report import Runs
from study_sinks import KINDS, SINK_PATTERNS, masks_of
from study_statistics import Difference, Windows, paired_difference, perplexity

__all__ = ["COMPARISONS", "PEER", "difference_of", "tables"]

# What the grid's numbers are compared with: llm-compressor's own modifier.
PEER = "SparseGPT"
# What is compared → method before, method after. Only one thing changes, or the label says what else does.
COMPARISONS = {
    "Wanda": {
        "corrupted inputs alone (both propagated)": ("Wanda", "Wanda, corrupted, no mask, propagated"),
        "no longer propagating (corrupted, no mask)": (
            "Wanda, corrupted, no mask, propagated",
            "Wanda, corrupted, no mask",
        ),
        "sink mask (corrupted)": ("Wanda, corrupted, no mask", "sink-aware Wanda"),
        "sink mask (corrupted, propagated, 1/t²)": (
            "Wanda, corrupted, no mask, propagated, 1/t²",
            "sink-aware Wanda, propagated, 1/t²",
        ),
        "transient scope instead of all": ("sink-aware Wanda", "sink-aware Wanda, transient"),
        "sum of squares instead of norms": ("sink-aware Wanda", SUM_OF_SQUARES),
        "1/t weights (sums of squares)": (SUM_OF_SQUARES, "sink-aware Wanda, 1/t"),
        "1/t² weights (sums of squares)": (SUM_OF_SQUARES, "sink-aware Wanda, 1/t²"),
        "propagating": ("sink-aware Wanda", "sink-aware Wanda, propagated"),
        "propagating (1/t²)": ("sink-aware Wanda, 1/t²", "sink-aware Wanda, propagated, 1/t²"),
        "weights solved on the mask": ("sink-aware Wanda", "sink-aware Wanda, reconstruct"),
    },
    "SparseGPT": {
        "our implementation (clean, no mask)": ("SparseGPT", "our SparseGPT, clean, no mask"),
        "corrupted inputs alone": ("our SparseGPT, clean, no mask", "SparseGPT, corrupted, no mask"),
        "sink mask (clean)": ("our SparseGPT, clean, no mask", "sink-aware SparseGPT, clean"),
        "sink mask (corrupted)": ("SparseGPT, corrupted, no mask", "sink-aware SparseGPT"),
    },
}

# Experiments with the mask that are cells of other groups.
ELSEWHERE = {
    "Wanda, no mask": ("grid", "Wanda, corrupted, no mask"),
    "Wanda, sinks of the model": ("grid", "sink-aware Wanda"),
    "SparseGPT, no mask": ("grid", "SparseGPT, corrupted, no mask"),
    "SparseGPT, sinks of the model": ("grid", "sink-aware SparseGPT"),
    "ADMM, no mask": ("changes", "no sink mask"),
    "ADMM, sinks of the model": ("grid", OURS),
}

BySeed = Mapping[int, Windows]


def difference_of(before: BySeed, after: BySeed) -> Difference | None:
    """Paired difference over the seeds that both have; None without one.

    :param before: losses by seed
    :param after: losses by seed
    """
    seeds = sorted(set(before) & set(after))
    if not seeds:
        return None
    return paired_difference([before[seed] for seed in seeds], [after[seed] for seed in seeds])


def tables(runs: Runs) -> dict[str, str]:
    """Markdown tables of the page, by name.

    :param runs: losses of all cells
    """
    made = {}
    for model in MODELS:
        made[f"grid-{model}"] = _grid_table(runs, model, ("magnitude", "sink-aware Wanda", *MAIN))
        made[f"changes-{model}"] = _change_table(runs, model)
    for model in ALL_MODELS:
        made[f"sinks-{model}"] = _sink_table(runs, model)
        made[f"shares-{model}"] = _share_table(runs, model)
    made["earlier"] = _grid_table(runs, EMBEDDED, [method for method in methods() if method not in MAIN])
    made |= {f"parts-{family}": _parts_table(runs, family) for family in COMPARISONS}
    return made | {"sweeps": _sweep_table(runs)}


def show(difference: Difference | None, seeds: int = len(SEEDS)) -> str:
    """A change of the perplexity in percent, with the wider half of its interval; bold where it is clear.

    :param difference: to show; None if there is none
    :param seeds: with fewer, their number is added
    """
    if difference is None:
        return ""
    low, high = difference.percent_ends
    text = f"{difference.percent:+.1f} ± {max(high - difference.percent, difference.percent - low):.1f}"
    text = f"**{text.replace('-', '−')}**" if difference.clear else text.replace("-", "−")
    count = len(difference.by_seed)
    return text if count >= seeds else f"{text}, {count} seed{'s' if count > 1 else ''}"


def _value(run: BySeed, peer: BySeed, *, alone: bool = False, seeds: int = len(SEEDS)) -> str:
    """Perplexity and its change against a peer, on the seeds of both."""
    if not run:
        return ""
    if alone or not peer:
        return f"{perplexity(list(run.values())):.1f}"
    return f"{perplexity(list(run.values())):.1f} ({show(difference_of(peer, run), seeds)})"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _grid_table(runs: Runs, model: str, names: Sequence[str]) -> str:
    rows = [["dense", *[f"{runs.dense(model):.1f}"] * len(GRID_PATTERNS)]]
    for name in names:
        pairs = [(runs.of_method(model, name, each), runs.of_method(model, PEER, each)) for each in GRID_PATTERNS]
        rows.append([name, *[_value(run, peer, alone=name == PEER) for run, peer in pairs]])
    return _table(["method", *GRID_PATTERNS], [row for row in rows if any(row[1:])])


def _change_table(runs: Runs, model: str) -> str:
    ours = {pattern: runs.of_method(model, OURS, pattern) for pattern in CHANGE_PATTERNS}
    rows = [[OURS, *[_value(ours[pattern], {}) for pattern in CHANGE_PATTERNS]]]
    for change in changes():
        found = [runs.of(model, "changes", change, pattern) for pattern in CHANGE_PATTERNS]
        rows.append([change, *[_value(a, ours[b]) for a, b in zip(found, CHANGE_PATTERNS, strict=True)]])
    return _table(["changed", *CHANGE_PATTERNS], [row for row in rows if any(row[1:])])


def _sink_table(runs: Runs, model: str) -> str:
    columns = [(kind, pattern) for pattern in SINK_PATTERNS for kind in KINDS]
    rows = []
    for label, without in masks_of():
        row = [label]
        for kind, pattern in columns:
            before, after = (_masked(runs, model, f"{kind}, {name}", pattern) for name in (without, label))
            row.append(show(difference_of(before, after)))
        rows.append(row)
    shown = [i for i in range(len(columns)) if any(row[i + 1] for row in rows)]
    headings = ["masked", *[f"{columns[i][0]}, {columns[i][1]}" for i in shown]]
    return _table(headings, [[row[0], *[row[i + 1] for i in shown]] for row in rows if any(row[1:])])


def _share_table(runs: Runs, model: str) -> str:
    shares = runs.shares.get(model, {})
    names = list(dict.fromkeys(name for each in shares.values() for name in each))
    names.sort(key=lambda name: name != "positions")
    rows = [[label, *[f"{100 * each[name]:.1f} %" for name in names]] for label, each in shares.items()]
    return _table(["masked", *[f"input of `{name}`" if name != "positions" else name for name in names]], rows)


def _masked(runs: Runs, model: str, name: str, pattern: str) -> BySeed:
    found = runs.of(model, "sinks", name, pattern)
    return found or (runs.of(model, *ELSEWHERE[name], pattern) if name in ELSEWHERE else {})


def _parts_table(runs: Runs, family: str) -> str:
    rows = []
    for label, pair in COMPARISONS[family].items():
        found = [[runs.of_method(EMBEDDED, name, pattern) for name in pair] for pattern in GRID_PATTERNS]
        rows.append([label, *[show(difference_of(*each)) for each in found]])
    return _table([family, *GRID_PATTERNS], rows)


def _sweep_table(runs: Runs) -> str:
    rows = []
    for sweep, values in SWEEPS.items():
        for value in values:
            row = [f"`{sweep}` {value:g}" if sweep != "windows" else f"{value} windows"]
            for method in SWEPT:
                for pattern in SWEPT_PATTERNS:
                    default = runs.of_method(EMBEDDED, method, pattern)
                    row.append(_value(runs.of(EMBEDDED, sweep, method, pattern, str(value)), default, seeds=1))
            rows.append(row)
    return _table(["", *[f"{method}, {pattern}" for method in SWEPT for pattern in SWEPT_PATTERNS]], rows)

"""The study's grid, its resumption and its statistics; the runs themselves take an hour and aren't repeated here."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import study

    yield study
    for name in ("study", "study_report"):
        sys.modules.pop(name, None)


@pytest.fixture
def report(study):
    import study_report

    return study_report


def test_the_grid_is_whole_and_every_cell_has_its_own_key(study):
    cells = study.cells()
    keys = [cell.key for cell in cells]
    assert len(set(keys)) == len(keys)
    grid = [cell for cell in cells if cell.group == "grid"]
    assert len(grid) == 1 + len(study.methods()) * len(study.PATTERNS) * len(study.SEEDS)
    assert len(cells) - len(grid) == 3 * 3 * 2 * 2


def test_every_method_makes_a_modifier_for_every_pattern(study):
    for maker in study.methods().values():
        for sparsity, structure in study.PATTERNS.values():
            if maker is not None:
                modifier = maker(sparsity, structure, 3)
                assert modifier.mask_structure == structure


def test_without_a_mask_no_position_is_suppressed():
    import torch

    from sinkprune_plugin.sinks import soft_sink_mask

    mass = torch.ones(1, 64)
    mass[0, 0] = 1000
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from study import NO_MASK
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("study", None)
    assert float(soft_sink_mask(mass, sink_std=2.0).max()) > 0.99
    assert float(soft_sink_mask(mass, sink_std=NO_MASK).max()) == 0


def test_a_line_that_was_cut_off_is_done_again(study, tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text('{"key": "grid/dense//0/", "windows": [1.0]}\n{"key": "grid/magni')
    assert [record["key"] for record in study.finished(results)] == ["grid/dense//0/"]
    assert list(study.finished(tmp_path / "none.jsonl")) == []


def test_running_resumes_and_keeps_what_is_there(study, tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    results.write_text('{"key": "grid/dense//0/", "seconds": 0, "windows": [1.0], "zeros": 0}\n{"key": "grid/magni')
    study.run(results, limit=1)
    keys = [record["key"] for record in study.finished(results)]
    assert keys == ["grid/dense//0/", "grid/magnitude/50 %/0/"]
    record = list(study.finished(results))[1]
    assert record["zeros"] == pytest.approx(0.5, abs=0.002)
    assert len(record["windows"]) == study.TEST_WINDOWS
    # Magnitude at 50 % is known to cost tiny-llada about a tenth of its perplexity; never nothing, never half.
    assert 3.9 < statistics.fmean(record["windows"]) < 4.4


def test_differences_are_taken_between_windows_with_seeds_averaged_first(report):
    first = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    second = [[1.1, 2.4, 3.2], [1.3, 2.2, 3.0]]
    mean, low, high = report.paired_difference(first, second)
    by_window = [0.2, 0.3, 0.1]
    assert mean == pytest.approx(0.2)
    error = statistics.stdev(by_window) / math.sqrt(3)
    assert (low, high) == pytest.approx((0.2 - 1.96 * error, 0.2 + 1.96 * error))


def test_keys_with_slashes_in_the_methods_name(report):
    runs = report.collect(
        [
            {"key": "grid/sink-aware Wanda, 1/t²/2:4/1/", "windows": [2.0]},
            {"key": "grid/sink-aware Wanda, 1/t²/2:4/0/", "windows": [1.0]},
            {"key": "sink_std/sink-aware Wanda/60 %/0/2.0", "windows": [3.0]},
        ]
    )
    assert runs == {
        ("grid", "sink-aware Wanda, 1/t²", "2:4", ""): [[1.0], [2.0]],
        ("sink_std", "sink-aware Wanda", "60 %", "2.0"): [[3.0]],
    }


def test_the_page_says_what_the_results_say():
    """Every perplexity in the committed table is that of the committed results."""
    docs = BENCHMARKS.parent / "docs"
    results = json.loads((docs / "study-results.json").read_text(encoding="utf-8"))
    page = (docs / "study.md").read_text(encoding="utf-8")
    for method, patterns in results["perplexity"].items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {method} |") and line.count("|") == 8]
        numbers = [cell.strip() for cell in line.split("|")[2:7]]
        assert numbers == [f"{patterns[pattern]['perplexity']:.1f}" for pattern in patterns], method

"""The study's grid, its resumption, its statistics and its page; the runs themselves take hours."""

import json
import math
import random
import statistics
import sys
from pathlib import Path

import pytest
import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier
from sinkprune_plugin.sinks import soft_sink_mask
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
DOCS = BENCHMARKS.parent / "docs"
PARTS = ("cache", "cells", "figure", "report", "sinks", "statistics", "tables")
MODULES = ("study", *(f"study_{part}" for part in PARTS))


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import study

    yield study
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def report(study):
    import study_report

    return study_report


@pytest.fixture
def tables(study):
    import study_tables

    return study_tables


def made_up_records(study, windows=24):
    """Losses for every cell: a difficulty for each window, and a small offset for each cell."""
    difficulty = [3 + 0.1 * window for window in range(windows)]
    records = []
    for number, cell in enumerate(study.cells()):
        noise = random.Random(number)
        losses = [loss + 0.001 * number + noise.gauss(0, 0.01) for loss in difficulty]
        records.append({"key": cell.key, "seconds": 1.5, "zeros": 0.5, "windows": losses})
    shares = {"sinks": {"q_proj": 0.01, "positions": 0.02}}
    return records + [{"key": f"{model}/sink shares", "shares": shares} for model in study.ALL_MODELS]


# ---- grid


def test_every_cell_has_its_own_key_and_a_maker(study):
    cells = study.cells()
    assert len({cell.key for cell in cells}) == len(cells)
    assert {cell.method for cell in cells} == {"dense", *study.makers()}
    seeds = {}
    for cell in cells:
        if cell.method != "dense" and cell.group not in study.SWEEPS:
            seeds.setdefault((cell.model, cell.group, cell.method, cell.pattern), set()).add(cell.seed)
    assert set(map(frozenset, seeds.values())) == {frozenset({0, 1, 2})}


def test_every_method_makes_a_modifier_for_every_pattern(study):
    from study_cells import ALPS

    makers = study.makers()
    assert [name for name, maker in makers.items() if maker is None] == ["magnitude"]
    for name, maker in makers.items():
        for sparsity, structure in study.PATTERNS.values():
            # Early or late: only where the pattern leaves a choice.
            if maker is None or (structure != "0:0" and "sparser" in name):
                continue
            modifier = maker(sparsity, structure, 3)
            assert modifier.mask_structure == structure
            assert modifier.sparsity == sparsity
            assert getattr(modifier, "seed", 3) == 3
            if "no mask" in name or name in (ALPS, "no sink mask"):
                assert modifier.sink_std == 1e6
            elif hasattr(modifier, "sink_std"):
                assert modifier.sink_std == 2.0


def test_names_say_what_differs_from_the_default(study):
    from study_cells import controls, methods

    for name, maker in (methods() | controls()).items():
        if maker is None or name in ("Wanda", "SparseGPT"):
            continue
        modifier = maker(0.5, "0:0", 0)
        assert modifier.sink_scope == ("transient" if "transient" in name else "all")
        weighting = "inverse_square" if "1/t²" in name else "inverse" if "1/t" in name else "uniform"
        assert modifier.timestep_weighting == weighting
        if "Wanda" in name:
            assert modifier.propagate_error == ("propagated" in name)
            assert modifier.reconstruct == ("reconstruct" in name)
            squares = "sum of squares" in name or "1/t" in name
            assert modifier.norm_aggregation == ("sum_of_squares" if squares else "sum_of_norms")
        else:
            assert modifier.calibrate_on == ("clean" if "clean" in name else "corrupted")


def differing(first, second):
    """Fields of both modifiers that differ."""
    one, other = first.model_dump(), second.model_dump()
    return {name for name in one.keys() & other.keys() if one[name] != other[name]}


def test_each_change_of_ours_is_one_field(study):
    from study_cells import OURS, changes, methods

    ours = methods()[OURS](0.75, "0:0", 0)
    assert differing(ours, SinkAwareADMMModifier(sparsity=0.75)) == set()
    changed = {}
    for name, maker in changes().items():
        modifier = maker(0.75, "0:0", 0)
        changed[name] = differing(ours, modifier)
        assert isinstance(modifier, SinkAwareADMMModifier) == (name != "SparseGPT's solver")
    # The solver is another modifier's, all fields that both have are the same.
    assert changed.pop("SparseGPT's solver") == set()
    assert [sorted(each) for each in changed.values()] == [
        ["calibrate_on"],
        ["target"],
        ["within_block"],
        ["sink_std"],
        ["sink_scope"],
        ["timestep_weighting"],
        ["allocation"],
        ["allocation"],
    ]


def test_each_mask_is_compared_with_none_in_the_same_calibration(study, tables):
    from study_sinks import KINDS, masks_of

    makers = study.makers()
    for kind in KINDS:
        for label, without in masks_of():
            before, after = (makers[f"{kind}, {name}"](0.75, "0:0", 0) for name in (without, label))
            assert differing(before, after) in ({"sink_std"}, {"sink_std", "where"})
            assert before._grid == after._grid
            assert len(after._grid) == (3 if label.startswith("low noise") else 10)
    # Cells of other groups that stand for one of these: the same fields.
    for name, (_, method) in tables.ELSEWHERE.items():
        assert differing(makers[name](0.75, "0:0", 0), makers[method](0.75, "0:0", 0)) == set()


CACHED = [
    ("CachedADMM", SinkAwareADMMModifier, {"iterations": 2, "gradual_iterations": 1, "refine": "none"}),
    ("CachedADMM", SinkAwareADMMModifier, {"iterations": 2, "gradual_iterations": 1, "calibrate_on": "clean"}),
    ("CachedSparseGPT", SinkAwareSparseGPTModifier, {"sink_std": 1.0}),
    ("CachedWanda", SinkAwareWandaModifier, {"reconstruct": True, "sink_scope": "transient"}),
]


@pytest.mark.parametrize(("cached", "plain", "fields"), CACHED)
def test_cells_that_share_a_dense_run_prune_as_the_plain_modifiers_do(study, cached, plain, fields):
    import study_cache

    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    windows = token_windows(read_documents(embedded_text("calibration")), tokenizer, 48, 2, seed=0)
    found = []
    for kind in (getattr(study_cache, cached), plain):
        model = load_model(EMBEDDED_MODEL, torch.float32)
        run_oneshot(model, tokenizer, kind(sparsity=0.6, sample_interval=25, **fields), windows)
        found.append(block_linears(model))
    for name, module in found[0].items():
        # The same operations on the same numbers.
        torch.testing.assert_close(module.weight, found[1][name].weight, rtol=0, atol=0)


def test_a_mask_can_be_that_of_the_linears_own_layer_values_or_inputs(study):
    from study_cache import DenseRun
    from study_sinks import SomewhereADMM

    flat, peak = torch.ones(1, 40), torch.ones(1, 40)
    peak[0, 7] = 100
    run = DenseRun(
        inputs={"a": [peak[..., None].expand(1, 40, 3)]},
        masses=[torch.stack([flat, peak])],
        value_norms=[torch.stack([flat, 101 - peak])],
    )
    for where in ("layer", "short values", "long inputs"):
        modifier = SomewhereADMM(sparsity=0.5, where=where)
        modifier._seen = run
        modifier._targets = [PruningTarget("a", torch.nn.Linear(3, 3), 1)]
        assert modifier._mask("a", 0).round().nonzero().tolist() == [[0, 7]], where


def test_without_a_mask_no_position_is_suppressed(study):
    from study_cells import NO_MASK

    from sinkprune_plugin.diffusion import corrupt, resolve_diffusion, sample_generator
    from sinkprune_plugin.sinks import capture_attention_mass

    model = load_model(EMBEDDED_MODEL, torch.float32)
    ids = torch.randint(5, 500, (1, 128), generator=torch.Generator().manual_seed(0))
    spec = resolve_diffusion(model.config)
    some_sink = False
    # t = 1 too: with every token masked the mass is flattest, and a threshold in standard deviations lowest.
    for t in (0.1, 0.5, 1.0):
        noisy = corrupt(ids, t, spec, noise_eps=1e-3, generators=[sample_generator(0, 0, ids[0])]).noisy_ids
        with torch.no_grad(), capture_attention_mass() as capture:
            model(input_ids=noisy)
        some_sink |= float(soft_sink_mask(capture.mass, sink_std=2.0).max()) > 0.99
        # Exactly: the logit is some millions below zero, and float32's exp underflows at −104.
        assert float(soft_sink_mask(capture.mass, sink_std=NO_MASK).max()) == 0
    assert some_sink


def test_magnitude_keeps_the_largest_of_each_row_or_group(study):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(16, 5)])})
            self.head = torch.nn.Linear(16, 5)

        def weight(self):
            return self.model["blocks"][0].weight

    for sparsity, structure, width, removed in ((0.6, "0:0", 16, 9), (0.5, "2:4", 4, 2), (0.5, "4:8", 8, 4)):
        torch.manual_seed(0)
        model = Model()
        head, before = model.head.weight.clone(), model.weight().detach().clone()
        study.prune_by_magnitude(model, sparsity, structure)
        for group, old in zip(model.weight().reshape(-1, width), before.reshape(-1, width), strict=True):
            kept = sorted(old.tolist(), key=abs)[removed:]
            assert sorted(group[group != 0].tolist()) == sorted(kept)
        assert torch.equal(model.head.weight, head)


def test_each_row_of_the_parts_changes_one_field(study, tables):
    """Weights in sums of squares are compared with sums of squares, so that the weights alone differ."""
    makers = study.makers()
    for comparisons in tables.COMPARISONS.values():
        for label, (before, after) in comparisons.items():
            if before in ("Wanda", "SparseGPT"):
                continue
            changed = differing(*(makers[name](0.5, "0:0", 0) for name in (before, after)))
            assert len(changed) == 1, (label, changed)


# ---- resumption


def test_a_line_that_was_cut_off_is_done_again(study, tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text('{"key": "tiny-llada/grid/dense//0/", "windows": [1.0]}\n{"key": "tiny-llada/grid/magni')
    assert [record["key"] for record in study.finished(results)] == ["tiny-llada/grid/dense//0/"]
    assert list(study.finished(tmp_path / "none.jsonl")) == []


def test_running_resumes_and_keeps_what_is_there(study, tmp_path):
    results = tmp_path / "results.jsonl"
    first = '{"key": "tiny-llada/grid/dense//0/", "seconds": 0, "windows": [1.0], "zeros": 0}\n'
    results.write_text(first + '{"key": "tiny-llada/grid/magni')
    study.run(results, limit=1)
    assert results.read_text().startswith(first)
    keys = [record["key"] for record in study.finished(results)]
    assert keys == ["tiny-llada/grid/dense//0/", "tiny-llada/grid/magnitude/50 %/0/"]
    record = list(study.finished(results))[1]
    # floor(columns · 0.5) of each row.
    assert record["zeros"] == pytest.approx(0.5, abs=0.002)
    assert len(record["windows"]) == study.TEST_WINDOWS
    # Dense is at 4.08 nats (ppl 59) here and magnitude at 50 % adds about a tenth; a broken model is above 6.
    assert 4.0 < statistics.fmean(record["windows"]) < 4.4


# ---- report


def test_the_report_refuses_a_study_without_its_dense_models(study, report):
    records = [each for each in made_up_records(study) if each["key"] != "tiny-gqa/grid/dense//0/"]
    with pytest.raises(UsageError, match="cell 'tiny-gqa/grid/dense//0/' is not done"):
        report.load_runs(records)


def test_the_report_refuses_cells_of_different_evaluations(study, report):
    records = made_up_records(study)
    records[5]["windows"] = records[5]["windows"][:16]
    with pytest.raises(UsageError, match="16 test windows, the dense one has 24"):
        report.load_runs(records)


def test_the_table_shows_the_paired_change_to_the_peer_on_the_seeds_of_both(study, report, tables):
    records = made_up_records(study)
    gone = f"tiny-gqa/grid/{study_method()}/2:4/1/"
    records = [record for record in records if record["key"] != gone]
    by_key = {record["key"]: record["windows"] for record in records if "windows" in record}
    table = tables.tables(report.load_runs(records))["grid-tiny-gqa"]
    line = next(row for row in table.splitlines() if row.startswith(f"| {study_method()} |"))
    shown = line.split("|")[5].strip()
    stock, ours = ([by_key[f"tiny-gqa/grid/{m}/2:4/{seed}/"] for seed in (0, 2)] for m in ("SparseGPT", study_method()))
    ppl = math.exp(statistics.fmean(loss for seed in ours for loss in seed))
    change = math.exp(
        statistics.fmean(b - a for x, y in zip(stock, ours, strict=True) for a, b in zip(x, y, strict=True))
    )
    assert shown.replace("*", "").startswith(f"{ppl:.1f} ({100 * (change - 1):+.1f} ± ")
    assert shown.endswith(", 2 seeds)")
    assert "seeds" not in line.split("|")[4]


def study_method():
    from study_cells import OURS

    return OURS


def test_what_was_not_run_is_left_empty(study, report, tables):
    records = [each for each in made_up_records(study) if "/sinks/" not in each["key"] or "Wanda" in each["key"]]
    made = tables.tables(report.load_runs(records))["sinks-tiny-gqa"]
    assert "Wanda, 85 %" in made.splitlines()[0]
    assert "ADMM, 85 %" not in made.splitlines()[0]


def test_results_are_written_so_that_the_report_can_be_made_again(study, report, tables, tmp_path):
    records = made_up_records(study)
    (tmp_path / "images").mkdir()
    names = tables.tables(report.load_runs(records))
    places = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\ntext\n" for name in names)
    (tmp_path / "study.md").write_text("head\n" + places)
    report.write_report(records, tmp_path)
    first = (tmp_path / "study.md").read_text()
    assert first.startswith("head\n")
    assert "old" not in first
    for name in ("study.png", "study-tiny-gqa.png"):
        assert (tmp_path / "images" / name).read_bytes().startswith(b"\x89PNG")
    committed = list(report.committed_records(tmp_path))
    results = (tmp_path / "study-results.json").read_text()
    report.write_report(committed, tmp_path)
    assert (tmp_path / "study.md").read_text() == first
    assert (tmp_path / "study-results.json").read_text() == results


def test_a_page_without_a_place_for_a_table_is_refused(study, report, tmp_path):
    (tmp_path / "study.md").write_text("no place\n")
    with pytest.raises(UsageError, match="no single place <!-- grid-tiny-llada -->"):
        report.write_report(made_up_records(study), tmp_path)


def test_the_committed_page_shows_the_committed_results(report, tables):
    page = (DOCS / "study.md").read_text(encoding="utf-8")
    for name, table in tables.tables(report.load_runs(list(report.committed_records(DOCS)))).items():
        assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in page, f"run benchmarks/study.py --report ({name})"


def test_the_committed_results_are_cells_of_the_study_and_of_models_as_sparse_as_asked(study):
    content = json.loads((DOCS / "study-results.json").read_text(encoding="utf-8"))
    by_key = {cell.key: cell for cell in study.cells()}
    assert content["cells"].keys() <= by_key.keys()
    for key, result in content["cells"].items():
        expected = study.PATTERNS[by_key[key].pattern][0] if by_key[key].pattern else 0.0
        # floor(columns · 0.6) of each row of 128 and more columns.
        assert result["zeros"] == pytest.approx(expected, abs=0.008), key

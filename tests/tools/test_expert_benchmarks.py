"""The benchmarks of expert pruning run, on small models."""

import json
import sys
from pathlib import Path

import pytest
from official_checkpoints import write_llada_moe

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_tokenizer

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch, request):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__(request.param)
    for name in (request.param, "study_statistics"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("module", ["experts"], indirect=True)
@pytest.mark.parametrize("more", [[], ["--fused"]], ids=["separate", "fused"])
def test_the_streaming_benchmark_measures_a_pruning_and_leaves_nothing(more, module, monkeypatch, capsys, tmp_path):
    sizes = {"WIDTH": 32, "CHANNELS": 16, "HEADS": 4, "VOCABULARY": 64, "NOISE": 1 << 20}
    for name, value in sizes.items():
        monkeypatch.setattr(module, name, value)
    options = ["--layers", "2", "--num-experts", "8", "--chosen", "2", "--experts", "0.5", *more]
    module.main([*options, "--scratch", str(tmp_path / "scratch")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    # 2 layers of 8 experts, attention, norms and router, and both ends.
    layer = 8 * 3 * 32 * 16 + 4 * 32 * 32 + 2 * 8 + 8 * 32 + 2 * 32
    assert result["parameters"] == 2 * layer + 2 * 64 * 32 + 32
    assert 0.1 < result["peak_gb"] < 2
    assert result["seconds"] > 0
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("module", ["study_experts"], indirect=True)
def test_the_study_measures_every_score(module, capsys, tmp_path, monkeypatch):
    # One round.
    monkeypatch.setitem(module.METHODS[module.SEARCH], "search_budget", 10_000)
    write_llada_moe(tmp_path, vocab_size=2048, num_experts=8, torch_dtype="float32")
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(tmp_path)
    small = ["--samples", "2", "--windows", "3", "--seq-len", "24", "--noises", "2", "--shares", "0.5", "--random", "1"]
    small += ["--seeds", "2"]
    module.main([str(tmp_path), *small])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["method"]: row for row in result["rows"]}
    assert set(rows) == {*module.METHODS, "random"}
    # All stay where they lose channels.
    left = {name: 8 if name == module.CHANNELS else 4 for name in rows}
    assert all(sum(counts) == 2 * left[name] for name, row in rows.items() for counts in row["experts"])
    assert rows[module.REFERENCE]["percent"] == [0.0, 0.0, 0.0]
    assert len({row["perplexity"] for row in rows.values()}) > 3
    # Other calibration windows, which the weights don't ask for.
    assert len(set(rows["reap, trajectory"]["of_seeds"])) == 2
    assert len(set(rows["aimer"]["of_seeds"])) == 1
    assert [len(row["of_seeds"]) for row in rows.values()] == [2] * len(module.METHODS) + [1]

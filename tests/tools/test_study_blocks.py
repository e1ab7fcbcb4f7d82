"""The benchmark of pruning a model that denoises block by block runs, on a small random one."""

import json
import sys
from pathlib import Path

import pytest
from nemotron_labs_checkpoints import write_nemotron_labs

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_tokenizer

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import study_blocks

    yield study_blocks
    for name in ("study_blocks", "study_experts", "study_statistics"):
        sys.modules.pop(name, None)


def test_every_method_is_compared_on_the_same_text(study, tmp_path, capsys):
    write_nemotron_labs(tmp_path, vocab_size=2048, mask_token_id=2, bos_token_id=0, eos_token_id=1, head_dim=8)
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(tmp_path)
    small = ["--samples", "2", "--windows", "3", "--seq-len", "24", "--noises", "2", "--seeds", "2", "--patterns", "75"]
    study.main([str(tmp_path), *small])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["SparseGPT", *(name for name in study.METHODS if name != "SparseGPT")]
    assert rows["SparseGPT"]["percent"] == [0.0, 0.0, 0.0]
    assert len({row["perplexity"] for row in rows.values()}) > 4
    assert all(len(row["percent_of_seeds"]) == 2 for row in rows.values())


def test_a_method_differs_from_the_defaults_in_what_its_name_says(study):
    fields = {name: given for name, (_, given) in study.OURS.items()}
    assert fields.pop("sink-aware Wanda, 1/t²") == {"timestep_weighting": "inverse_square"}
    assert fields.pop("sink-aware ADMM, clean") == {"calibrate_on": "clean"}
    assert fields.pop("ADMM, no sink mask") == {"sink_std": 1e6}
    assert not any(fields.values())
    modifier = study.modifier_of("sink-aware ADMM", "2:4", 3)
    assert (modifier.sparsity, modifier.mask_structure, modifier.seed) == (0.5, "2:4", 3)

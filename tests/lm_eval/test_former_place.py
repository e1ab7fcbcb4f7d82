"""The former place of lm_eval/ still works, with a line that says so."""

import subprocess
import sys

import pytest


def test_the_former_name_warns_and_finds_the_same_module():
    sys.modules.pop("sinkprune_plugin.evaluation", None)
    with pytest.warns(DeprecationWarning, match="is now sinkprune_plugin.lm_eval"):
        from sinkprune_plugin.evaluation.predictions import write_predictions

    from sinkprune_plugin.lm_eval import predictions

    assert write_predictions is predictions.write_predictions


def test_the_former_command_runs(tmp_path):
    command = [sys.executable, "-m", "sinkprune_plugin.evaluation.predictions", "samples.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "give two files" in done.stderr

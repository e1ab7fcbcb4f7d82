"""`python -m sinkprune_plugin.lm_eval.predictions` as a user runs it, at its former place too."""

import subprocess
import sys

from rotation_cases import ROWS, docs, samples_file


def test_predictions_as_a_command(tmp_path):
    samples_file(tmp_path / "samples.jsonl", docs(ROWS), {"q7": "d", "q9": "2"})
    command = [sys.executable, "-m", "sinkprune_plugin.lm_eval.predictions", "samples.jsonl", "out.csv"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "2 questions\n"), done.stderr
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (again.returncode, again.stderr) == (2, "error: out.csv exists; remove it or name another file\n")


def test_the_former_command_runs(tmp_path):
    command = [sys.executable, "-m", "sinkprune_plugin.evaluation.predictions", "samples.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "give two files" in done.stderr

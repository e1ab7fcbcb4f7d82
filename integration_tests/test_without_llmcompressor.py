"""Everything but pruning works where neither llm-compressor nor compressed-tensors is installed."""

import json
import subprocess
import sys

import pytest
from sparse_models import prune_2_of_4

from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer

# Hides packages as if they weren't installed: no finder finds them, not even importlib.util.find_spec.
HIDE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

HIDDEN = set(sys.argv.pop(1).split(","))
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

RUN = """
import contextlib, io, json
from sinkprune_plugin import cli

answers = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["sinkprune", *words]
    status, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code or 0
    answers.append([status, out.getvalue(), err.getvalue()])
found = sorted(HIDDEN & {name.split(".")[0] for name in sys.modules})
print(json.dumps({"answers": answers, "found": found}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """tiny-llada pruned 2:4 by magnitude: dense, in our sparse layout and in the historic one."""
    folder = tmp_path_factory.mktemp("without")
    model = load_model(EMBEDDED_MODEL)
    prune_2_of_4(model)
    model.save_pretrained(folder / "dense")
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(folder / "dense")
    for layout in ("sinkprune", "legacy"):
        convert_checkpoint(folder / "dense", folder / layout, "sparse-24-bitmask", layout=layout, progress=False)
    return folder


def run_without(script, *arguments):
    command = [sys.executable, "-c", HIDE + script, "llmcompressor,compressed_tensors", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_all_commands_but_pruning_work(checkpoints, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prune_stage:\n  prune_modifiers:\n    SinkAwareWandaModifier: {sparsity: 0.5}\n")
    short = ["--seq-len", "32", "--output"]
    commands = [
        ["info", str(checkpoints / "sinkprune")],
        ["convert", str(checkpoints / "sinkprune"), "--to", "dense", "--output", str(tmp_path / "back")],
        # It loads the dense and the sparse model.
        ["verify", str(EMBEDDED_MODEL), str(checkpoints / "sinkprune"), "--quick", *short, str(tmp_path / "report")],
        ["sinks", str(checkpoints / "legacy"), "--num-samples", "1", *short, str(tmp_path / "sinks")],
        ["prune", str(EMBEDDED_MODEL), "--recipe", str(recipe), "--output", str(tmp_path / "pruned")],
        ["demo", "--output", str(tmp_path / "demo")],
    ]
    result = json.loads(run_without(RUN, json.dumps(commands)))
    assert result["found"] == []
    *working, prune, demo = result["answers"]
    for (status, out, err), command in zip(working, commands, strict=False):
        assert status == 0, (command, out, err)
    for status, _out, err in (prune, demo):
        assert status == 2
        (line,) = err.strip().splitlines()
        assert line.startswith("sinkprune: pruning needs llm-compressor, which isn't installed; pip install")
    assert not (tmp_path / "pruned").exists()
    assert not (tmp_path / "demo").exists()


def test_importing_a_modifier_says_what_is_missing():
    script = """
try:
    import sinkprune_plugin.modifiers.wanda
except ModuleNotFoundError as error:
    print(error)
"""
    assert run_without(script) in ("No module named 'llmcompressor'", "No module named 'compressed_tensors'")

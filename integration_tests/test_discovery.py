"""Discovery, each case in a fresh interpreter, as in a user's process."""

import os
import subprocess
import sys

import pytest


def run(code, **environment):
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:sinkprune_plugin", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_arming_imports_only_the_standard_library():
    heavy = run(
        "import sys; from sinkprune_plugin.registration import arm; arm(); arm()\n"
        "heavy = ('torch', 'transformers', 'llmcompressor', 'vllm', 'numpy', 'pydantic')\n"
        "print(*[module for module in heavy if module in sys.modules])"
    )
    assert heavy == []


def test_arming_is_idempotent():
    count = run(
        "import sys; from sinkprune_plugin.registration import arm, _ImportWatcher\n"
        "for _ in range(3): arm()\n"
        "print(sum(isinstance(f, _ImportWatcher) for f in sys.meta_path))"
    )
    assert count == ["1"]


def test_importing_torch_arms_and_registers_nothing_yet():
    state = run("import sys, torch; print('sinkprune_plugin' in sys.modules, 'transformers' in sys.modules)")
    assert state == ["True", "False"]


CREATE = (
    "from llmcompressor.modifiers import ModifierFactory\n"
    "m = ModifierFactory.create('{name}', allow_registered=True, allow_experimental=False, sparsity=0.5)\n"
    "print(type(m).__name__)"
)


@pytest.mark.parametrize("name", ["SinkAwareWandaModifier", "SinkAwareSparseGPTModifier"])
def test_the_factory_finds_the_modifiers_with_nothing_of_ours_imported(name):
    assert run(CREATE.format(name=name))[-1] == name


def test_an_explicit_import_does_the_same_where_autoload_is_off():
    code = CREATE.format(name="SinkAwareWandaModifier")
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert run("import sinkprune_plugin\n" + code, **off)[-1] == "SinkAwareWandaModifier"
    # Also after the host library.
    assert run("import llmcompressor, sinkprune_plugin\n" + code, **off)[-1] == "SinkAwareWandaModifier"
    with pytest.raises(AssertionError, match="No modifier of type 'SinkAwareWandaModifier' found"):
        run(code, **off)


def test_a_broken_entry_point_of_someone_else_does_not_break_ours(tmp_path):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llmcompressor.modifiers]\nBrokenModifier = no_such_module:Thing\n")
    assert run(CREATE.format(name="SinkAwareWandaModifier"), PYTHONPATH=str(tmp_path))[-1] == "SinkAwareWandaModifier"


def test_auto_classes_know_our_configs():
    printed = run(
        # torch's autoload is the hook; AutoModel imports torch, AutoConfig alone does not.
        "import torch; from transformers import AutoConfig\n"
        "print(type(AutoConfig.for_model('llada')).__name__, type(AutoConfig.for_model('Dream')).__name__)"
    )
    assert printed == ["LLaDAConfig", "DreamConfig"]

"""What an import of ours brings along, each in a fresh interpreter: rooms that need no host library import none."""

import subprocess
import sys

import pytest
from checkpoint_files import LEGACY


def test_info_needs_no_host_library():
    """It is quick, and works where llm-compressor can't be imported."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from sinkprune_plugin.inspection.info import inspect_checkpoint\n"
        "import sinkprune_plugin.inspection.table\n"
        f"inspect_checkpoint(Path({str(LEGACY / 'sparse-bitmask')!r}))\n"
        "print([name for name in ('llmcompressor', 'vllm', 'compressed_tensors') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_formats_stand_alone():
    """Neither llm-compressor nor vLLM nor transformers nor compressed-tensors is needed to read and write."""
    code = """
import sys
import sinkprune_plugin.formats
found = {"llmcompressor", "vllm", "transformers", "compressed_tensors"} & set(sys.modules)
sys.exit(f"imported {found}" if found else 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_importing_the_model_rooms_imports_no_torch():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, sinkprune_plugin.models.llada, sinkprune_plugin.models.dream\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_serving_needs_no_llm_compressor():
    """vLLM asks for compressed-tensors itself, of the release that it was made with."""
    pytest.importorskip("vllm", reason="vLLM isn't installed")
    script = (
        "import sys\n"
        "from sinkprune_plugin.vllm.register import register\n"
        "register()\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'llmcompressor'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr

"""Scripts that import nothing of ours load through the auto classes, each in a fresh interpreter."""

import subprocess
import sys
from pathlib import Path

import pytest
from official_checkpoints import TRACE, write_dream, write_dream_tokenizer

TINY = Path(__file__).parent.parent / "sinkprune_plugin" / "assets" / "tiny-llada"


def run(code, *arguments, stdin=subprocess.DEVNULL):
    """Run code in a fresh interpreter that has imported nothing of ours."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, stdin=stdin, timeout=120
    )


# The first import of the script decides the order in which the libraries' modules are initialised.
FIRST_IMPORTS = [
    "from transformers import AutoModelForCausalLM as Auto",
    "from transformers.models.auto.modeling_auto import AutoModelForMaskedLM as Auto",
    "from transformers import AutoTokenizer, Trainer; from transformers import AutoModelForCausalLM as Auto",
]


def test_a_script_that_imports_nothing_of_ours_gets_the_native_class():
    # In parallel: each spends seconds on importing transformers.
    started = {
        first_import: subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys\n{first_import}\nprint(type(Auto.from_pretrained(sys.argv[1])).__module__)",
                TINY,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first_import in FIRST_IMPORTS
    }
    for first_import, process in started.items():
        out, err = process.communicate(timeout=240)
        assert out.strip() == "sinkprune_plugin.models.llada.modeling_llada", f"{first_import}: {err}"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_nobody_is_asked_on_a_terminal(tmp_path):
    import os

    write_dream(tmp_path)
    write_dream_tokenizer(tmp_path)
    controller, terminal = os.openpty()
    try:
        # Nothing is ever typed: a prompt would wait for 15 seconds and then fail.
        done = run(
            "import sys\nfrom transformers import AutoTokenizer, AutoModel\n"
            "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
            "print(type(tokenizer).__name__, tokenizer('ab a c<|mask|>').input_ids, tokenizer.mask_token_id)\n"
            "print(type(AutoModel.from_pretrained(sys.argv[1])).__name__)",
            tmp_path,
            stdin=terminal,
        )
    finally:
        os.close(controller)
        os.close(terminal)
    assert done.stdout.splitlines() == ["DreamTokenizer [6, 7, 5, 4, 1] 1", "DreamModel"], done.stderr
    assert not (tmp_path / TRACE).exists()

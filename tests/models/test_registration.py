"""Loading through the auto classes: official config.json files, no prompt, and nothing from the checkpoint executed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from official_checkpoints import TRACE, write_dream, write_llada

import sinkprune_plugin.models as models

TINY = Path(__file__).parent.parent.parent / "sinkprune_plugin" / "assets" / "tiny-llada"
PAIRS = {"llada": (write_llada, "LLaDAModelLM"), "Dream": (write_dream, "DreamModel")}


def run(code, *arguments, stdin=subprocess.DEVNULL):
    """Run code in a fresh interpreter that has imported nothing of ours."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, stdin=stdin, timeout=120
    )


def write_dream_tokenizer(folder):
    """The files of the official repository: no tokenizer.json, and a Python file named by auto_map."""
    alphabet = ["<|endoftext|>", "<|mask|>", "a", "b", "c", "Ġ", "ab", "Ġa"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(alphabet)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n")
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {
            "0": {"content": "<|endoftext|>", **special},
            "1": {"content": "<|mask|>", **special},
        },
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "DreamTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_dream.py").write_text(f"open({str(folder / TRACE)!r}, 'w').write(__name__)\n")


def test_importing_the_package_imports_no_torch():
    done = run(
        "import sys, sinkprune_plugin.models.llada, sinkprune_plugin.models.dream\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_registering_again_and_again_changes_nothing():
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for _ in range(2):
        models.register_configs()
        models.register_models()
        models.register_tokenizers()
        models.register_imported()
    for model_type, name in (("llada", "LLaDAModelLM"), ("mmada", "MMaDAModelLM"), ("Dream", "DreamModel")):
        config_class = CONFIG_MAPPING[model_type]
        assert config_class.__module__.startswith("sinkprune_plugin.")
        for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
            assert auto_class._model_mapping[config_class].__name__ == name


# The first import of the script decides in which order the libraries' modules come to life.
FIRST_IMPORTS = [
    "from transformers import AutoModelForCausalLM as Auto",
    "from transformers.models.auto.modeling_auto import AutoModelForMaskedLM as Auto",
    "from transformers import AutoTokenizer, Trainer; from transformers import AutoModelForCausalLM as Auto",
]


def test_a_script_that_imports_nothing_of_ours_gets_the_native_class():
    # Side by side: each spends seconds on importing transformers.
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


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("trust", [None, False, True])
def test_nothing_from_the_checkpoint_is_executed(kind, trust, tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    def no_prompt(*_):
        raise AssertionError("asked whether to run remote code")

    monkeypatch.setattr("builtins.input", no_prompt)
    write, name = PAIRS[kind]
    write(tmp_path)
    given = {} if trust is None else {"trust_remote_code": trust}
    config = AutoConfig.from_pretrained(tmp_path, **given)
    assert type(config).__module__.startswith("sinkprune_plugin.")
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        assert type(auto_class.from_pretrained(tmp_path, **given)).__name__ == name
        assert type(auto_class.from_config(config, **given)).__name__ == name
    assert not (tmp_path / TRACE).exists()


def test_the_trace_would_be_seen_if_the_file_ran(tmp_path):
    # Guards the test above: the planted file does leave its trace when executed.
    write_llada(tmp_path)
    assert run((tmp_path / "modeling_llada.py").read_text()).returncode == 0
    assert (tmp_path / TRACE).exists()


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


def test_dream_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "a").mkdir()
    write_dream(tmp_path / "a")
    write_dream_tokenizer(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert again("ab a c<|mask|>").input_ids == tokenizer("ab a c<|mask|>").input_ids == [6, 7, 5, 4, 1]
    assert again.decode([6, 7]) == "ab a"


def test_llada_tokenizer_loads_through_the_auto_class():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, 2)
    text = "The state of the union is strong."
    assert tokenizer.decode(tokenizer(text).input_ids) == text

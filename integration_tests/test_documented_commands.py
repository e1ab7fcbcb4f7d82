"""Every command and call that README and docs print is run as printed, on the embedded model.

A page's placeholders and hub names are files and directories here (:func:`workshop`), so that little is replaced; what
is, is in ``SMALLER`` and only makes a run shorter. What can't be run here is in ``NOT_RUN`` with the reason. An example
that is neither run nor listed fails, as does an entry of the list that no page prints any more.
"""

import functools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from command_line import run_here
from documentation import Example, documented_examples, inline_commands
from golden_data import RECIPES, REPOSITORY
from official_checkpoints import write_llada_moe
from sparse_models import prune_2_of_4

from sinkprune_plugin import cli
from sinkprune_plugin.diffusion import families
from sinkprune_plugin.diffusion.families import _FAMILIES
from sinkprune_plugin.formats import convert_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.text_windows import embedded_text

# Beginning of an example's text → why it isn't run here.
NOT_RUN = {
    "git clone": "needs a network",
    "pip install 'sinkprune-plugin[vllm]'": "gigabytes; test_requirements.py lets pip resolve both (make test-install)",
    "pip install 'sinkprune-plugin[prune]'": "the same",
    "python tools/train_tiny_llada.py train.jsonl": "takes half an hour; test_train_tiny_llada.py trains such a model",
    "python benchmarks/study.py --results": "takes hours; test_study.py runs a cell of it",
    "python benchmarks/experts.py --layers": "writes 40 GB; test_expert_benchmarks.py runs a small one",
    "python benchmarks/study_blocks.py": "takes minutes; test_study_blocks.py runs a small one",
    "python tools/lengthen_tiny_llada.py train.jsonl": "takes minutes; test_lengthen_tiny_llada.py trains a small one",
    "python benchmarks/study_experts.py": "takes minutes; test_expert_benchmarks.py runs a small one",
    ".venv/bin/pre-commit install": "writes into the repository",
    'from llmcompressor import oneshot\n\noneshot(\n    model="GSAI-ML': "test_oneshot_data.py runs it as printed",
    "sinkprune serve demo-output": "test_vllm_server.py runs it as printed",
    "from openai import OpenAI": "test_vllm_server.py runs it as printed",
    "sinkprune serve ./llada-8b-sink-2of4": "test_vllm_server.py starts such a server",
    "curl localhost:8000": "test_vllm_server.py sends such requests",
    "from sinkprune_plugin.vllm.cpu import prepare": "for the rest of a process; test_vllm_contract.py begins with it",
    "from vllm import LLM": "test_vllm_checkpoints.py makes such an engine, on a CPU with what that needs",
    "tiny-llada, ELBO perplexity": "what `make demo` prints; test_quiet_commands.py runs it on less data",
    "0 1 0 2 0 0 3 0 4 0\n": "a matrix; test_formats_codecs_golden.py has it",
    "0 1 0 2  -3 0 0 4\n": "a matrix; test_formats_codecs_golden.py has it",
    "0200000000000000 ": "bytes; test_formats_codecs_golden.py has them",
    '{\n  "quant_method": "compressed-tensors-sparse"': "test_formats_config.py has it",
    '{\n  "block_type": "llama with': "tests/models/test_block_sizes.py builds the model",
}

# What is replaced or added where it is found, so that a run takes seconds.
SMALLER = {
    r"--num-samples 128": "--num-samples 2 --seq-len 64",
    r"^sinkprune sinks": "sinkprune sinks --num-samples 2 --seq-len 64",
    r"^sinkprune verify": "sinkprune verify --seq-len 64 --quick",
    r"^sinkprune recover": "sinkprune recover --seq-len 64 --batch-size 2",
    r"--steps 300\b": "--steps 2",
    r"^lm_eval": "lm_eval --limit 1",
    # The hub's tasks, of the same two kinds.
    r"--tasks (mmlu|arc_challenge|piqa|winogrande|hellaswag|gpqa\w+|race)\b": "--tasks own_choice --include_path tasks",
    r"--tasks gsm8k\b": "--tasks own_cloze --include_path tasks",
    # The embedded model's longest sequence has 256 tokens.
    r"(block_length|steps|max_gen_toks)=256": r"\1=64",
    # The limits that a carefully pruned model should meet.
    r"--max-ppl-increase 5\b": "--max-ppl-increase 500",
    r"--min-agreement 0.5": "--min-agreement 0",
    r"--max-size-ratio 0.6": "--max-size-ratio 1",
    r"--min-speedup 1.2": "--min-speedup 0",
    # As that page says for one's own questions, since the hub's can't be reached.
    r"(?=--tasks sinkprune_mobile_mmlu)": """--metadata '{"mobile_mmlu_file": "questions.jsonl"}' """,
    # How a page writes options that may be left out or chosen; of a choice, the first.
    r"\|[\w:]+": "",
    r"[\[\]]": "",
}

EXAMPLES = documented_examples()


def listed(example: Example) -> bool:
    return any(example.text.startswith(beginning) for beginning in NOT_RUN)


def to_run(kind):
    chosen = [example for example in EXAMPLES if example.kind == kind and not listed(example)]
    return pytest.mark.parametrize("example", chosen, ids=[example.name for example in chosen])


def test_what_is_listed_as_not_run_is_printed_somewhere():
    stale = [text for text in NOT_RUN if not any(example.text.startswith(text) for example in EXAMPLES)]
    assert not stale, f"no page prints this any more; take it out of NOT_RUN: {stale}"


def test_every_example_is_of_a_kind_that_is_run_or_listed():
    others = [example for example in EXAMPLES if example.kind not in ("command", "python", "yaml")]
    unknown = [example.name for example in others if not listed(example)]
    assert not unknown, f"neither run nor listed in NOT_RUN: {unknown}"
    assert len(EXAMPLES) > 30


@pytest.fixture(scope="module")
def workshop(tmp_path_factory, tasks, tokenizer):
    """Everything that the pages name: models, text, recipes, tasks."""
    folder = tmp_path_factory.mktemp("workshop")
    pruned = prune_2_of_4(load_model(EMBEDDED_MODEL))
    pruned.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    convert_checkpoint(folder / "dense", folder / "PRUNED", "sparse-24-bitmask", progress=False)
    for name in ("DIR", "RECOVERED", "llada-8b-sink-2of4", "LLaDA-8B-2of4"):
        (folder / name).symlink_to(folder / "PRUNED")
    for name in ("MODEL", "DENSE", "AR-MODEL", "LLaDA-8B"):
        (folder / name).symlink_to(EMBEDDED_MODEL)
    write_llada_moe(folder / "MOE-MODEL", vocab_size=2048, num_experts=8, torch_dtype="float32")
    tokenizer.save_pretrained(folder / "MOE-MODEL")
    (folder / "recipes").symlink_to(RECIPES)
    (folder / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
    (folder / "text.jsonl").symlink_to(embedded_text("calibration"))
    (folder / "tasks").symlink_to(tasks[0])
    question = {"question_id": "q1", "Question": "Who reports?", "answer": "B", **dict.fromkeys("ABCD", "He")}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n")
    logged = folder / "results" / "…"
    logged.mkdir(parents=True)
    samples = [
        {"doc": {"question_id": "q1", "rotation": rotation}, "filtered_resps": [[-1.0, False]] * 3 + [[-0.5, False]]}
        for rotation in range(4)
    ]
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (logged / "samples_sinkprune_mobile_mmlu_….jsonl").write_text(lines)
    return folder


@pytest.fixture
def bench(workshop, tmp_path, monkeypatch):
    """Function that makes a fresh directory the current one, with everything in it but what a command writes."""

    def lay_out(outputs):
        for path in workshop.iterdir():
            if path.name not in outputs:
                (tmp_path / path.name).symlink_to(path)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return lay_out


def words_of(example):
    """How a shell parses a command: words, after comments, quotes and variables."""
    text = example.text
    for pattern, replacement in SMALLER.items():
        text = re.sub(pattern, replacement, text)
    # A list of words, in which line breaks are ignored and nothing is run.
    script = "\n".join([*example.variables, f"words=({text}\n)", "printf '%s\\0' \"${words[@]}\""])
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\0").split("\0")


def run_in_process(program, arguments, monkeypatch):
    """What the installed program does with these arguments, without another start of Python.

    :return: exit status
    """
    if program == "sinkprune":
        done = run_here(*arguments)
        sys.stderr.write(done.stderr)
        return done.returncode
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    try:
        if program == "lm_eval":
            pytest.importorskip("lm_eval", reason="lm-evaluation-harness isn't installed (sinkprune-plugin[eval])")
            from lm_eval import tasks
            from lm_eval.__main__ import cli_evaluate

            # Reading the harness's list of its thousands of tasks takes longer than everything else.
            own = functools.partial(tasks.TaskManager, include_defaults=False)
            monkeypatch.setattr(tasks, "TaskManager", own)
            cli_evaluate()
        else:
            assert program == "python"
            if arguments[0] == "-m":
                monkeypatch.setattr(sys, "argv", arguments[1:])
                runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            else:
                monkeypatch.setattr(sys, "argv", arguments)
                runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code or 0
    return 0


@to_run("command")
def test_a_documented_command_runs(example, bench, monkeypatch):
    program, *arguments = words_of(example)
    if program == "make":
        # That the target is there; what it does takes minutes and is what runs these tests.
        assert arguments[0] in re.findall(r"^(\S+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        return
    outputs = {arguments[arguments.index(o) + 1] for o in ("--output",) if o in arguments}
    folder = bench(outputs)
    assert run_in_process(program, arguments, monkeypatch) == 0
    for output in outputs:
        assert any((folder / output).iterdir())


@to_run("python")
def test_a_documented_python_example_runs(example, bench, tokenizer, golden_windows, monkeypatch):
    folder = bench(set())
    (folder / "example.py").write_text(example.text)
    from llmcompressor import oneshot

    from sinkprune_plugin.modifiers.oneshot_flow import calibration_dataset

    # What a page introduced earlier, or leaves to the reader.
    names = {
        "oneshot": oneshot,
        "model": load_model(EMBEDDED_MODEL, torch.bfloat16),
        "tokenizer": tokenizer,
        "dataset": calibration_dataset(golden_windows[:2, :64]),
    }
    before = dict(_FAMILIES)
    try:
        runpy.run_path("example.py", init_globals=names)
        if "register_family" in example.text:
            assert set(families()) - set(before.values())
    finally:
        _FAMILIES.clear()
        _FAMILIES.update(before)


@to_run("yaml")
def test_a_documented_recipe_is_one_and_equals_its_file(example):
    from llmcompressor.recipe import Recipe

    named = re.match(r"# (recipes/\S+)\n", example.text)
    if named:
        assert yaml.safe_load(example.text) == yaml.safe_load((REPOSITORY / named[1]).read_text())
    recipe = Recipe.create_instance(example.text)
    assert [type(modifier).__name__ for modifier in recipe.modifiers] == list(
        yaml.safe_load(example.text)["prune_stage"]["prune_modifiers"]
    )


@pytest.mark.parametrize(("page", "text"), inline_commands())
def test_commands_within_sentences_name_what_there_is(page, text):
    _, name, *options = shlex.split(text)
    known = typer.main.get_command(cli.app).commands
    assert name in known, page
    if name == "serve":
        # What follows the directory goes to vLLM.
        options = []
    assert {word for word in options if word.startswith("-")} <= {o for p in known[name].params for o in p.opts}, page

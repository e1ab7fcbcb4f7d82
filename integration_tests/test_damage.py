"""Damaged checkpoints, recipes and texts: `sinkprune sinks`, `prune` and `verify` end in one line before anything runs.

The commands run in this process, on copies of the embedded model. Nothing is half loaded and no file is left behind.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run_here, run_process
from safetensors.torch import load_file, save_file

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
QUERY = "model.transformer.blocks.2.q_proj.weight"
DEEP = b'{"a":' * 100_000
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
QUICK_RECIPE = """
prune_stage:
  prune_modifiers:
    SinkAwareWandaModifier:
      sparsity: 0.5
      diffusion_steps: 4
      sample_interval: 2
"""


class Sinkprune:
    """The commands, with few and short windows, and where they write."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "output"
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(QUICK_RECIPE)

    def run(self, command: str, model: Path, *more: Any) -> Any:
        """Run a command on a model, as the pruned one for verify."""
        first = {
            "sinks": [model, "--num-samples", 1],
            "prune": [model, "--recipe", self.recipe, "--num-samples", 1],
            "verify": [EMBEDDED_MODEL, model, "--quick"],
        }[command]
        return run_here(command, *first, "--seq-len", 16, "--output", self.output, *more)

    def refuses(self, message: str, command: str, model: Path, *more: Any) -> None:
        before = set(self.folder.rglob("*"))
        done = self.run(command, model, *more)
        assert done.returncode == 2, done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("sinkprune: "), done.stderr
        assert message in last
        assert len(last) < 700
        assert "Traceback" not in done.stderr
        assert set(self.folder.rglob("*")) == before


@pytest.fixture
def sinkprune(tmp_path, monkeypatch):
    # Libraries log to the stderr of the test in which they were imported.
    monkeypatch.setattr("logging.raiseExceptions", False)
    return Sinkprune(tmp_path)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in EMBEDDED_MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def nothing_runs(monkeypatch):
    """No weights are read or loaded, and no model is called."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", forbidden)
    monkeypatch.setattr("sinkprune_plugin.verification.verify.inspect_checkpoint", forbidden)
    handle = torch.nn.modules.module.register_module_forward_pre_hook(forbidden)
    yield
    handle.remove()


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def split(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    names = sorted(tensors)
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(names)}
    for shard in SHARDS:
        part = {name: tensors[name] for name in names if weight_map[name] == shard}
        save_file(part, model / shard, metadata={"format": "pt"})
    (model / WEIGHTS).unlink()
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def with_index(content: Any) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        split(model)
        (model / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))

    return damage


def with_shard(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        split(model)
        change(model / SHARDS[1])

    return damage


def files(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content) and None


# What is damaged → how, and what the line says.
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights cut within a tensor": (lambda m: cut(m / WEIGHTS, 100_000), f"{WEIGHTS} is truncated"),
    "weights cut within the header": (lambda m: cut(m / WEIGHTS, 1000), "no safetensors header within"),
    "weights empty": (lambda m: cut(m / WEIGHTS, 0), "has 0 bytes and no safetensors header within"),
    "shard missing": (with_shard(Path.unlink), f"names {SHARDS[1]}, which isn't there"),
    "shard cut": (with_shard(lambda shard: cut(shard, 100_000)), f"{SHARDS[1]} is truncated"),
    "shard empty": (with_shard(lambda shard: cut(shard, 0)), "has 0 bytes and no safetensors header within"),
    "index is a list": (with_index([]), f"{INDEX} holds a list, not a mapping"),
    "index without a map": (with_index({}), f"{INDEX} has no weight_map"),
    "map is a number": (with_index({"weight_map": 5}), f"{INDEX} has no weight_map"),
    "map names a number": (with_index({"weight_map": {"a": 5}}), f"{INDEX} names '5'"),
    "map leads out": (with_index({"weight_map": {"a": "../x.safetensors"}}), "isn't a *.safetensors file next to it"),
    "index is deep": (with_index(DEEP.decode()), f"{INDEX} isn't readable JSON (RecursionError)"),
    "no config": (lambda m: (m / "config.json").unlink(), "has no config.json"),
    "special tokens are a list": (files("special_tokens_map.json", b"[]"), "special_tokens_map.json holds a list"),
}
for _file in JSON_FILES:
    _half = (EMBEDDED_MODEL / _file).stat().st_size // 2
    DAMAGES |= {
        f"{_file} is a list": (files(_file, b"[]"), f"{_file} holds a list, not a mapping"),
        f"{_file} is a string": (files(_file, b'"x"'), f"{_file} holds a str, not a mapping"),
        f"{_file} is null": (files(_file, b"null"), f"{_file} holds a NoneType, not a mapping"),
        f"{_file} cut": (lambda m, f=_file, n=_half: cut(m / f, n), f"{_file} isn't readable JSON (JSONDecodeError)"),
        f"{_file} empty": (files(_file, b""), f"{_file} isn't readable JSON (JSONDecodeError)"),
        f"{_file} not UTF-8": (files(_file, b"{\xff}"), f"{_file} isn't readable JSON (UnicodeDecodeError)"),
        f"{_file} deep": (files(_file, DEEP), f"{_file} isn't readable JSON (RecursionError)"),
        f"{_file} with 5000 digits": (files(_file, b'{"a":%s}' % (b"9" * 5000)), f"{_file} isn't readable JSON"),
    }


@pytest.mark.parametrize("command", ["sinks", "prune", "verify"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_one_line_before_anything_is_loaded(command, damage, model, sinkprune, nothing_runs):
    change, message = DAMAGES[damage]
    change(model)
    sinkprune.refuses(message, command, model)


# File, keys of wrong values → what the line says. transformers and tokenizers fail on each with an error of any type.
WRONG_VALUES = [
    ("config.json", {"model_type": "zzz"}, "can't load the configuration"),
    ("config.json", {"architectures": 7}, "can't load the configuration"),
    ("config.json", {"auto_map": 7}, "can't load the configuration"),
    ("config.json", {"mask_token_id": "x"}, "config.mask_token_id is 'x'"),
    ("config.json", {"max_sequence_length": "abc"}, "max_sequence_length='abc'"),
    ("config.json", {"vocab_size": 10, "embedding_size": 10}, "10"),
    ("tokenizer_config.json", {"eos_token": 7}, "can't load the tokenizer"),
    ("tokenizer_config.json", {"tokenizer_class": 7}, "can't load the tokenizer"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": "y"}}, "can't load the tokenizer"),
    ("tokenizer_config.json", {"model_max_length": "x"}, "tokenizer"),
    ("tokenizer.json", {"model": None}, "can't load the tokenizer"),
    ("tokenizer.json", {"added_tokens": 7}, "can't load the tokenizer"),
    ("tokenizer.json", {"version": "9"}, "Unknown tokenizer version"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0, "b": 5000}, "merges": []}}, "token"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}}, "tokens"),
]


TEXTS = {
    "broken.jsonl": (b'{"text": "x"}\n{oops\n', "broken.jsonl line 2 is not JSON"),
    "deep.jsonl": (b'{"text": "x"}\n' + DEEP, "deep.jsonl line 2 is not JSON"),
    "digits.jsonl": (b'{"text": "x", "n": %s}\n' % (b"9" * 5000), "digits.jsonl line 1 is not JSON"),
    "field.jsonl": (b'{"text": "x"}\n{"body": "x"}\n', "field.jsonl line 2 has no text in field 'text'"),
    "number.jsonl": (b'{"text": 5}\n', "number.jsonl line 1 has no text in field 'text'"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', "half.jsonl line 1 has half of a character"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', "latin.jsonl is not UTF-8 text (byte 13)"),
    "latin.txt": (b"caf\xe9", "latin.txt is not UTF-8 text (byte 3)"),
    "empty.jsonl": (b"", "empty.jsonl holds no text"),
    "empty.txt": (b" \n", "empty.txt holds no text"),
    "short.txt": (b"hello", "enough for 0 windows of 16"),
    "text.parquet": (b"x", "neither .txt nor .jsonl nor a saved dataset"),
    "missing.txt": (None, "missing.txt does not exist"),
    "empty folder": ({}, "no dataset written by save_to_disk"),
    "damaged set": ({"dataset_info.json": b"{", "state.json": b"{}"}, "can't be read as a saved dataset"),
    "half a set": ({"dataset_info.json": b"{}"}, "can't be read as a saved dataset"),
}


@pytest.mark.parametrize("command", ["sinks", "prune", "verify"])
@pytest.mark.parametrize("text", TEXTS)
def test_damaged_texts_are_one_line_before_anything_is_loaded(command, text, model, sinkprune, nothing_runs):
    content, message = TEXTS[text]
    source = sinkprune.folder / text
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        source.mkdir()
        for name, part in content.items():
            (source / name).write_bytes(part)
    sinkprune.refuses(message, command, model, "--dataset", source)


@pytest.mark.parametrize("command", ["sinks", "prune", "verify"])
def test_places_that_cannot_be_written_are_one_line_before_anything_is_loaded(command, model, sinkprune, nothing_runs):
    file = sinkprune.folder / "file"
    file.touch()
    for output, message in ((file / "output", "which isn't a directory"), (file, "is a file"), (model, "--overwrite")):
        sinkprune.output = output
        sinkprune.refuses(message, command, model)


@pytest.mark.parametrize("command", ["sinks", "prune", "verify"])
def test_names_that_are_too_long_are_one_line(command, model, sinkprune, nothing_runs):
    long = sinkprune.folder / ("n" * 300)
    sinkprune.refuses("File name too long", command, long)
    sinkprune.refuses("File name too long", command, model, "--dataset", long)
    sinkprune.output = long
    sinkprune.refuses("File name too long", command, model)


@pytest.mark.parametrize("command", ["sinks", "prune", "verify"])
@pytest.mark.parametrize(("length", "message"), [(0, "at least 8 tokens"), (257, "longer than the model's 256")])
def test_windows_that_do_not_fit_are_one_line(command, length, message, model, sinkprune, nothing_runs):
    sinkprune.refuses(message, command, model, "--seq-len", length)


RECIPES = {
    b"": "holds a NoneType, not stages with modifiers",
    b"- a\n": "holds a list",
    b"a: b: c\n": "line 1 isn't YAML (mapping values are not allowed here)",
    b"a: \xff\n": "is not UTF-8 text (byte 3)",
    b"[" * 10_000: "isn't YAML (",
    b"a: 1\n": "has no modifiers",
    b"a_stage:\n  b_modifiers: {}\n": "has no modifiers",
    b"a_stage:\n  b_modifiers: {NoSuchModifier: {}}\n": "can't be read by llm-compressor",
    b"a_stage:\n  b_modifiers: {SinkAwareWandaModifier: 5}\n": "can't be read by llm-compressor",
    b"1: {}\n": "can't be read by llm-compressor",
    b"a_stage:\n  b_modifiers: {SinkAwareWandaModifier: {sparsity: x}}\n": "sparsity",
}


@pytest.mark.parametrize("content", RECIPES)
def test_damaged_recipes_are_one_line_before_anything_is_loaded(content, model, sinkprune, nothing_runs):
    sinkprune.recipe.write_bytes(content)
    sinkprune.refuses(RECIPES[content], "prune", model)


def test_a_damaged_recipe_beside_the_model_is_refused_before_pruning(model, sinkprune, nothing_runs):
    """llm-compressor reads it when it saves the pruned model."""
    (model / "recipe.yaml").write_bytes(b"a: \xff\n")
    sinkprune.refuses("recipe.yaml is not UTF-8 text", "prune", model)


def test_a_damaged_recipe_beside_the_pruned_model_is_left_out_of_the_report(model, sinkprune):
    (model / "recipe.yaml").write_bytes(b"a: \xff\n")
    done = sinkprune.run("verify", model)
    assert done.returncode == 0
    assert "recipe.yaml is not UTF-8 text (byte 3); convert it; it is left out of the report" in done.stderr
    assert json.loads((sinkprune.output / "report.json").read_text())["provenance"]["settings"]["recipe"] is None


@pytest.mark.parametrize("command", ["sinks", "verify"])
def test_names_are_shown_as_they_are(command, model, sinkprune):
    """Neither markup nor a formula nor an escape sequence, in tables, pictures and pages."""
    name = "[b]x $_$ :smile: \x1b[31m"
    # A closing tag in a path: two directories.
    sinkprune.output = sinkprune.folder / "out[/y] $^$"
    done = sinkprune.run(command, model.rename(sinkprune.folder / name))
    assert done.returncode == 0, done.stderr
    shown = name.replace("\x1b", "?")
    assert shown in " ".join(done.stdout.split())
    if command == "verify":
        assert str(sinkprune.output) in done.stdout
        assert shown in (sinkprune.output / "report.html").read_text(encoding="utf-8")


def test_a_path_that_is_no_text_is_printed_all_the_same(tmp_path):
    done = run_process("convert", EMBEDDED_MODEL, "--to", "dense", "--output", tmp_path / "out\udcff")
    assert done.returncode == 0, done.stderr
    assert "out\\udcff" in done.stdout


def test_names_in_errors_are_shown_as_they_are(model, sinkprune):
    source = sinkprune.folder / "[b]x[/b] $_$.jsonl"
    source.parent.mkdir()
    source.write_bytes(b"{")
    sinkprune.refuses("[b]x[/b] $_$.jsonl line 1 is not JSON", "sinks", model, "--dataset", source)


def test_what_cannot_be_saved_is_not_pruned(tmp_path, sinkprune):
    """transformers loads a temperature without sampling and refuses to save it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=2048, **sizes)).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((EMBEDDED_MODEL / name).read_bytes())
    edit(tmp_path / "model" / "generation_config.json", temperature=0.5)
    sinkprune.recipe.write_text(QUICK_RECIPE.replace("SinkAwareWandaModifier", "WandaPruningModifier").split("diff")[0])
    sinkprune.refuses("couldn't be saved: GenerationConfig is invalid", "prune", tmp_path / "model")


def test_a_pruned_model_is_kept_if_its_place_is_taken_meanwhile(model, sinkprune, monkeypatch):
    from sinkprune_plugin.modifiers import oneshot_flow

    prune = oneshot_flow.run_oneshot

    def while_another_program_writes(*arguments, **options):
        prune(*arguments, **options)
        sinkprune.output.mkdir()
        (sinkprune.output / "theirs").write_text("precious")

    monkeypatch.setattr(oneshot_flow, "run_oneshot", while_another_program_writes)
    done = sinkprune.run("prune", model)
    assert done.returncode == 2
    assert [file.name for file in sinkprune.output.iterdir()] == ["theirs"]
    kept = Path(done.stderr.strip().rpartition("the new result is in ")[2])
    load_model(kept)


def test_what_llm_compressor_refuses_is_one_line(model, sinkprune):
    edit(model / "config.json", quantization_config={"quant_method": "nosuch"})
    sinkprune.refuses("oneshot does not currently support models that are already quantized", "prune", model)


def test_missing_and_other_weights_are_refused(model, sinkprune):
    """transformers initialises missing ones."""
    tensors = load_file(model / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if n != QUERY}, model / WEIGHTS, metadata={"format": "pt"})
    for command in ("sinks", "prune"):
        sinkprune.refuses(f"its weights lack {QUERY}, which its config.json asks for", command, model)
    save_file(tensors | {QUERY: torch.zeros(192, 64)}, model / WEIGHTS, metadata={"format": "pt"})
    for command in ("sinks", "prune"):
        sinkprune.refuses(f"{QUERY} is [192, 64] in its weights and [192, 192]", command, model)


@pytest.mark.parametrize("command", ["sinks", "prune", "verify"])
@pytest.mark.parametrize(("file", "changes", "message"), WRONG_VALUES)
def test_wrong_values_are_one_line(command, file, changes, message, model, sinkprune, monkeypatch):
    edit(model / file, **changes)
    sinkprune.refuses(message, command, model)

"""Real-life data sets in oneshot(): empty rows, headings, paragraphs, in shuffled order."""

import os
import re
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from golden_data import RECIPES, REPOSITORY
from llmcompressor import oneshot
from loguru import logger
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier
from sinkprune_plugin.text_windows import embedded_text, read_documents

QUICK = {"diffusion_steps": 4, "sample_interval": 2}
SKIPPED = "calibration samples of fewer than 8 tokens"
BOTH = [SinkAwareWandaModifier, SinkAwareSparseGPTModifier]


def wikitext_like(paragraphs):
    """Rows like wikitext's: empty, heading, empty, paragraph."""
    words = read_documents(embedded_text("calibration"))[0].split()
    rows = []
    for number in range(paragraphs):
        paragraph = " ".join(words[60 * number : 60 * number + 60])
        rows += ["", " = Union = \n", "", f" {paragraph} \n"]
    return rows


def prune(rows, modifier, *, global_seed, **arguments):
    """Mask of every pruned weight after oneshot() on raw text, from a given state of the global generator."""
    model = load_model(EMBEDDED_MODEL, torch.float32)
    torch.manual_seed(global_seed)
    arguments = {"num_calibration_samples": 4, "max_seq_length": 64, **arguments}
    data = Dataset.from_dict({"text": rows})
    oneshot(model=model, tokenizer=str(EMBEDDED_MODEL), dataset=data, recipe=[modifier], **arguments)
    return {name: module.weight == 0 for name, module in block_linears(model).items()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def log():
    """Lines that the modifiers logged."""
    lines = []
    handle = logger.add(lambda message: lines.append(message.record["message"]), level="WARNING")
    yield lines
    logger.remove(handle)


def readme_call():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if 'dataset="wikitext"' in block)


def as_printed(directory):
    """Create what README's call names: the model, the recipe and the data set, with the hub's names and layout."""
    (directory / "GSAI-ML").mkdir()
    (directory / "GSAI-ML" / "LLaDA-8B-Instruct").symlink_to(EMBEDDED_MODEL)
    (directory / "recipes").symlink_to(RECIPES)
    data = directory / "Salesforce" / "wikitext"
    (data / "wikitext-2-raw-v1").mkdir(parents=True)
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n  - split: train\n"
        "    path: wikitext-2-raw-v1/train-*\n---\n"
    )
    Dataset.from_dict({"text": wikitext_like(26)}).to_parquet(
        data / "wikitext-2-raw-v1" / "train-00000-of-00001.parquet"
    )


def run_readme_call(call, directory, global_seed):
    """Run a script in a directory that has what README's call names.

    :return: what it printed, and the saved tensors
    """
    output = f"run-{global_seed}"
    script = f"import torch\ntorch.manual_seed({global_seed})\n" + call.replace("llada-8b-sink-2of4", output)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=directory, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr, load_file(directory / output / "model.safetensors")


def test_the_call_in_readme_runs_as_printed(tmp_path):
    as_printed(tmp_path)
    printed, tensors = run_readme_call(readme_call(), tmp_path, 0)
    assert SKIPPED not in printed
    assert sum(name.endswith(".bitmask") for name in tensors) == 42


def test_the_call_in_readme_without_packing_runs_twice_alike(tmp_path):
    """Nothing but the state of the global generator differs between the runs."""
    call = readme_call()
    assert "concatenate_data=True" in call
    call = re.sub(r" *concatenate_data=True.*\n", "", call)
    # Fewer than there are, so that the choice among them matters.
    call = call.replace("num_calibration_samples=128", "num_calibration_samples=6")
    as_printed(tmp_path)
    (printed, first), (_, second) = (run_readme_call(call, tmp_path, seed) for seed in (1, 2))
    assert SKIPPED in printed
    assert equal(first, second)


@pytest.mark.parametrize("cls", BOTH)
def test_short_rows_are_skipped_counted_and_replaced(cls, log):
    rows = wikitext_like(12)
    mixed = prune(rows, cls(sparsity=0.5, **QUICK), global_seed=0, num_calibration_samples=48)
    (line,) = [line for line in log if SKIPPED in line]
    assert line.startswith(f"skipped 36 {SKIPPED}, 12 are left")
    assert "concatenate_data=True" in line
    assert "\n" not in line
    # All twelve paragraphs are used, as if nothing else had been there; only their order may differ.
    long = prune([row for row in rows if len(row) > 20], cls(sparsity=0.5, **QUICK), global_seed=0)
    clean = prune(
        [row for row in rows if len(row) > 20],
        cls(sparsity=0.5, **QUICK),
        global_seed=0,
        num_calibration_samples=12,
    )
    same = sum(int((mixed[name] == clean[name]).sum()) for name in mixed)
    assert same / sum(mask.numel() for mask in mixed.values()) > 0.995
    assert not equal(mixed, long)


@pytest.mark.parametrize("cls", BOTH)
def test_the_recipe_s_seed_alone_decides_which_samples_are_used(cls):
    rows = wikitext_like(12)
    first = prune(rows, cls(sparsity=0.5, seed=3, **QUICK), global_seed=1)
    assert equal(first, prune(rows, cls(sparsity=0.5, seed=3, **QUICK), global_seed=2))
    assert not equal(first, prune(rows, cls(sparsity=0.5, seed=4, **QUICK), global_seed=1))


@pytest.mark.parametrize("arguments", [{"batch_size": 4}, {"batch_size": 2, "data_collator": "padding"}])
def test_short_rows_do_not_cut_their_batch(arguments, log):
    """llm-compressor's collator cuts a batch to its shortest row."""
    masks = prune(wikitext_like(6), SinkAwareWandaModifier(sparsity=0.5, **QUICK), global_seed=0, **arguments)
    assert all(0.45 < float(mask.float().mean()) < 0.55 for mask in masks.values())
    assert sum(SKIPPED in line for line in log) == 1


def test_rows_in_order_are_skipped_too(log):
    rows = [*wikitext_like(2), "", ""]
    prune(
        rows,
        SinkAwareWandaModifier(sparsity=0.5, **QUICK),
        global_seed=0,
        num_calibration_samples=None,
        shuffle_calibration_samples=False,
    )
    assert any("skipped 8 calibration samples" in line for line in log)


def test_batches_of_a_stream_lose_their_short_rows(model, tokenizer, golden_windows, log):
    """An iterable of batches, with padding: no rows to choose from, so the batches are thinned out."""
    ids = golden_windows[:4, :64].clone()
    valid = torch.ones_like(ids)
    valid[1, 5:], valid[2], valid[3] = 0, 0, 0
    batches = [
        {"input_ids": ids[:2], "attention_mask": valid[:2]},
        {"input_ids": ids[2:], "attention_mask": valid[2:]},
    ]
    loader = DataLoader(batches, batch_size=None)
    oneshot(model=model, tokenizer=tokenizer, dataset=loader, recipe=[SinkAwareWandaModifier(sparsity=0.5, **QUICK)])
    assert any("skipped 3 calibration samples" in line for line in log)
    alone = load_model(EMBEDDED_MODEL, torch.float32)
    loader = DataLoader([{"input_ids": ids[0]}])
    oneshot(model=alone, tokenizer=tokenizer, dataset=loader, recipe=[SinkAwareWandaModifier(sparsity=0.5, **QUICK)])
    for (name, a), (_, b) in zip(model.state_dict().items(), alone.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_too_few_tokens_for_the_dampening_raise_it_and_say_so(log):
    """Hessians of rank 16 in 192 columns, next to singular with this dampening."""
    modifier = SinkAwareSparseGPTModifier(sparsity=0.5, dampening_frac=1e-9, calibrate_on="clean", **QUICK)
    masks = prune(wikitext_like(1), modifier, global_seed=0, max_seq_length=16)
    assert all(0.49 < float(mask.float().mean()) < 0.51 for mask in masks.values())
    (line, *_) = [line for line in log if "not positive definite with dampening_frac 1e-09; pruned with" in line]
    assert ".blocks.0." in line
    assert "\n" not in line


def test_nothing_left_is_an_error():
    with pytest.raises(UsageError, match=r"all 3 calibration samples.*fewer than 8 tokens.*concatenate_data=True"):
        prune(["", " = Union = \n", ""], SinkAwareWandaModifier(sparsity=0.5, **QUICK), global_seed=0)

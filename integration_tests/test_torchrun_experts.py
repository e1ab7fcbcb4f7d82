"""Two processes over gloo give a mixture of experts what one gives it, also where an expert gets tokens in one only."""

import json
import os
import subprocess
import sys

import pytest
import torch
from official_checkpoints import write_llada_moe
from safetensors.torch import load_file

# Whole experts removed, single weights pruned, and what is left recovered; then one of each by search.
SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from safetensors.torch import save_file
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.base import SinkAwareModifierBase
from sinkprune_plugin.modifiers.blockwise_recovery import BlockwiseRecoveryModifier
from sinkprune_plugin.modifiers.distributed import rank, world_size
from sinkprune_plugin.modifiers.experts import ExpertPruningModifier
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier
from sinkprune_plugin.pruning import level_grid, search_rounds

if len(sys.argv) > 2:
    dist.init_process_group("gloo")
level_grid.LEVELS_ASIDE, search_rounds.OFFSPRING, search_rounds.SECOND, search_rounds.LAST = 2, 4, 2, 1
rows = {rows}
data = Dataset.from_dict({{"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}})
tokenizer = load_tokenizer(EMBEDDED_MODEL)
GRID = {{"diffusion_steps": 4, "sample_interval": 2}}

tokens = []
feed = SinkAwareModifierBase._feed_experts


def noting(self, observer, *rest):
    if observer.tokens_of_experts:
        tokens.append(list(observer.tokens_of_experts.values()))
    feed(self, observer, *rest)


SinkAwareModifierBase._feed_experts = noting


def run(name, *recipe):
    reset_session()
    tokens.clear()
    model = load_model(r"{model}", torch.float32)
    oneshot(model=model, tokenizer=tokenizer, dataset=data, recipe=list(recipe), num_calibration_samples=4,
            max_seq_length=12, shuffle_calibration_samples=False)
    save_file({{key: value.contiguous() for key, value in model.state_dict().items()}},
              f"{{sys.argv[1]}}/{{name}}-{{rank()}}.safetensors")
    found = {{"kept": getattr(model.config, "sinkprune_kept_experts", None), "tokens": tokens}}
    for modifier in recipe:
        found[type(modifier).__name__] = [getattr(modifier, "allocation", None), getattr(modifier, "experts", None),
                                          getattr(modifier, "allocation_note", None)]
    json.dump(found, open(f"{{sys.argv[1]}}/{{name}}-{{rank()}}.json", "w"))


for score in ("frequency", "reap"):
    run(score, ExpertPruningModifier(experts=3, score=score, **GRID))
# Of all tokens, or of any, and with the Hessians of two experts at a time.
few = {{"sparsity": 0.5, "min_expert_tokens": 0, **GRID}}
run("wanda", SinkAwareWandaModifier(**few))
run("sparsegpt", SinkAwareSparseGPTModifier(expert_hessian_gb=3.5e-5, **few))
run("admm", SinkAwareADMMModifier(iterations=4, gradual_iterations=2, expert_hessian_gb=3.5e-5, **few))
run("fed", SinkAwareWandaModifier(sparsity=0.5, min_expert_tokens=10, **GRID))
run("recovered", ExpertPruningModifier(experts=3, score="frequency", **GRID), SinkAwareWandaModifier(**few),
    BlockwiseRecoveryModifier(epochs=2, held_out=0.0, step_windows=2, **GRID))
run("experts-search", ExpertPruningModifier(experts=3, score="frequency", allocation="search", search_budget=1000,
                                            **GRID))
run("search", SinkAwareWandaModifier(allocation="search", search_budget=1000, **few))


class Failing(SinkAwareWandaModifier):
    def _observe(self, leader, x, each):
        if rank() == world_size() - 1 and ".experts." in leader:
            raise UsageError("nothing works here")
        super()._observe(leader, x, each)


try:
    run("failing", Failing(**few))
except UsageError as error:
    open(f"{{sys.argv[1]}}/error-{{rank()}}", "w").write(str(error))
"""
EXPERTS = 12


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Directories with the results of one process and of two."""
    directory = tmp_path_factory.mktemp("torchrun")
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "num_hidden_layers": 2}
    write_llada_moe(directory / "model", vocab_size=2048, torch_dtype="float32", **sizes)
    rows = torch.randint(3, 2048, (4, 12), generator=torch.Generator().manual_seed(0)).tolist()
    script = directory / "script.py"
    script.write_text(SCRIPT.format(model=directory / "model", rows=rows))
    launch = {
        "one": [sys.executable, str(script), str(directory / "one")],
        "two": [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), str(directory / "two"), "distributed"),
        ],
    }
    for name, command in launch.items():
        (directory / name).mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # A process that waits for another one that failed would wait until this ends.
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=directory)
        assert done.returncode == 0, done.stderr[-3000:]
    return directory / "one", directory / "two"


def results(runs, name):
    """Of the one process, and of the two."""
    files = (runs[0] / f"{name}-0", runs[1] / f"{name}-0", runs[1] / f"{name}-1")
    return [(load_file(f"{file}.safetensors"), json.loads(file.with_suffix(".json").read_text())) for file in files]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_some_expert_gets_tokens_in_one_process_only(runs):
    (_, alone), (_, first), (_, second) = results(runs, "wanda")
    pairs = [pair for a, b in zip(first["tokens"], second["tokens"], strict=True) for pair in zip(a, b, strict=True)]
    assert [sum(pair) for pair in pairs] == [count for counts in alone["tokens"] for count in counts]
    assert any(a > 0 and b == 0 for a, b in pairs)
    assert any(b > 0 and a == 0 for a, b in pairs)


@pytest.mark.parametrize("score", ["frequency", "reap"])
def test_the_same_experts_go(score, runs):
    (one, alone), (first, found), (second, other) = results(runs, score)
    assert alone["kept"] == found["kept"] == other["kept"]
    assert all(len(numbers) == EXPERTS - 3 for numbers in alone["kept"])
    assert equal(one, first)
    assert equal(first, second)


@pytest.mark.parametrize("name", ["wanda", "fed", "sparsegpt", "admm"])
def test_the_same_weights_go(name, runs):
    (one, _), (first, _), (second, _) = results(runs, name)
    assert equal(first, second), "the ranks disagree"
    assert all(float((value == 0).float().mean()) > 0.45 for key, value in first.items() if ".experts." in key)
    if name in ("wanda", "fed"):
        # Norms are summed in float64.
        assert equal(one, first)
    else:
        # Hessians are float32 sums in another order, which flips near ties; ADMM chooses its mask several times, on
        # fewer tokens than columns.
        same = sum(int(((one[key] == 0) == (first[key] == 0)).sum()) for key in one)
        total = sum(value.numel() for value in one.values())
        assert same / total > (0.995 if name == "sparsegpt" else 0.95)


def test_removal_pruning_and_recovery_in_one_recipe(runs):
    (one, _), (first, _), (second, _) = results(runs, "recovered")
    assert equal(first, second), "the ranks disagree"
    assert one.keys() == first.keys()
    for key, value in one.items():
        assert torch.equal(value == 0, first[key] == 0), key
        # Gradients are summed in another order, and Adam's first steps are as large for a small one as for a large.
        torch.testing.assert_close(first[key], value, rtol=0, atol=5e-3, msg=key)


@pytest.mark.parametrize(
    ("name", "modifier"), [("experts-search", "ExpertPruningModifier"), ("search", "SinkAwareWandaModifier")]
)
def test_a_search_comes_to_the_same_numbers_in_all_processes(name, modifier, runs):
    _, (first, found), (second, other) = results(runs, name)
    assert found[modifier] == other[modifier]
    assert found[modifier][2].startswith("search: ")
    assert equal(first, second)
    if name == "experts-search":
        assert sum(found[modifier][1]) == 2 * 3


def test_an_error_in_one_process_ends_all_of_them(runs):
    assert (runs[0] / "error-0").read_text() == "nothing works here"
    assert (runs[1] / "error-0").read_text() == "process 1 of 2 failed: nothing works here"
    assert (runs[1] / "error-1").read_text() == "nothing works here"

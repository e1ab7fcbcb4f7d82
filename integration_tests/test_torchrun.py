"""Two processes over gloo give the result of one: each weight solved and written by one of them, errors shared."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from sinkprune_plugin.loading import EMBEDDED_MODEL
from sinkprune_plugin.modifiers import distributed

# Both modifiers in turn, then one that fails in the last process only.
SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from compressed_tensors.offload.cache import CPUCache
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file, save_file
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import load_model, load_tokenizer
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.distributed import rank, world_size
from sinkprune_plugin.modifiers.kept_zeros import KeptZeros
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

if len(sys.argv) > 2:
    dist.init_process_group("gloo")
rows = {rows}
data = Dataset.from_dict({{"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}})
solved, written = [], []


def counting(cls):
    class Counting(cls):
        def _solved(self, target, solver):
            solved.append(target.name)
            return super()._solved(target, solver)

    return Counting


class Failing(SinkAwareWandaModifier):
    propagate_error: bool = True

    def _observe(self, leader, x, each):
        if rank() == world_size() - 1 and ".blocks.2." in leader:
            raise UsageError("nothing works here")
        super()._observe(leader, x, each)


update = CPUCache.update_offload
CPUCache.update_offload = lambda self, offloaded, value: (written.append(1), update(self, offloaded, value))[1]


def prune(cls, shuffle, behind=(), **fields):
    reset_session()
    solved.clear(), written.clear()
    model = load_model(r"{model}", torch.float32)
    # Parallel, since sequential groups have one input each and so nothing to share out.
    parallel = {{"within_block": "parallel", "target": "dense"}} if issubclass(cls, SinkAwareADMMModifier) else {{}}
    modifier = cls(diffusion_steps=4, sample_interval=2, **(fields or {{"sparsity": 0.5}}), **parallel)
    # Three of four samples: shuffled, each process would draw others if the recipe's seed didn't hold.
    oneshot(model=model, tokenizer=load_tokenizer(r"{model}"), dataset=data, recipe=[modifier, *behind],
            num_calibration_samples=3, max_seq_length=64, shuffle_calibration_samples=shuffle)
    return {{k: v.contiguous() for k, v in model.state_dict().items()}}


for cls in (SinkAwareWandaModifier, SinkAwareSparseGPTModifier, SinkAwareADMMModifier):
    weights = prune(counting(cls), shuffle=cls is SinkAwareWandaModifier)
    name = sys.argv[1] + f"/{{cls.__name__}}-{{rank()}}"
    save_file(weights, name + ".safetensors")
    json.dump([solved, len(written)], open(name + ".json", "w"))

units = {{"mlp_channels": 0.5, "attention_heads": 2, "blocks": 1}}
search = {{"allocation": "search", "search_budget": 15000, "search_recovery_steps": 1}}
for name, fields in {{"Units": units, "Search": {{**units, **search}}}}.items():
    weights = prune(SinkAwareStructuredModifier, shuffle=False, **fields)
    save_file(weights, sys.argv[1] + f"/{{name}}-{{rank()}}.safetensors")

reset_session()
searching = SinkAwareWandaModifier(
    sparsity=0.75, allocation="search", search_budget=5000, diffusion_steps=4, sample_interval=2
)
oneshot(model=load_model(r"{model}", torch.float32), tokenizer=load_tokenizer(r"{model}"), dataset=data,
        recipe=[searching], num_calibration_samples=4, max_seq_length=64, shuffle_calibration_samples=False)
json.dump([searching.allocation, searching.allocation_note], open(sys.argv[1] + f"/search-{{rank()}}.json", "w"))

put_back = []
fill = KeptZeros._fill


def counting_fill(self, entry):
    before = len(written)
    filled = fill(self, entry)
    put_back.append(len(written) - before)
    return filled


KeptZeros._fill = counting_fill
alone = load_file(sys.argv[1] + f"/SinkAwareWandaModifier-{{rank()}}.safetensors")
eight_bits = {{"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}
gptq = GPTQModifier(config_groups={{"all": {{"targets": ["re:.*blocks.*"], "weights": eight_bits}}}})
weights = prune(SinkAwareWandaModifier, shuffle=True, behind=[gptq])
pruned = [name for name in alone if ".blocks." in name and alone[name].dim() == 2]
zeros = all(bool((weights[name][alone[name] == 0] == 0).all()) for name in pruned)
changed = all(not torch.equal(weights[name], alone[name]) for name in pruned)
json.dump([sum(put_back), zeros, changed], open(sys.argv[1] + f"/put-back-{{rank()}}.json", "w"))
try:
    prune(Failing, shuffle=False)
except UsageError as error:
    open(sys.argv[1] + f"/error-{{rank()}}", "w").write(str(error))
"""

MODIFIERS = ["SinkAwareWandaModifier", "SinkAwareSparseGPTModifier", "SinkAwareADMMModifier"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, golden_windows):
    """Directories with the results of one process and of two."""
    directory = tmp_path_factory.mktemp("torchrun")
    script = directory / "script.py"
    script.write_text(SCRIPT.format(model=EMBEDDED_MODEL, rows=golden_windows[:4, :64].tolist()))
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


@pytest.mark.parametrize("modifier", MODIFIERS)
def test_two_processes_equal_one(modifier, runs):
    one = load_file(runs[0] / f"{modifier}-0.safetensors")
    first, second = (load_file(runs[1] / f"{modifier}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first), "the ranks disagree"
    same = sum(int(((one[key] == 0) == (first[key] == 0)).sum()) for key in one)
    total = sum(tensor.numel() for tensor in one.values())
    if modifier == "SinkAwareWandaModifier":
        # Norms are summed in float64, so the order over processes does not show in float32.
        assert all(torch.equal(one[key], first[key]) for key in one)
    else:
        # Hessians are float32 sums in another order; a flipped near tie moves its row (0.05 % seen between one and two
        # threads of one process). ADMM chooses its mask 15 times, on fewer tokens than columns: weights nudged by 1e-7
        # move 3.1 % of it.
        assert same / total > (0.995 if modifier == "SinkAwareSparseGPTModifier" else 0.95)


@pytest.mark.parametrize("modifier", MODIFIERS)
def test_each_weight_is_solved_and_written_by_one_process(modifier, runs):
    ((alone, writes),) = [json.loads((runs[0] / f"{modifier}-0.json").read_text())]
    first, second = (json.loads((runs[1] / f"{modifier}-{rank}.json").read_text()) for rank in (0, 1))
    assert len(alone) == len(set(alone)) == writes == 7 * 6
    assert first[0]
    assert second[0]
    assert sorted(first[0] + second[0]) == sorted(alone)
    # The memory is shared, so a second writer would write the same place.
    assert (first[1], second[1]) == (len(first[0]), len(second[0]))


@pytest.mark.parametrize("name", ["Units", "Search"])
def test_all_processes_have_the_smaller_model(name, runs):
    one = load_file(runs[0] / f"{name}-0.safetensors")
    first, second = (load_file(runs[1] / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys() == one.keys()
    assert max(int(key.split(".")[3]) for key in one if ".blocks." in key) == 4
    assert all(torch.equal(first[key], second[key]) for key in first), "the ranks disagree"
    # A search measures its candidates on other samples where these are split otherwise.
    if name == "Units":
        assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in first.items()}
        rows = [
            (one[key].unsqueeze(0) == first[key].unsqueeze(1)).all(dim=2).any(dim=1) for key in one if "ff_proj" in key
        ]
        # Rows that stay are copies; sums in another order flip near ties between those that go.
        assert sum(int(found.sum()) for found in rows) / sum(len(found) for found in rows) > 0.95


def test_a_search_comes_to_the_same_allocation_in_all_processes(runs):
    """Each process measures the candidates on its own samples, and all take the sum."""
    first, second = (json.loads((runs[1] / f"search-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    allocation, note = first
    assert sum(allocation) / 6 == pytest.approx(0.75)
    # A round takes 4 passes of 64 tokens in each process for the last three candidates, 2 for four of them, and one for
    # the sixteen of the first stage.
    assert note.startswith(f"search: {2 * 64 * (16 + 4 * 2 + 3 * 4)} forward tokens in 1 rounds")
    # And what one process measures on all samples, for the uniform allocation on the same weights.
    alone = json.loads((runs[0] / "search-0.json").read_text())[1]
    assert float(note.split("uniform ")[1][:-1]) == pytest.approx(float(alone.split("uniform ")[1][:-1]), abs=2e-4)


def test_one_process_puts_back_the_zeros_that_a_quantizer_filled(runs):
    """The weights are in shared memory. All processes bring them in, and the zeros are there for each of them."""
    alone, first, second = (
        json.loads((directory / f"put-back-{rank}.json").read_text())
        for directory, rank in ((runs[0], 0), (runs[1], 0), (runs[1], 1))
    )
    assert alone[0] > 0
    assert first[0] > 0
    assert second[0] == 0
    assert alone[1:] == first[1:] == second[1:] == [True, True]


def test_an_error_in_one_process_ends_all_of_them(runs):
    assert (runs[0] / "error-0").read_text() == "nothing works here"
    assert (runs[1] / "error-0").read_text() == "process 1 of 2 failed: nothing works here"
    assert (runs[1] / "error-1").read_text() == "nothing works here"


def test_each_process_works_on_the_accelerator_of_its_local_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    distributed.use_own_device()
    assert chosen == [3]

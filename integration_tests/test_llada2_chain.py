"""A random LLaDA2 through the commands: pruned, without some of its experts, looked at, verified and evaluated."""

import json
import shutil

import pytest
import torch
from command_line import run_here
from golden_data import RECIPES
from official_checkpoints import write_llada2
from recovered_experts import check_recovery_keeps_the_zeros

from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense layer and two of 12 experts in 4 groups."""
    folder = tmp_path_factory.mktemp("llada2") / "dense"
    write_llada2(folder, vocab_size=2048, num_hidden_layers=3, block_length=16, torch_dtype="float32")
    for file in EMBEDDED_MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def pruned(dense):
    """2:4 in all Linears, shared and routed experts included."""
    folder = dense.parent / "pruned"
    text = (RECIPES / "sink_aware_wanda_2of4.yaml").read_text()
    recipe = dense.parent / "recipe.yaml"
    recipe.write_text(text.replace("Modifier:\n", "Modifier:\n      diffusion_steps: 4\n      sample_interval: 2\n", 1))
    done = run_here("prune", dense, "--recipe", recipe, "--num-samples", 4, "--seq-len", 64, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_all_linears_are_pruned_and_stored_sparse(pruned):
    found = json.loads(run_here("info", pruned, "--json").stdout)
    assert (found["family"], found["format"]) == ("llada2", "sparse-24-bitmask")
    assert found["total"]["structure"] == "2:4"
    assert found["total"]["sparsity"] == 0.5
    roles = {name: layer["role"] for name, layer in found["by_layer"].items() if name.endswith(".gate")}
    assert roles == {f"model.layers.{i}.mlp.gate": "router" for i in (1, 2)}


def test_verify_compares_the_two(pruned, dense):
    report = dense.parent / "report"
    done = run_here("verify", dense, pruned, "--output", report, "--quick")
    assert done.returncode == 0, done.stderr
    quality = json.loads((report / "report.json").read_text())["quality"]
    # A random network predicts as badly before as after, whatever it was pruned by.
    assert 0.5 < quality["ratio"] < 2


def test_experts_leave_each_group_alike(dense, tmp_path):
    done = run_here("prune", dense, "--recipe", RECIPES / "aimer.yaml", "--output", tmp_path / "fewer")
    assert done.returncode == 0, done.stderr
    model = load_model(tmp_path / "fewer", torch.float32)
    assert model.config.num_experts == 8
    router = model.model.layers[1].mlp.gate
    assert router.weight.shape == (8, 64)
    assert router.expert_bias.shape == (8,)
    with torch.no_grad():
        assert model(torch.arange(3, 67)[None]).logits.isfinite().all()


def test_recovery_keeps_the_zeros(pruned, dense, tmp_path):
    check_recovery_keeps_the_zeros(dense, pruned, tmp_path / "recovered")


def test_lm_eval_takes_it(pruned, tasks):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness isn't installed (sinkprune-plugin[eval])")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    samples = simple_evaluate(
        model="sinkprune",
        model_args=f"pretrained={pruned},mc_num=4,dtype=float32",
        tasks=["own_choice"],
        task_manager=TaskManager(include_path=str(tasks[0]), include_defaults=False),
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
        log_samples=True,
    )["samples"]["own_choice"]
    values = [value for sample in samples for ((value, _),) in sample["resps"]]
    assert len(values) == 12
    assert all(value < 0 for value in values)

"""A language model with experts through the commands: pruned, looked at, converted, verified, evaluated, served."""

import json

import pytest
import torch
from command_line import run_here
from golden_data import RECIPES
from recovered_experts import check_recovery_keeps_the_zeros
from sparse_models import prune_2_of_4
from tiny_moe import write_tiny_moe

from sinkprune_plugin.loading import load_model, load_tokenizer

EXPERTS = [8, 6, 5, 8, 3, 2]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Layers of 8 to 2 experts."""
    folder = tmp_path_factory.mktemp("moe") / "dense"
    write_tiny_moe(folder, experts=EXPERTS)
    return folder


@pytest.fixture(scope="module")
def pruned(dense):
    """Half of each group of four removed by magnitude, routers whole, dense on disk."""
    folder = dense.parent / "pruned"
    model = load_model(dense)
    routers = {name: weight.clone() for name, weight in model.state_dict().items() if name.endswith("mlp.gate.weight")}
    prune_2_of_4(model).load_state_dict(routers, strict=False)
    model.save_pretrained(folder)
    load_tokenizer(dense).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["sparse-24-bitmask", "sparse-bitmask"])
def sparse(request, pruned):
    folder = pruned.parent / request.param
    done = run_here("convert", pruned, "--to", request.param, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


def logits(folder):
    ids = torch.arange(3, 67).view(2, 32)
    with torch.no_grad():
        return load_model(folder, torch.float32)(ids).logits


def test_a_sparse_checkpoint_gives_the_logits_of_the_dense_one(sparse, pruned):
    assert torch.equal(logits(sparse), logits(pruned))
    assert (sparse / "model.safetensors").stat().st_size < 0.8 * (pruned / "model.safetensors").stat().st_size


def test_info_counts_experts_and_leaves_routers_out(sparse):
    done = run_here("info", sparse, "--json")
    found = json.loads(done.stdout)
    assert found["family"] == "llada-moe"
    assert [sizes["experts"] for sizes in found["block_sizes"]] == EXPERTS
    assert found["total"]["sparsity"] == 0.5
    assert found["total"]["structure"] == "2:4"
    assert found["by_type"]["down_proj"]["structures"] == {"2:4": sum(EXPERTS)}
    assert {layer["role"] for name, layer in found["by_layer"].items() if name.endswith("mlp.gate")} == {"router"}
    table = run_here("info", sparse).stdout
    assert "key and value heads" in table
    assert "experts" in table


def test_verify_compares_quality_and_speed(sparse, dense):
    report = dense.parent / f"report-{sparse.name}"
    done = run_here("verify", dense, sparse, "--output", report, "--quick")
    assert done.returncode == 0, done.stderr
    content = json.loads((report / "report.json").read_text())
    quality = content["quality"]
    # The report's own rounding. Which of the two is better says nothing here: neither was trained.
    assert quality["ratio"] == pytest.approx(quality["elbo_pruned"] / quality["elbo_dense"], rel=0.02)
    assert all(row["batch"] in (1, 4) for row in content["speed"]["rows"])
    assert content["sparsity"]["total"]["structure"] == "2:4"


def test_recovery_keeps_the_zeros(sparse, dense, tmp_path):
    check_recovery_keeps_the_zeros(dense, sparse, tmp_path / "recovered")


def test_lm_eval_takes_it(sparse, pruned, tasks):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness isn't installed (sinkprune-plugin[eval])")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    runs = [
        simple_evaluate(
            model="sinkprune",
            model_args=f"pretrained={folder},mc_num=4,block_length=8,dtype=float32",
            tasks=["own_choice"],
            task_manager=TaskManager(include_path=str(tasks[0]), include_defaults=False),
            device="cpu",
            batch_size=8,
            bootstrap_iters=0,
            log_samples=True,
        )["samples"]["own_choice"]
        for folder in (sparse, pruned)
    ]
    found = [[value for sample in run for ((value, _),) in sample["resps"]] for run in runs]
    assert len(found[0]) == 12
    # The same weights; sums in float32, in whichever order memory's alignment makes them.
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("recipe", ["sink_aware_wanda_2of4", "sink_aware_admm_2of4"])
def test_a_recipe_prunes_the_experts_and_saves_them_sparse(recipe, dense, tmp_path):
    folder = tmp_path / "pruned"
    fields = "diffusion_steps: 4\n      sample_interval: 2\n"
    text = (RECIPES / f"{recipe}.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(text.replace("Modifier:\n", f"Modifier:\n      {fields}", 1))
    done = run_here(
        *("prune", dense, "--recipe", tmp_path / "recipe.yaml", "--num-samples", 4, "--seq-len", 64),
        *("--output", folder),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(run_here("info", folder, "--json").stdout)
    assert found["format"] == "sparse-24-bitmask"
    assert found["total"]["structure"] == "2:4"
    assert found["total"]["sparsity"] == 0.5
    assert [sizes["experts"] for sizes in found["block_sizes"]] == EXPERTS
    assert logits(folder).isfinite().all()

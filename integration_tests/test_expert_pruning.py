"""Whole experts leave a LLaDA-MoE model: in plain oneshot() and in the files, with every score."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from command_line import run_here
from expert_references import aimer, plain_sums, without
from golden_data import RECIPES
from llmcompressor import oneshot
from official_checkpoints import write_llada2, write_llada_moe
from plain_forward import plain_llada_moe
from safetensors.torch import load_file

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.checkpoint_reader import CheckpointReader
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.sizes_in_config import sizes_in_config
from sinkprune_plugin.modifiers import expert_files
from sinkprune_plugin.modifiers.experts import ExpertPruningModifier
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

QUICK = {"diffusion_steps": 4, "sample_interval": 2}
LAYERS, EXPERTS, CHOSEN = 3, 8, 2
# Both sides compute in float32 with other orders of operations; logits are of size 1.
CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A dense layer and two with experts whose weights differ in scale and in shape of distribution."""
    folder = tmp_path_factory.mktemp("moe") / "model"
    config, tensors = write_llada_moe(
        folder,
        vocab_size=2048,
        num_hidden_layers=LAYERS,
        moe_layer_freq=[0, 1, 1],
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        # Without it llm-compressor warns.
        torch_dtype="float32",
    )
    for file in EMBEDDED_MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder, config, tensors


def ids(*shape):
    return torch.randint(3, 2048, shape, generator=torch.Generator().manual_seed(0))


def prune(folder, tokenizer, windows=None, **fields):
    model = load_model(folder, torch.float32)
    run_oneshot(model, tokenizer, ExpertPruningModifier(**fields), ids(2, 24) if windows is None else windows)
    return model


def test_aimer_in_oneshot_and_in_the_files_give_the_checkpoint_that_a_plain_reference_gives(
    checkpoint, tokenizer, tmp_path
):
    folder, config, tensors = checkpoint
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("s_stage: {s_modifiers: {ExpertPruningModifier: {experts: 3}}}")
    done = run_here("prune", folder, "--recipe", recipe, "--output", tmp_path / "files")
    assert done.returncode == 0, done.stderr
    assert "5 of 8 experts stay in each of 2 blocks (aimer)" in done.stderr
    loaded = prune(folder, tokenizer, experts=3)
    loaded.save_pretrained(tmp_path / "loaded")

    kept = {}
    for layer in (1, 2):
        ranked = sorted(range(EXPERTS), key=lambda number: -aimer(tensors, layer, number))
        kept[layer] = sorted(ranked[3:])
    expected = without(tensors, kept)
    for result in ("files", "loaded"):
        written = CheckpointReader(tmp_path / result)
        assert set(written) == set(expected)
        assert all(torch.equal(written[name], tensor.to(written[name].dtype)) for name, tensor in expected.items())
        # Layers are alike, so an ordinary option says it all and official code loads the result.
        saved = written.config
        assert saved["num_experts"] == 5
        assert saved["sinkprune_kept_experts"] == [[], kept[1], kept[2]]
        assert "sinkprune_block_sizes" not in saved
        unchanged = config.keys() - {"num_experts", "transformers_version"}
        assert {key: saved[key] for key in unchanged} == {key: config[key] for key in unchanged}
    tokens = ids(2, 9)
    with torch.no_grad():
        logits = load_model(tmp_path / "files", torch.float32)(tokens).logits
        reference = plain_llada_moe({n: t.float() for n, t in expected.items()}, {**config, "num_experts": 5}, tokens)
        torch.testing.assert_close(logits, reference, **CLOSE)
        torch.testing.assert_close(loaded(tokens).logits, reference, **CLOSE)
    assert "score: aimer" in (tmp_path / "files" / "recipe.yaml").read_text()
    assert (tmp_path / "files" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("score", "row"), [("reap", None), ("frequency", 1)])
def test_scores_on_clean_tokens_equal_a_plain_loop(score, row, checkpoint, tokenizer):
    folder, _, _ = checkpoint
    windows = ids(2, 24)
    sums = plain_sums(load_model(folder, torch.float32), windows, CHOSEN)
    model = prune(folder, tokenizer, windows, experts=4, score=score, calibrate_on="clean", **QUICK)
    for layer, total in sums.items():
        values = total[0] / total[1].clamp_min(1) if row is None else total[row]
        kept = model.config.sinkprune_kept_experts[layer]
        gone = sorted(set(range(EXPERTS)) - set(kept))
        # Ranks rather than sets, as equal frequencies may fall on either side.
        assert values[kept].min() >= values[gone].max(), (layer, values, kept)
        assert len(kept) == 4


def test_along_the_trajectory_the_tokens_are_those_of_all_timesteps_without_sinks(checkpoint, tokenizer, monkeypatch):
    folder, _, _ = checkpoint
    seen = {}
    from sinkprune_plugin.pruning.experts import RoutedSums

    monkeypatch.setattr(RoutedSums, "importance", lambda self, score: seen.setdefault(len(seen), self.tokens.clone()))
    # Two windows at two timesteps, each token counted once for each of its experts.
    prune(folder, tokenizer, experts=0.5, score="reap", sink_std=1e6, **QUICK)
    assert all(float(tokens.sum()) == 2 * 24 * 2 * CHOSEN for tokens in seen.values())
    seen.clear()
    prune(folder, tokenizer, experts=0.5, score="reap", sink_std=0.5, **QUICK)
    assert all(0 < float(tokens.sum()) < 2 * 24 * 2 * CHOSEN for tokens in seen.values())


def test_layers_that_lose_other_numbers_of_experts_say_so_in_the_config_and_load(checkpoint, tokenizer, tmp_path):
    folder, config, tensors = checkpoint
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("s_stage: {s_modifiers: {ExpertPruningModifier: {experts: [0, 2, 5]}}}")
    assert run_here("prune", folder, "--recipe", recipe, "--output", tmp_path / "files").returncode == 0
    prune(folder, tokenizer, experts=[0, 2, 5]).save_pretrained(tmp_path / "loaded")
    tokens, results = ids(2, 9), []
    for result in ("files", "loaded"):
        saved = json.loads((tmp_path / result / "config.json").read_text())
        assert [entry.get("experts") for entry in saved["sinkprune_block_sizes"]] == [None, 6, 3]
        assert saved["num_experts"] == 6
        # Official code would make six experts in each layer: it refuses the activation instead.
        assert saved["hidden_act"].startswith("silu with sinkprune_block_sizes")
        model = load_model(tmp_path / result, torch.float32)
        assert [sizes.experts for sizes in sizes_in_config(model.config)] == [0, 6, 3]
        with torch.no_grad():
            results.append(model(tokens).logits)
    kept = {index: numbers for index, numbers in enumerate(saved["sinkprune_kept_experts"]) if numbers}
    expected = {name: tensor.float() for name, tensor in without(tensors, kept).items()}
    with torch.no_grad():
        reference = plain_llada_moe(expected, config, tokens)
    torch.testing.assert_close(results[0], reference, **CLOSE)
    assert torch.equal(results[0], results[1])


def test_allocation_error_removes_as_many_in_all_and_a_second_pruning_goes_on(checkpoint, tokenizer, tmp_path):
    folder, _, _ = checkpoint
    model = prune(folder, tokenizer, experts=0.25, score="magnitude", allocation="error")
    counts = [sizes.experts for sizes in sizes_in_config(model.config)]
    assert sum(counts) == 2 * (EXPERTS - 2)
    assert min(counts[1:]) >= CHOSEN
    first = model.config.sinkprune_kept_experts
    model.save_pretrained(tmp_path / "once")
    again = prune(tmp_path / "once", tokenizer, experts=[0, counts[1] - 3, counts[2] - 3])
    assert again.config.num_experts == 3
    assert getattr(again.config, "sinkprune_block_sizes", None) is None
    for layer in (1, 2):
        # Numbers of the first model.
        assert set(again.config.sinkprune_kept_experts[layer]) <= set(first[layer])
        assert len(again.config.sinkprune_kept_experts[layer]) == 3


def test_a_sparse_checkpoint_stays_sparse_in_the_files(checkpoint, tmp_path):
    folder, _, tensors = checkpoint
    from sinkprune_plugin.formats import save_sparse_checkpoint

    half = {n: t.float() * (torch.arange(t.shape[-1]) % 2) if ".experts." in n else t for n, t in tensors.items()}
    save_sparse_checkpoint(half, tmp_path / "sparse", format="sparse-bitmask", source=folder, progress=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("s_stage: {s_modifiers: {ExpertPruningModifier: {experts: 0.5, score: magnitude}}}")
    done = run_here("prune", tmp_path / "sparse", "--recipe", recipe, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = CheckpointReader(tmp_path / "out")
    assert len(result.sparse_names) == 2 * 4 * 3
    kept = result.config["sinkprune_kept_experts"]
    for layer in (1, 2):
        for place, number in enumerate(kept[layer]):
            name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
            assert torch.equal(result[name.format(layer, place)], half[name.format(layer, number)])


@pytest.mark.parametrize(("name", "runs"), [("aimer", "scoring experts with"), ("reap_trajectory", "pruning with")])
def test_the_recipes_run_and_say_one_line_for_each_stage(name, runs, checkpoint, tmp_path):
    folder, _, _ = checkpoint
    options = ("--recipe", RECIPES / f"{name}.yaml", "--num-samples", 2, "--seq-len", 24)
    done = run_here("prune", folder, *options, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.replace("\r", "\n").splitlines()
    summary = [line for line in lines if line.startswith("ExpertPruningModifier: 6 of 8 experts stay in each of 2")]
    assert len(summary) == 1
    assert any(line.startswith(runs) for line in lines)
    # Loading or reading, the estimate where there is one, scoring or pruning, the summary, writing.
    assert len(lines) == (4 if name == "aimer" else 5), lines
    assert load_model(tmp_path / "out").config.num_experts == 6
    assert json.loads((tmp_path / "out" / "sinkprune_provenance.json").read_text())["settings"]["recipe"]


def test_a_checkpoint_on_the_hub_is_pruned_in_its_files_too(checkpoint, tmp_path):
    """As the hub's cache has it, without a network. Its windows and its length are the command's defaults: no text."""
    folder, _, _ = checkpoint
    repository = tmp_path / "cache" / "models--owner--moe"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    output, recipe = tmp_path / "out", RECIPES / "aimer.yaml"
    command = ("prune", "owner/moe", "--recipe", str(recipe), "--output", str(output))
    done = subprocess.run(
        [sys.executable, "-m", "sinkprune_plugin", *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert "scoring experts with" in done.stderr
    assert CheckpointReader(output).config["num_experts"] == 6
    assert not any(file.is_symlink() for file in output.iterdir())
    assert json.loads((output / "sinkprune_provenance.json").read_text())["settings"]["model"] == "owner/moe"


@pytest.mark.parametrize("score", ["aimer", "reap"])
def test_llada2_loses_as_many_of_each_group_of_its_router(score, tokenizer, tmp_path):
    """A dense layer first, a shared expert, a bias in the router, and noise block by block."""
    write_llada2(tmp_path / "dense", vocab_size=2048, torch_dtype="float32")
    loaded = prune(tmp_path / "dense", tokenizer, ids(2, 16), experts=0.3, score=score, **QUICK)
    loaded.save_pretrained(tmp_path / "loaded")
    kept = loaded.config.sinkprune_kept_experts
    # Of 12 experts in four groups 3.6 would go; four is the nearest.
    assert kept[0] == []
    assert [len([number for number in kept[1] if number // 3 == group]) for group in range(4)] == [2] * 4
    dense, result = CheckpointReader(tmp_path / "dense"), CheckpointReader(tmp_path / "loaded")
    for name in ("weight", "expert_bias"):
        router = f"model.layers.1.mlp.gate.{name}"
        assert torch.equal(result[router], dense[router][kept[1]].to(result[router].dtype))
    if score == "aimer":
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("s_stage: {s_modifiers: {ExpertPruningModifier: {experts: 0.3}}}")
        done = run_here("prune", tmp_path / "dense", "--recipe", recipe, "--output", tmp_path / "files")
        assert done.returncode == 0, done.stderr
        files = CheckpointReader(tmp_path / "files")
        assert set(files) == set(result)
        assert all(torch.equal(files[name], result[name].to(files[name].dtype)) for name in files)
        assert files.config["num_experts"] == 8
    tokens = ids(1, 8)
    with torch.no_grad():
        again = load_model(tmp_path / "loaded", torch.float32)
        torch.testing.assert_close(again(tokens).logits, loaded(tokens).logits, **CLOSE)


def test_without_data_plain_oneshot_needs_no_dataset(checkpoint):
    model = load_model(checkpoint[0], torch.float32)
    oneshot(model=model, recipe=ExpertPruningModifier(experts=2))
    assert model.config.num_experts == EXPERTS - 2


def test_with_a_score_that_needs_data_plain_oneshot_without_any_is_refused(checkpoint):
    model = load_model(checkpoint[0], torch.float32)
    with pytest.raises(UsageError, match="needs calibration data and got none"):
        oneshot(model=model, recipe=ExpertPruningModifier(experts=2, score="reap"))
    assert model.config.num_experts == EXPERTS


@pytest.mark.parametrize("experts_first", [True, False])
def test_it_stacks_with_the_pruning_of_single_weights(experts_first, checkpoint, tokenizer, tmp_path):
    model = load_model(checkpoint[0], torch.float32)
    experts = ExpertPruningModifier(experts=3, score="reap", **QUICK)
    weights = SinkAwareWandaModifier(mask_structure="2:4", **QUICK)
    recipe = [experts, weights] if experts_first else [weights, experts]
    run_oneshot(model, tokenizer, recipe, ids(2, 24))
    model.save_pretrained(tmp_path / "out")
    written = CheckpointReader(tmp_path / "out")
    assert written.format == "sparse-24-bitmask"
    assert sum(".experts." in name for name in written.sparse_names) == 2 * 5 * 3
    assert written.config["num_experts"] == 5
    again = load_model(tmp_path / "out", torch.float32)
    tokens = ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, **CLOSE)


# ---- bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("experts: 1.5", "neither a share to remove"),
        ("experts: 0", "has nothing to remove"),
        ("experts: 0.01", "rounds to none of the 8 experts"),
        ("experts: 7", "leaves 1 of the 8 experts of decoder block 1, whose router chooses 2; remove at most 6"),
        ("experts: 0.9", "leaves 1 of the 8 experts"),
        ("experts: [0.5, 0.5]", "experts has 2 values, but the model has 3 decoder blocks"),
        ("experts: [1, 2, 2]", "decoder block 0, which has no experts; give 0 there"),
        ("{experts: [0, 2, 2], allocation: error}", "which a list fixes"),
        ("{experts: 2, sparsity: 0.5}", "has no field `sparsity`: whole experts are removed"),
        (
            "{experts: 2, score: reap, calibrate_on: clean, timestep_weighting: inverse}",
            "clean samples have no timestep",
        ),
        ("{score: aimer}", "experts"),
        ("{experts: 2, score: luck}", "score"),
    ],
)
def test_fields_that_do_not_fit_are_refused_in_one_line_and_nothing_is_written(fields, message, checkpoint, tmp_path):
    fields = fields if fields.startswith("{") else f"{{{fields}}}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"s_stage: {{s_modifiers: {{ExpertPruningModifier: {fields}}}}}")
    done = run_here("prune", checkpoint[0], "--recipe", recipe, "--output", tmp_path / "out", "--seq-len", 24)
    assert done.returncode == 2
    assert message in done.stderr, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("Error") or message in line]) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_without_experts_is_refused(tmp_path, model, tokenizer):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("s_stage: {s_modifiers: {ExpertPruningModifier: {experts: 2}}}")
    done = run_here("prune", EMBEDDED_MODEL, "--recipe", recipe, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "models of model_type 'llada' have no experts" in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 9}, "experts.8.down_proj.weight is in no file, and config.json asks for 9 experts"),
        ({"num_experts": 7}, "tensor of expert 7, and config.json asks for 7 experts"),
        ({"moe_layer_freq": [1, 1, 1]}, "model.layers.0.mlp.experts.0.down_proj.weight is in no file"),
        ("gate", "mlp.gate.weight has 6 rows, and config.json asks for 8 experts in decoder block 1"),
        ("dtype", "down_proj.weight has I8 weights; remove experts before quantizing"),
        ("no gate", "mlp.gate.weight, the router's weight, is in no file"),
    ],
)
def test_files_that_disagree_with_the_config_are_refused_before_any_weight_is_read(
    change, message, checkpoint, tmp_path, monkeypatch
):
    from safetensors.torch import save_file

    folder, config, tensors = checkpoint
    shutil.copytree(folder, tmp_path / "model")
    tensors, gate = dict(tensors), "model.layers.1.mlp.gate.weight"
    if isinstance(change, dict):
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **change}))
    elif change == "gate":
        tensors[gate] = tensors[gate][:6].clone()
    elif change == "dtype":
        name = "model.layers.2.mlp.experts.3.down_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)
    else:
        del tensors[gate]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    monkeypatch.setattr(expert_files.ExpertFiles, "scores", lambda self: pytest.fail("weights were read"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("s_stage: {s_modifiers: {ExpertPruningModifier: {experts: 2}}}")
    done = run_here("prune", tmp_path / "model", "--recipe", recipe, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named(checkpoint, tmp_path):
    from safetensors.torch import save_file

    folder, _, _ = checkpoint
    shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.experts.3.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("s_stage: {s_modifiers: {ExpertPruningModifier: {experts: 2}}}")
    done = run_here("prune", tmp_path / "model", "--recipe", recipe, "--output", tmp_path / "out")
    assert done.returncode == 2
    assert "weights of expert 3 of decoder block 2 aren't finite" in done.stderr
    assert not (tmp_path / "out").exists()

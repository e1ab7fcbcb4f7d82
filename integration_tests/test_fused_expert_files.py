"""Fused experts in the commands that read the files of a checkpoint: prune, info, convert."""

import json
import re
import shutil

import pytest
import torch
from command_line import run_here
from fused_checkpoints import LAYOUTS, fuse
from golden_data import RECIPES
from official_checkpoints import write_llada_moe
from safetensors.torch import load_file, save_file

from sinkprune_plugin.formats.checkpoint_reader import CheckpointReader
from sinkprune_plugin.formats.files import shard_reader
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A dense layer and two of 8 experts, of which a token chooses 2."""
    folder = tmp_path_factory.mktemp("moe") / "model"
    write_llada_moe(folder, num_hidden_layers=3, moe_layer_freq=[0, 1, 1], num_experts=8)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_experts_lose_the_same_ones_in_the_files_and_stay_fused(layout, checkpoint, tmp_path, monkeypatch):
    # Experts are in several pieces of the file, and pieces hold parts of two experts.
    monkeypatch.setattr(shard_reader, "_PIECE", 4096)
    shutil.copytree(checkpoint, tmp_path / "fused")
    fuse(tmp_path / "fused", layout)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("s_stage: {s_modifiers: {ExpertPruningModifier: {experts: [0, 2, 5]}}}")
    for source, result in ((checkpoint, "separate"), (tmp_path / "fused", "result")):
        done = run_here("prune", source, "--recipe", recipe, "--output", tmp_path / result)
        assert done.returncode == 0, done.stderr
        assert "weights read from the files" in done.stderr
    written = load_file(tmp_path / "result" / "model.safetensors")
    assert {f"model.layers.1.mlp.{name}" for name in LAYOUTS[layout]} < set(written)
    expected, found = (load_model(tmp_path / name, torch.float32) for name in ("separate", "result"))
    assert found.config.sinkprune_kept_experts == expected.config.sinkprune_kept_experts
    assert all(torch.equal(weight, found.state_dict()[name]) for name, weight in expected.state_dict().items())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("experts.down_proj", lambda t: t[:, :, :-1], r"down_proj is \[8, 48, 39\] in its file, and .* \[8, 48, 40\]"),
        ("experts.down_proj", None, r"layers\.1\.mlp\.experts\.0\.down_proj\.weight is in no file"),
        ("experts.w13", lambda t: t, r"layers\.1\.mlp\.experts\.w13 \[8, 48, 40\] isn't a layout of experts"),
        ("experts.down_proj", lambda t: t.to(torch.float8_e4m3fn), r"down_proj has F8_E4M3 weights; remove experts"),
    ],
    ids=["shape", "missing", "unknown", "quantized"],
)
def test_fused_experts_that_are_not_understood(name, change, words, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "fused")
    tensors = fuse(tmp_path / "fused", "transformers")
    tensor = tensors.pop("model.layers.1.mlp.experts.down_proj")
    if change is not None:
        tensors[f"model.layers.1.mlp.{name}"] = change(tensor).contiguous()
    save_file(tensors, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    done = run_here("prune", tmp_path / "fused", "--recipe", RECIPES / "aimer.yaml", "--output", tmp_path / "result")
    assert done.returncode == 2
    assert re.search(words, done.stderr), done.stderr
    assert not (tmp_path / "result").exists()


WANDA = """prune_stage:
  prune_modifiers:
    SinkAwareWandaModifier: {mask_structure: "2:4", diffusion_steps: 2, sample_interval: 1, min_expert_tokens: 0}
"""


def test_pruned_in_memory_they_are_written_one_by_one(tmp_path):
    """The same weights and zeros as from the official layout, stored sparse, which fused ones couldn't be."""
    found = {}
    for name in ("official", "fused"):
        folder = tmp_path / name
        write_llada_moe(folder, vocab_size=2048)
        for file in EMBEDDED_MODEL.glob("tokenizer*"):
            shutil.copy(file, folder)
        if name == "fused":
            code = {
                "AutoModelForCausalLM": "modeling_fused.FusedLLaDAMoEModelLM",
                "AutoConfig": "configuration.LLaDAConfig",
            }
            fuse(folder, "dInfer", architectures=["FusedLLaDAMoEModelLM"], auto_map=code)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(WANDA)
        options = ("--recipe", recipe, "--num-samples", 2, "--seq-len", 32, "--device", "cpu")
        done = run_here("prune", folder, *options, "--output", tmp_path / f"{name}-pruned")
        assert done.returncode == 0, done.stderr
        found[name] = CheckpointReader(tmp_path / f"{name}-pruned")
    assert found["fused"].config["architectures"] == ["LLaDAMoEModelLM"]
    # That code would make new weights of other names.
    assert found["fused"].config["auto_map"] == {"AutoConfig": "configuration.LLaDAConfig"}
    assert found["fused"].format == found["official"].format == "sparse-24-bitmask"
    assert found["fused"].sparse_names == found["official"].sparse_names
    assert all(torch.equal(tensor, found["fused"][name]) for name, tensor in found["official"].items())


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_info_counts_the_same_whatever_the_layout(layout, checkpoint, tmp_path):
    """Weights, zeros and structure of all experts; the router is none of the Linears."""
    shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensor.unflatten(-1, (-1, 4))[..., :2] = 0
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    if layout is not None:
        fuse(tmp_path / "model", layout)
    done = run_here("info", tmp_path / "model", "--json")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    # 4 projections of attention in each layer, a dense MLP of 72 channels, 2 · 8 experts of 40; width 48.
    weights = 48 * (3 * 4 * 48 + 3 * 72 + 2 * 8 * 3 * 40)
    experts = 48 * 2 * 8 * 3 * 40
    assert (info["total"]["weights"], info["total"]["zeros"]) == (weights, experts // 2)
    assert info["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    layers = info["by_layer"].values()
    pruned = [layer for layer in layers if layer["zeros"]]
    assert {layer["structure"] for layer in pruned} == {"2:4"}
    assert sum(layer["weights"] for layer in pruned) == experts
    assert info["by_layer"]["model.layers.1.mlp.gate"]["role"] == "router"
    assert run_here("info", tmp_path / "model").returncode == 0


def test_convert_keeps_fused_experts_and_says_that_they_stay_dense(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    tensors = fuse(tmp_path / "model", "transformers")
    for name, tensor in tensors.items():
        if "q_proj" in name or ".experts." in name:
            tensor.unflatten(-1, (-1, 4))[..., :2] = 0
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    done = run_here("convert", tmp_path / "model", "--to", "sparse-24-bitmask", "--output", tmp_path / "sparse")
    assert done.returncode == 0, done.stderr
    assert "model.layers.1.mlp.experts.down_proj and 3 more: pruned, but stacks of matrices" in done.stdout
    expected = load_model(tmp_path / "model", torch.float32).state_dict()
    found = load_model(tmp_path / "sparse", torch.float32).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    back = run_here("convert", tmp_path / "sparse", "--to", "dense", "--output", tmp_path / "dense")
    assert back.returncode == 0, back.stderr
    again = load_file(tmp_path / "dense" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())

"""`sinkprune verify` of a mixture that lost experts: quality, size on disk and in memory, the most memory, speed."""

import json
import math

import pytest
import torch
from command_line import run_here
from tiny_moe import write_tiny_moe

from sinkprune_plugin.loading import load_model

KEPT = [2, 3, 8, 8, 4, 5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A mixture of 8 experts in each of 6 blocks, and the same with 2 to 8 of them."""
    folder = tmp_path_factory.mktemp("experts")
    write_tiny_moe(folder / "dense")
    recipe = folder / "recipe.yaml"
    removed = [8 - count for count in KEPT]
    recipe.write_text(f"s_stage: {{s_modifiers: {{ExpertPruningModifier: {{experts: {removed}, score: magnitude}}}}}}")
    done = run_here("prune", folder / "dense", "--recipe", recipe, "--output", folder / "pruned")
    assert done.returncode == 0, done.stderr
    return folder / "dense", folder / "pruned"


@pytest.fixture(scope="module")
def report(folders):
    output = folders[0].parent / "report"
    short = ("--quick", "--seq-len", 64, "--peak-memory", "--max-size-ratio", 0.9)
    done = run_here("verify", *folders, "--output", output, *short)
    assert done.returncode == 0, done.stderr
    return json.loads((output / "report.json").read_text()), done.stdout


def test_quality_has_an_interval(report):
    quality = report[0]["quality"]
    assert quality["elbo_pruned"] > quality["elbo_dense"]
    assert quality["ratio_low"] < quality["ratio"] < quality["ratio_high"]


def test_weights_are_counted_on_disk_and_in_memory(report, folders):
    size = report[0]["size"]
    for name, folder in zip(("dense", "pruned"), folders, strict=True):
        model = load_model(folder)
        assert size[name]["memory_bytes"] >= sum(each.numel() * each.element_size() for each in model.parameters())
        assert size[name]["file_bytes"] == (folder / "model.safetensors").stat().st_size
    # 18 of 48 experts and their rows of the router are gone, and nothing else.
    gone = (48 - sum(KEPT)) * (3 * 192 * 128 + 192)
    assert size["dense"]["parameters"] - size["pruned"]["parameters"] == gone
    bytes_each = torch.finfo(load_model(folders[0]).dtype).bits // 8
    assert size["dense"]["memory_bytes"] - size["pruned"]["memory_bytes"] == gone * bytes_each
    assert size["memory_ratio"] == size["pruned"]["memory_bytes"] / size["dense"]["memory_bytes"]
    assert "weights in memory" in report[1]


def test_the_most_memory_is_that_of_a_process_of_its_own(report):
    for name in ("dense", "pruned"):
        size = report[0]["size"][name]
        peak = size["peak"]
        # The weights, and at least the libraries below them; a second model or the tests' own process would be more.
        assert peak["peak_bytes"] >= peak["start_bytes"] + size["memory_bytes"]
        assert 1e8 < peak["start_bytes"] < peak["peak_bytes"] < 2e9
        assert (peak["device_bytes"] is None) == (not torch.accelerator.is_available())
    assert "peak memory" in report[1]


def test_speed_is_a_verdict_on_pairs_of_runs(report):
    speed = report[0]["speed"]
    assert speed["ratio_low"] <= speed["ratio"] <= speed["ratio_high"]
    assert math.isfinite(speed["ratio_high"])
    assert speed["why_not_faster"] is None
    assert report[0]["passed"]


def test_peak_memory_of_vllm_is_refused(folders, tmp_path):
    done = run_here("verify", *folders, "--output", tmp_path / "out", "--backend", "vllm", "--peak-memory")
    assert done.returncode == 2
    assert "drop one of --peak-memory and --backend vllm" in done.stderr
    assert not (tmp_path / "out").exists()


def test_experts_of_another_model_are_refused(folders, tmp_path):
    done = run_here("verify", folders[1], folders[0], "--output", tmp_path / "out", "--quick")
    assert done.returncode == 2
    assert "they aren't one model" in done.stderr

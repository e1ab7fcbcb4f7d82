"""`--device` decides where the passes run, `--batch-size` how much memory they take; neither changes a result."""

import json
import re
from contextlib import contextmanager

import pytest
import torch
from llmcompressor.pipelines.data_free import pipeline as data_free_pipeline
from llmcompressor.pipelines.sequential import pipeline as sequential_pipeline

from sinkprune_plugin import cli
from sinkprune_plugin.commands.prune import prune
from sinkprune_plugin.commands.sinks import measure_sinks
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot, stock_modifier
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier
from sinkprune_plugin.verification.verify import VerifyOptions, verify

BOTH = [SinkAwareWandaModifier, SinkAwareSparseGPTModifier]
QUICK = {"sparsity": 0.5, "diffusion_steps": 4, "sample_interval": 2}


@contextmanager
def rows_of_passes():
    """The number of rows of every pass that any model makes meanwhile."""
    rows = []

    def look(module, arguments):
        if isinstance(module, torch.nn.Embedding):
            rows.append(arguments[0].shape[0])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield rows
    finally:
        handle.remove()


def pruned(modifier, tokenizer, windows, **options):
    model = load_model(EMBEDDED_MODEL, torch.float32)
    with rows_of_passes() as rows:
        run_oneshot(model, tokenizer, modifier, windows, **options)
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}, rows


@pytest.mark.parametrize("cls", BOTH)
def test_batch_size_of_prune(cls, tokenizer, golden_windows):
    (single, one), (several, three) = (
        pruned(cls(**QUICK), tokenizer, golden_windows[:5, :64], batch_size=size) for size in (1, 3)
    )
    assert set(one) == {1}
    assert set(three) == {3, 2}
    for name, weight in single.items():
        same = ((weight == 0) == (several[name] == 0)).float().mean()
        # Ties within float32 rounding. SparseGPT passes its error on, so that a tie in one block changes the blocks
        # after it.
        assert same > (0.9999 if cls is SinkAwareWandaModifier or ".blocks.0." in name else 0.98), name


def sinks(output, **options):
    with rows_of_passes() as rows:
        measure_sinks(str(EMBEDDED_MODEL), output, num_samples=5, seq_len=64, **options)
    return json.loads((output / "sinks.json").read_text()), rows


def test_batch_size_of_sinks(tmp_path):
    (single, one), (several, two) = (sinks(tmp_path / str(size), batch_size=size) for size in (1, 2))
    assert (max(one), max(two)) == (1, 2)
    for a, b in zip(single["steps"], several["steps"], strict=True):
        assert a["sink_positions"] == b["sink_positions"]
        assert a["sink_mass_share"] == pytest.approx(b["sink_mass_share"], rel=1e-5)
    assert max(sinks(tmp_path / "default")[1]) == 5


def test_batch_size_of_verify(tmp_path):
    found = []
    for size in (2, 16):
        options = VerifyOptions(quick=True, seq_len=32, batch_size=size)
        with rows_of_passes() as rows:
            report = verify(EMBEDDED_MODEL, EMBEDDED_MODEL, tmp_path / str(size), options)
        found.append((max(rows), report))
    (few, single), (many, several) = found
    # Speed is measured at batch size 4, regardless of this one.
    assert (few, many) == (4, 16)
    for key in ("elbo_dense", "elbo_pruned", "masked_dense", "ratio_low"):
        assert single["quality"][key] == pytest.approx(several["quality"][key], rel=1e-5), key
    assert single["sinks"]["dense"]["sinks_per_step"] == several["sinks"]["dense"]["sinks_per_step"]
    assert single["provenance"]["settings"]["device"] == "cpu" or torch.accelerator.is_available()


def ours():
    return SinkAwareWandaModifier(**QUICK)


def stock():
    return stock_modifier("WandaPruningModifier", 0.5)


@pytest.mark.parametrize("make", [ours, stock])
def test_the_device_asked_for_takes_the_place_of_llm_compressors_choice(make, tokenizer, golden_windows, monkeypatch):
    """As on a machine with an accelerator, represented by a meta device: weights moved there are lost."""
    windows = golden_windows[:2, :64]
    expected = pruned(make(), tokenizer, windows)[0]
    for pipeline in (data_free_pipeline, sequential_pipeline):
        monkeypatch.setattr(pipeline, "get_main_device", lambda: torch.device("meta"))
    weights = pruned(make(), tokenizer, windows, device=torch.device("cpu"))[0]
    assert all(torch.equal(weight, weights[name]) for name, weight in expected.items())
    with pytest.raises((NotImplementedError, RuntimeError, ValueError)):
        pruned(make(), tokenizer, windows)


def test_a_full_device_is_one_line_with_the_ways_out(monkeypatch, capsys):
    def fill(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB …")

    monkeypatch.setattr(cli, "app", fill)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert re.fullmatch(r"sinkprune: .*CUDA out of memory.*--batch-size.*--device cpu\n", capsys.readouterr().err)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_commands_on_a_gpu_find_what_they_find_on_the_cpu(tmp_path):
    on = {device: sinks(tmp_path / device, device=device)[0] for device in ("cpu", "cuda:0")}
    for a, b in zip(*(report["steps"] for report in on.values()), strict=True):
        assert a["sink_mass_share"] == pytest.approx(b["sink_mass_share"], rel=1e-3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prune_stage: {prune_modifiers: {SinkAwareWandaModifier: {sparsity: 0.5}}}")
    for device in on:
        prune(str(EMBEDDED_MODEL), recipe, tmp_path / f"on-{device}", num_samples=2, seq_len=64, device=device)
    options = {device: VerifyOptions(quick=True, seq_len=64, device=device) for device in on}
    a, b = (
        verify(EMBEDDED_MODEL, tmp_path / f"on-{device}", tmp_path / f"report-{device}", options[device])
        for device in on
    )
    # bfloat16 passes, whose rounding the two devices don't share.
    assert a["quality"]["elbo_pruned"] == pytest.approx(b["quality"]["elbo_pruned"], rel=0.02)
    assert b["provenance"]["settings"]["device"] == "cuda:0"

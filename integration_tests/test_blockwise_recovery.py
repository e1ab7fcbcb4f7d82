"""BlockwiseRecoveryModifier in plain oneshot() runs behind pruning modifiers, and fit_blocks() on its own."""

import json
import os
import tempfile
from collections import namedtuple

import pytest
import torch
from compressed_tensors.offload.cache import CPUCache
from llmcompressor.core import reset_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger

from sinkprune_plugin.commands.recover import recover_model
from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import load_sparse_checkpoint
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.block_sizes import keep_units, remove_blocks, settle_config
from sinkprune_plugin.models.decoder_blocks import block_linears, find_decoder_blocks
from sinkprune_plugin.modifiers import blockwise_recovery, dense_weights
from sinkprune_plugin.modifiers.block_fit import FitOptions
from sinkprune_plugin.modifiers.block_recovery import fit_blocks
from sinkprune_plugin.modifiers.blockwise_recovery import BlockwiseRecoveryModifier
from sinkprune_plugin.modifiers.calibration import CalibrationBatch
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot, stock_modifier
from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier
from sinkprune_plugin.modifiers.trajectory import TrajectoryCorruption, corrupted_passes
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier
from sinkprune_plugin.recovery.options import RecoveryOptions

GRID = {"diffusion_steps": 4, "sample_interval": 2}
# Without held-out samples, so that every block changes however few there are.
QUICK = {**GRID, "epochs": 2, "learning_rate": 1e-3, "held_out": 0.0, "step_windows": 2}


def wanda(**fields):
    return SinkAwareWandaModifier(mask_structure="2:4", **GRID, **fields)


def recovery(**fields):
    return BlockwiseRecoveryModifier(**{**QUICK, **fields})


@pytest.fixture
def windows(golden_windows):
    return golden_windows[:2, :48]


@pytest.fixture(scope="module")
def pruned_model(tokenizer, golden_windows):
    """tiny-llada pruned to 2:4, and its weights."""
    model = load_model(EMBEDDED_MODEL, torch.float32)
    reset_session()
    run_oneshot(model, tokenizer, wanda(), golden_windows[:2, :48])
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.fixture
def lines():
    """What is logged, with its level."""
    found = []
    handle = logger.add(lambda message: found.append((message.record["level"].name, message.record["message"])))
    yield found
    logger.remove(handle)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The directory for temporary files, which has to be empty at the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


def zeros_stay(before, model):
    after = model.state_dict()
    names = [f"{name}.weight" for name in block_linears(model)]
    assert all(bool((after[name][before[name] == 0] == 0).all()) for name in names)
    return all(not torch.equal(after[name], before[name]) for name in names)


def distance(model, windows):
    """Mean square distance of the logits to the dense model's."""
    dense = load_model(EMBEDDED_MODEL, torch.float32)
    with torch.no_grad():
        return float((model(windows).logits - dense(windows).logits).square().mean())


def test_it_brings_the_outputs_closer_and_keeps_the_zeros(
    model, tokenizer, windows, pruned_model, scratch, lines, monkeypatch
):
    pruned = load_model(EMBEDDED_MODEL, torch.float32)
    pruned.load_state_dict(pruned_model)
    present = []
    keep = dense_weights.safe_open
    monkeypatch.setattr(
        dense_weights, "safe_open", lambda *args, **options: (present.append(1), keep(*args, **options))[1]
    )
    # Disk and memory, and the learned windows again: what is in no file any more can still be read.
    run_oneshot(model, tokenizer, [wanda(), recovery(hidden_states="disk", epochs=10)], windows)
    assert zeros_stay(pruned_model, model)
    assert len(present) == 6
    assert distance(model, windows) < 0.9 * distance(pruned, windows)
    # Norms, embedding and the vocabulary projection stay.
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, pruned_model[name])}
    assert changed == {f"{name}.weight" for name in block_linears(model)}
    (estimate,) = [text for _, text in lines if text.startswith("BlockwiseRecoveryModifier: 4 passes")]
    # 2 samples × 2 timesteps: 2 + 10 runs in training and 2 for the error, in 6 blocks; two streams of
    # 2 × 2 × 48 × 192 floats; a block has 4 × 192² + 3 × 192 × 512 weights of 24 bytes.
    assert "through 6 blocks, 336 runs of a block; hidden states 0.3 MB, weights and optimizer states of a block" in (
        estimate
    )
    assert estimate.endswith("at most 10.6 MB")
    assert any(text.startswith("BlockwiseRecoveryModifier: 6 blocks, error of the last one") for _, text in lines)


@pytest.mark.parametrize("name", ["WandaPruningModifier", "SparseGPTModifier"])
def test_behind_llm_compressors_own_modifiers(name, model, tokenizer, windows, scratch):
    run_oneshot(model, tokenizer, stock_modifier(name, 0.5, "2:4"), windows)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    reset_session()
    model = load_model(EMBEDDED_MODEL, torch.float32)
    run_oneshot(model, tokenizer, [stock_modifier(name, 0.5, "2:4"), recovery(save_format="auto")], windows)
    assert zeros_stay(before, model)
    assert model.save_pretrained.save_format == "auto"


def test_gptq_after_it_keeps_the_zeros(model, tokenizer, windows, pruned_model):
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    gptq = GPTQModifier(config_groups={"all": {"targets": [r"re:.*\.blocks\..*"], "weights": scheme}})
    run_oneshot(model, tokenizer, [wanda(), recovery(), gptq], windows)
    assert zeros_stay(pruned_model, model)


def test_a_checkpoint_gives_the_dense_weights_as_well(tokenizer, windows, pruned_model, scratch):
    """Behind a pruning modifier, and for a model that is pruned already: the same weights, bit for bit."""
    recovered = []
    for modifiers, weights in (
        ([wanda(), recovery()], None),
        ([wanda(), recovery(dense_model=str(EMBEDDED_MODEL))], None),
        ([recovery(dense_model=str(EMBEDDED_MODEL))], pruned_model),
    ):
        reset_session()
        model = load_model(EMBEDDED_MODEL, torch.float32)
        if weights is not None:
            model.load_state_dict(weights)
        run_oneshot(model, tokenizer, modifiers, windows)
        recovered.append(model.state_dict())
    for other in recovered[1:]:
        assert all(torch.equal(recovered[0][name], other[name]) for name in recovered[0])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda: [recovery()], "needs a pruning modifier before it"),
        (lambda: [recovery(), wanda()], "needs a pruning modifier before it"),
        (
            lambda: [wanda(), QuantizationModifier(targets=["Linear"], scheme="FP8_DYNAMIC"), recovery()],
            "QuantizationModifier comes before BlockwiseRecoveryModifier",
        ),
        (lambda: [wanda(), recovery(dense_model="/nowhere/at/all")], "/nowhere/at/all doesn't exist"),
        (lambda: [wanda(), recovery(targets=["re:.*transformer.ff_out$"])], "select no Linear in the decoder blocks"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_pruned(recipe, message, model, tokenizer, windows, scratch):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(UsageError, match=message) as caught:
        run_oneshot(model, tokenizer, recipe(), windows)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_another_dense_model_is_refused(model, tokenizer, windows, scratch):
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 5] += 1.0
    with pytest.raises(UsageError, match=r"wte.weight of dense_model .* differs"):
        run_oneshot(model, tokenizer, [wanda(), recovery(dense_model=str(EMBEDDED_MODEL))], windows)


def test_nothing_pruned_is_reported(model, tokenizer, windows, lines):
    run_oneshot(model, tokenizer, recovery(dense_model=str(EMBEDDED_MODEL)), windows)
    assert any(level == "WARNING" and "have no zeros" in text for level, text in lines)


def test_a_disk_that_is_too_small_for_the_dense_weights_is_refused(model, tokenizer, windows, scratch, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(dense_weights.shutil, "disk_usage", lambda _: usage(10**7, 0, 10**7))
    with pytest.raises(UsageError, match=r"the dense weights take 0.0 GB .* set TMPDIR .* or name .* `dense_model`"):
        run_oneshot(model, tokenizer, [wanda(), recovery()], windows)


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(model, tokenizer, windows, scratch, monkeypatch):
    written = []
    save = dense_weights.save_file

    def full(tensors, path):
        if len(written) == 3:
            raise OSError(28, os.strerror(28))
        written.append(save(tensors, path))

    monkeypatch.setattr(dense_weights, "save_file", full)
    with pytest.raises(UsageError, match=r"can't be written to .* No space left on device"):
        run_oneshot(model, tokenizer, [wanda(), recovery()], windows)


def test_an_error_while_pruning_leaves_nothing(model, tokenizer, windows, scratch):
    class Failing(SinkAwareWandaModifier):
        def _observe(self, *_args):
            assert not list(scratch.iterdir())
            raise UsageError("nothing works here")

    modifier = recovery()
    with pytest.raises(UsageError, match="nothing works here"):
        run_oneshot(model, tokenizer, [Failing(sparsity=0.5, **GRID), modifier], windows)
    assert modifier._dense is not None
    reset_session()
    # Which finalizes the modifiers, and with the mapping goes the disk space.
    assert modifier._dense is None


def test_offloaded_weights_come_in_once_and_get_the_same_values(tokenizer, windows, pruned_model, monkeypatch):
    recovered, brought_in = [], []
    original = CPUCache.onload

    def onload(self, offloaded):
        onloaded = original(self, offloaded)
        if onloaded is None:
            return None
        brought_in.append(onloaded.numel() * onloaded.element_size())
        copy = onloaded.detach().clone()
        return torch.nn.Parameter(copy, requires_grad=False) if isinstance(onloaded, torch.nn.Parameter) else copy

    traffic = []

    def fit(*args, **options):
        brought_in.clear()
        results = fit_blocks(*args, **options)
        traffic.append(sum(brought_in))
        return results

    monkeypatch.setattr(blockwise_recovery, "fit_blocks", fit)
    for offloaded in (False, True):
        reset_session()
        model = load_model(EMBEDDED_MODEL, torch.float32)
        model.load_state_dict(pruned_model)
        if offloaded:
            # What is onloaded is a copy, as from another device.
            monkeypatch.setattr(CPUCache, "onload", onload)
        run_oneshot(model, tokenizer, recovery(dense_model=str(EMBEDDED_MODEL)), windows)
        recovered.append(model.state_dict())
    assert all(torch.equal(recovered[0][name], recovered[1][name]) for name in recovered[0])
    # Embedding and blocks once, whatever the number of steps. The vocabulary projection isn't needed.
    needed = sum(weight.nbytes for name, weight in pruned_model.items() if ".blocks." in name or ".wte." in name)
    assert needed <= traffic[1] <= 1.1 * needed


@pytest.fixture
def passes(golden_windows):
    model = load_model(EMBEDDED_MODEL, torch.float32)
    corruption = TrajectoryCorruption(resolve_diffusion(model.config), 0, 1e-3)
    batches = [CalibrationBatch(index, row[None, :48], None) for index, row in enumerate(golden_windows[:2])]
    return corrupted_passes(batches, (0.5, 1.0), corruption)


def test_smaller_blocks_are_fitted_to_the_dense_ones(model, passes, windows):
    """Half of the channels and two of six heads removed, other ones in each block; no weight is zero."""
    dense_blocks = list(find_decoder_blocks(load_model(EMBEDDED_MODEL, torch.float32))[1])
    for index in range(6):
        keep_units(model, index, channels=torch.arange(index, 512, 2), heads=torch.tensor([0, 1, 2, 5]))
    settle_config(model)
    before = distance(model, windows)
    results = fit_blocks(
        model,
        load_sparse_checkpoint(EMBEDDED_MODEL),
        passes,
        2,
        FitOptions(epochs=15, learning_rate=1e-3, held_out=0.0, step_windows=2),
        dense_blocks=dense_blocks,
        progress=False,
    )
    assert all(result.after < 0.9 * result.before for result in results)
    assert distance(model, windows) < 0.9 * before
    assert model.model.transformer.blocks[0].ff_out.weight.shape == (192, 256)


def test_behind_the_modifier_that_removes_units(tokenizer, windows, scratch):
    """Half of the channels, a head and a block less: the dense blocks have other shapes, and there is one more."""
    distances = []
    for behind in ([], [recovery(epochs=10)]):
        reset_session()
        model = load_model(EMBEDDED_MODEL, torch.float32)
        pruner = SinkAwareStructuredModifier(mlp_channels=0.5, attention_heads=1, blocks=1, **GRID)
        run_oneshot(model, tokenizer, [pruner, *behind], windows)
        assert [block.ff_out.in_features for block in find_decoder_blocks(model)[1]] == [256] * 5
        distances.append(distance(model, windows))
    assert distances[1] < 0.9 * distances[0]


class RemovingPruner(Modifier):
    """Takes out the first and the fourth block, as a structured pruner would."""

    def on_initialize(self, state, **kwargs):
        return True

    def on_calibration_start(self, state, event, **kwargs):
        remove_blocks(state.model, [0, 3])


def test_a_block_before_a_gap_is_fitted_to_what_comes_out_of_it(model, tokenizer, windows, lines, scratch):
    """Two blocks that add nothing: without them the error is exactly zero, but only at the right places."""
    blocks = find_decoder_blocks(model)[1]
    with torch.no_grad():
        for index in (0, 3):
            blocks[index].attn_out.weight.zero_()
            blocks[index].ff_out.weight.zero_()
        expected = model(windows).logits
    run_oneshot(model, tokenizer, [RemovingPruner(), recovery()], windows)
    assert len(blocks) == 4
    with torch.no_grad():
        torch.testing.assert_close(model(windows).logits, expected, rtol=0, atol=0)
    assert any("4 blocks, error of the last one 0.00 % of the dense output before its fit" in text for _, text in lines)


def test_blocks_of_a_checkpoint_are_recognised(model, tokenizer, windows, tmp_path):
    """Two blocks and half of another one's channels are gone before: by the modifier and by `sinkprune recover`."""
    remove_blocks(model, [1, 4])
    keep_units(model, 2, channels=torch.arange(0, 512, 2))
    settle_config(model)
    pruned = tmp_path / "pruned"
    model.save_pretrained(pruned)
    tokenizer.save_pretrained(pruned)
    before = distance(model, windows)
    run_oneshot(model, tokenizer, recovery(dense_model=str(EMBEDDED_MODEL), epochs=10), windows)
    assert distance(model, windows) < 0.9 * before
    options = RecoveryOptions(method="blockwise", batch_size=4, held_out=0.25)
    result = recover_model(
        EMBEDDED_MODEL, pruned, tmp_path / "out", options=options, steps=10, seq_len=32, device="cpu"
    )
    blocks = json.loads((tmp_path / "out" / "recovery" / "recovery.json").read_text())["blocks"]
    assert [each["dense_block"] for each in blocks] == [0, 2, 3, 5]
    assert result.held_out_after < 0.9 * result.held_out_before
    assert distance(load_model(tmp_path / "out", torch.float32), windows) < before


def test_a_dense_model_with_other_blocks_is_refused(model, passes):
    dense_blocks = list(find_decoder_blocks(load_model(EMBEDDED_MODEL))[1])
    remove_blocks(model, [0, 3])
    with pytest.raises(UsageError, match="the dense model has 6 decoder blocks and the pruned one 4"):
        fit_blocks(model, load_sparse_checkpoint(EMBEDDED_MODEL), passes, 2, dense_blocks=dense_blocks, progress=False)


def test_weights_of_other_shapes_are_refused(model, passes):
    keep_units(model, 1, channels=torch.arange(256))
    with pytest.raises(UsageError, match=r"blocks.1.ff_proj.weight is \[512, 192\] in the dense weights, where \[256"):
        fit_blocks(model, load_sparse_checkpoint(EMBEDDED_MODEL), passes, 2, FitOptions(epochs=1), progress=False)


def test_a_mapping_that_lacks_a_weight_is_refused_at_once(model, passes):
    weights = dict(model.state_dict())
    del weights["model.transformer.blocks.5.up_proj.weight"]
    with pytest.raises(UsageError, match=r"the dense model has no model.transformer.blocks.5.up_proj.weight"):
        fit_blocks(model, weights, passes, 2, progress=False)


@pytest.mark.parametrize("train_norms", [False, True])
def test_norms_are_trained_where_asked(train_norms, model, passes, pruned_model):
    model.load_state_dict(pruned_model)
    options = FitOptions(epochs=1, learning_rate=1e-3, held_out=0.0, step_windows=2, train_norms=train_norms)
    chosen = "model.transformer.blocks.0.q_proj"
    fit_blocks(model, load_sparse_checkpoint(EMBEDDED_MODEL), passes, 2, options, linears=[chosen], progress=False)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, pruned_model[name])}
    norms = {
        f"model.transformer.blocks.{index}.{norm}.weight" for index in range(6) for norm in ("attn_norm", "ff_norm")
    }
    assert changed == {f"{chosen}.weight"} | (norms if train_norms else set())

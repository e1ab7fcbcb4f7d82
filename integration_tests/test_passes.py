"""The engine of calibration passes: order of runs, hidden states on disk, limits, the estimate beforehand."""

import contextlib
import gc
import io
import os
import tempfile
from types import SimpleNamespace

import psutil
import pytest
import torch
from loguru import logger
from transformers import Qwen2Config, Qwen2ForCausalLM

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.modifiers import hidden_states, passes
from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.hidden_states import HiddenStates
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot
from sinkprune_plugin.modifiers.passes import AllSeenError, CalibrationPass, PassEngine
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

QUICK = {"sparsity": 0.5, "diffusion_steps": 4, "sample_interval": 2}
BOTH = [SinkAwareWandaModifier, SinkAwareSparseGPTModifier]


def passes_of(*windows):
    return [CalibrationPass({"input_ids": ids, "attention_mask": None}, torch.ones(ids.shape)) for ids in windows]


def test_a_sweep_to_the_end_gives_the_logits_of_whole_forward_passes(model, golden_windows):
    passes = passes_of(golden_windows[:1, :40], golden_windows[1:3, :24])
    _, blocks = find_decoder_blocks(model)
    engine = PassEngine(model, blocks, progress=False)
    logits = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _module, _args, output: logits.append(output))
    with torch.no_grad():
        engine.sweep(passes, lambda block: block.run(advance=True), title="", block_runs=0)
        assert not logits

        class Nothing:
            def __enter__(self):
                return None

            def __exit__(self, *_):
                return None

        engine.run_head(lambda _number, _each: Nothing(), title="")
        hook.remove()
        for each, found in zip(passes, logits, strict=True):
            expected = model(**each.inputs).logits
            # The same kernels on the same shapes.
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all("forward" not in block.__dict__ for block in blocks)


def test_a_block_runs_all_passes_before_the_next_one_begins(model, golden_windows):
    passes = passes_of(golden_windows[:1, :16], golden_windows[1:2, :16])
    _, blocks = find_decoder_blocks(model)
    calls = []
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda _module, _args, _output, index=index: calls.append(index))
    with torch.no_grad():

        def visit(block):
            if block.index == 1:
                block.run()
                block.run(only_first=True)
            block.run(advance=True)

        PassEngine(model, blocks, progress=False).sweep(passes, visit, title="", block_runs=0)
    # Two passes each; in block 1 both of them, the first one, and both again.
    assert calls == [0, 0, 1, 1, 1, 1, 1, *[i for i in range(2, len(blocks)) for _ in range(2)]]


def test_a_block_that_keeps_its_outputs_is_a_mistake(model, golden_windows):
    _, blocks = find_decoder_blocks(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="block 0 has not passed its outputs on"):
        PassEngine(model, blocks, progress=False).sweep(
            passes_of(golden_windows[:1, :16]), lambda block: block.run(), title="", block_runs=0
        )


def test_the_dense_stream_stays_that_of_the_dense_model(model, golden_windows):
    """Blocks are zeroed one by one; the second stream sees them as they were."""
    passes = passes_of(golden_windows[:1, :16], golden_windows[1:2, :16])
    _, blocks = find_decoder_blocks(model)
    with torch.no_grad():
        expected = [model(**each.inputs, output_hidden_states=True).hidden_states for each in passes]
        seen = {"dense": [], "pruned": []}

        def watch(name):
            @contextlib.contextmanager
            def around(number, _each):
                seen[name].append(number)
                yield

            return around

        def visit(block):
            inputs = []
            hook = blocks[block.index].register_forward_pre_hook(lambda _module, args: inputs.append(args[0].clone()))
            block.run(watch("pruned"), dense=watch("dense"))
            hook.remove()
            for number in range(2):
                dense, pruned = inputs[2 * number : 2 * number + 2]
                torch.testing.assert_close(dense, expected[number][block.index], rtol=0, atol=0)
                assert torch.equal(dense, pruned) == (block.index == 0)
            block.run(dense=watch("dense"), advance=True)
            # Without the engine noticing, so that only the pruned stream of the next block differs.
            for states in block._engine._hidden._states:
                states.mul_(0.5)

        PassEngine(model, blocks, progress=False).sweep(passes, visit, title="", block_runs=0, two_streams=True)
    assert seen == {"dense": [0, 1] * 2 * len(blocks), "pruned": [0, 1] * len(blocks)}


def test_a_sweep_of_two_streams_advances_both(model, golden_windows):
    _, blocks = find_decoder_blocks(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="advances both"):
        PassEngine(model, blocks, progress=False).sweep(
            passes_of(golden_windows[:1, :16]),
            lambda block: block.run(advance=True),
            title="",
            block_runs=0,
            two_streams=True,
        )


def test_a_block_that_has_passed_its_outputs_on_does_not_run_again(model, golden_windows):
    _, blocks = find_decoder_blocks(model)

    def visit(block):
        block.run(advance=True)
        block.run()

    with torch.no_grad(), pytest.raises(RuntimeError, match="block 0 has passed its outputs on"):
        PassEngine(model, blocks, progress=False).sweep(
            passes_of(golden_windows[:1, :16]), visit, title="", block_runs=0
        )


@pytest.mark.parametrize("cls", BOTH)
def test_hidden_states_on_disk_change_nothing_and_leave_nothing(cls, tokenizer, golden_windows, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mapped = []
    original = hidden_states._file_backed

    def file_backed(numel, dtype):
        whole = original(numel, dtype)
        # The file has no name any more, but is mapped.
        mapped.append(any("sinkprune-hidden-states" in each.path for each in psutil.Process().memory_maps()))
        return whole

    monkeypatch.setattr(hidden_states, "_file_backed", file_backed)
    pruned = []
    for place in ("memory", "disk"):
        model = load_model(EMBEDDED_MODEL, torch.float32)
        run_oneshot(model, tokenizer, cls(hidden_states=place, **QUICK), golden_windows[:2, :64])
        pruned.append(model.state_dict())
    assert all(torch.equal(pruned[0][name], pruned[1][name]) for name in pruned[0])
    assert mapped == [True]
    assert not list(tmp_path.iterdir())
    gc.collect()
    assert not any("sinkprune-hidden-states" in each.path for each in psutil.Process().memory_maps())


def test_more_hidden_states_than_memory_are_refused_beforehand(model, tokenizer, golden_windows, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was run"))
    with pytest.raises(UsageError, match=r"take 0\.0 GB and main memory has 0\.0 GB free; set `hidden_states: disk`"):
        run_oneshot(model, tokenizer, SinkAwareSparseGPTModifier(**QUICK), golden_windows[:2, :64])


def test_more_hidden_states_than_disk_are_refused_beforehand(model, tokenizer, golden_windows, monkeypatch):
    monkeypatch.setattr(hidden_states.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass was run"))
    with pytest.raises(UsageError, match="set TMPDIR to a directory on a larger disk"):
        run_oneshot(
            model, tokenizer, SinkAwareSparseGPTModifier(hidden_states="disk", **QUICK), golden_windows[:2, :64]
        )


def test_a_disk_that_fills_up_meanwhile_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(*_args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UsageError, match=r"can't be written to \S+: No space left on device; set TMPDIR"):
        HiddenStates("disk").allocate([(1, 4, 8)], torch.float32, pinned=False)
    assert not list(tmp_path.iterdir())


def test_room_that_is_held_already_counts_as_free(monkeypatch):
    """The clean samples after ten times as many corrupted ones: torch doesn't give pinned memory back."""
    states = HiddenStates("memory")
    states.allocate([(1, 40, 8)] * 10, torch.float32, pinned=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    states.allocate([(1, 40, 8)], torch.float32, pinned=False)
    with pytest.raises(UsageError, match="main memory has"):
        states.allocate([(1, 40, 8)] * 2, torch.float32, pinned=False)


def test_hidden_states_of_the_dense_model_are_counted_as_well(model):
    """2 × 2 passes; two streams in the sweep that prunes, so that what doesn't fit is refused before the first one."""
    needed = {}
    for target in ("current", "dense"):
        for calibrate_on in ("corrupted", "clean"):
            modifier = SinkAwareSparseGPTModifier(target=target, calibrate_on=calibrate_on, **QUICK)
            needed[target, calibrate_on] = modifier.estimate(model, 2, 128).hidden_bytes
    one = 2 * 128 * 192 * 4
    assert needed == {
        ("current", "corrupted"): one,
        ("current", "clean"): one,
        ("dense", "corrupted"): 2 * one,
        ("dense", "clean"): one,
    }


@pytest.mark.parametrize("slab", [None, 100])
def test_passes_share_allocations_without_touching_each_other(slab, monkeypatch):
    """Slabs of 256 MB; here also of 25 floats, so that a slab ends in the middle and a pass is larger than one."""
    if slab is not None:
        monkeypatch.setattr(hidden_states, "SLAB_BYTES", slab)
    shapes = [(1, 4, 5), (2, 3, 5), (1, 1, 5), (1, 2, 5)]
    states = HiddenStates("memory")
    states.allocate(shapes, torch.float32, pinned=False)
    values = [torch.full(shape, float(index)) for index, shape in enumerate(shapes)]
    for index, value in enumerate(values):
        states.write(index, value)
    for found, value in zip(states.read(torch.device("cpu")), values, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("cls", "fields", "line"),
    [
        # 2 samples × 2 timesteps through 6 blocks; 256 tokens × 192 × 4 bytes; Hessians 6 × 192² + 512² floats.
        (
            SinkAwareSparseGPTModifier,
            {},
            "4 passes + 4 passes through 6 blocks, 72 runs of a block; hidden states 0.2 MB, statistics at most 1.9 MB",
        ),
        (SinkAwareSparseGPTModifier, {"calibrate_on": "clean"}, "4 passes + 2 passes through 6 blocks, 48 runs"),
        (SinkAwareWandaModifier, {}, "4 passes through 6 blocks, 24 runs of a block; hidden states 0.2 MB"),
        (SinkAwareWandaModifier, {"propagate_error": True}, "4 passes + 4 passes through 6 blocks, 72 runs"),
    ],
)
def test_the_run_says_what_it_will_take(cls, fields, line, model, tokenizer, golden_windows):
    lines = []
    number = logger.add(lambda message: lines.append(str(message)), level="INFO")
    blocks = model.model.transformer.blocks
    runs = []
    # Before the forward: a run may end at the last input that is needed. The first block is also called to learn what
    # the passes call it with.
    for block in blocks[1:]:
        block.register_forward_pre_hook(lambda *_: runs.append(None))
    run_oneshot(model, tokenizer, cls(**QUICK, **fields), golden_windows[:2, :64])
    logger.remove(number)
    assert sum(line in each for each in lines) == 1
    # The estimate equals the actual runs, minus the extra runs for the last block's outputs, which aren't needed.
    said = int(next(each for each in lines if line in each).split(" runs of a block")[0].split(", ")[-1])
    extra = 2 * len(golden_windows[:2]) if "48" not in line else 2
    assert len(runs) == said // 6 * 5 - (0 if said == 24 else extra)


def test_the_bar_is_full_where_blocks_take_fewer_runs_than_was_thought(model, golden_windows, monkeypatch):
    """How many groups a block is pruned in shows while it is pruned; and nobody needs the last block's outputs."""
    bars = []

    class Bar(passes.tqdm.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"disable": False, "file": io.StringIO()})
            bars.append(self)

    monkeypatch.setattr(passes.tqdm, "tqdm", Bar)
    _, blocks = find_decoder_blocks(model)
    totals = []

    def visit(block):
        totals.append(bars[-1].total)
        block.run()
        if block.index + 1 < len(blocks):
            block.run(advance=True)

    with torch.no_grad():
        PassEngine(model, blocks).sweep(passes_of(golden_windows[:1, :16]), visit, title="", block_runs=8 * len(blocks))
    # 48 at first, then two runs for each block, then one less.
    assert totals == [48, 12, 12, 12, 12, 12]
    assert (bars[-1].n, bars[-1].total) == (11, 11)


def test_runs_that_only_gather_statistics_end_at_their_last_input(model, tokenizer, golden_windows):
    """q/k/v, attn_out, ff_proj/up_proj and ff_out in turn: three times the rest of the block would be for nothing."""
    calls = []
    _, blocks = find_decoder_blocks(model)
    hook = blocks[0].ff_out.register_forward_hook(lambda *_: calls.append(True))
    modifier = SinkAwareADMMModifier(**QUICK, targets=[r"re:.*\.blocks\.0\."], iterations=1, gradual_iterations=1)
    run_oneshot(model, tokenizer, modifier, golden_windows[:3, :16])
    hook.remove()
    noisy = 3 * 2
    # All passes: finding sinks, and passing on both streams. The first one alone: the groups, and twice in each.
    assert len(calls) == noisy + 2 * noisy + 1 + 4 * 2


def test_outputs_that_are_needed_are_not_cut_off(model, golden_windows):
    _, blocks = find_decoder_blocks(model)

    def end(*_):
        raise AllSeenError

    blocks[0].ff_out.register_forward_pre_hook(end)
    engine = PassEngine(model, blocks, progress=False)
    with torch.no_grad(), pytest.raises(AllSeenError):
        engine.sweep(passes_of(golden_windows[:1, :16]), lambda block: block.run(advance=True), title="", block_runs=0)


@pytest.mark.parametrize("sliding", [False, True])
def test_blocks_with_masks_of_their_own_are_refused(sliding):
    """Each block would be given the first one's mask, and be calibrated on inputs that it never gets."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    window = {"use_sliding_window": sliding, "sliding_window": 4, "max_window_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **window)).eval()
    _, blocks = find_decoder_blocks(model)
    several = r"blocks of several kinds \(full_attention, sliding_attention\)"
    with pytest.raises(UsageError, match=several) if sliding else contextlib.nullcontext():
        PassEngine(model, blocks)

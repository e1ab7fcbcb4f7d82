"""Vllm's kernels in Triton's interpreter and as plain numpy leave the same bytes behind."""

import numpy as np
import pytest
import torch
from vllm_engine import prepare_vllm

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="replaced on a CPU only")
SLOTS, LONGEST, CANVAS = 6, 40, 12


@pytest.fixture(scope="module", autouse=True)
def _vllm():
    prepare_vllm()


def batch(seed):
    """Requests at different points: prompt only, in the middle of a prompt, with a canvas."""
    rng = np.random.default_rng(seed)
    slots = rng.permutation(SLOTS)[:4]
    prefill = rng.integers(5, 15, SLOTS).astype(np.int32)
    computed = np.where(rng.random(SLOTS) < 0.5, 0, prefill).astype(np.int32)
    canvas = rng.integers(0, CANVAS, 4)
    lengths = prefill[slots] - computed[slots] + canvas
    lengths[0] = max(1, lengths[0] // 2)
    canvas[0] = min(canvas[0], lengths[0])
    lengths = np.maximum(lengths, 1)
    canvas = np.minimum(canvas, lengths)
    bounds = np.zeros(SLOTS + 1, np.int32)
    bounds[1:5] = lengths.cumsum()
    bounds[5:] = bounds[4]
    rows = np.concatenate([[0], canvas.cumsum()]).astype(np.int32)
    return {
        "rng": rng,
        "slots": torch.from_numpy(slots),
        "prefill": torch.from_numpy(prefill),
        "computed": torch.from_numpy(computed),
        "bounds": torch.from_numpy(bounds),
        "rows": torch.from_numpy(rows),
        "tokens": torch.from_numpy(rng.integers(0, 99, (SLOTS, LONGEST)).astype(np.int32)),
        "drafts": torch.from_numpy(rng.integers(0, 99, (SLOTS, CANVAS))),
    }


def calls(seed):
    """Name, grid and arguments of each kernel for one batch; fresh tensors each time."""
    b = batch(seed)
    rng, slots, bounds = b["rng"], b["slots"], b["bounds"]
    total, rows = int(bounds[4]), int(b["rows"][-1])
    ids = torch.zeros(200, dtype=torch.int32)
    seq_lens = torch.full((SLOTS,), 7, dtype=torch.int32)
    positions = torch.zeros(200, dtype=torch.int64)
    lengths = (b["computed"][slots] + bounds[1:5] - bounds[:4]).int()
    yield "_prepare_prefill_inputs_kernel", (4,), [
        ids, torch.zeros(2, SLOTS, dtype=torch.int32), SLOTS, 2, slots, bounds, b["tokens"], LONGEST, b["prefill"],
        b["computed"], 1024, 2,
    ]  # fmt: skip
    yield "_prepare_pos_seq_lens_kernel", (5,), [positions, seq_lens, slots, bounds, b["computed"], SLOTS, 1024]
    for new in (0, 1):
        if new and rows < 4:
            continue
        yield "_combine_sampled_and_draft_tokens_kernel", (4,), [
            torch.zeros(200, dtype=torch.int32), slots, torch.arange(SLOTS)[:, None], bounds, lengths, b["prefill"],
            b["drafts"], CANVAS, b["rows"], torch.zeros(rows, dtype=torch.int64), 16, new,
        ]  # fmt: skip
    yield "_expand_idx_mapping_kernel", (4,), [
        slots, torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32), b["rows"], 16,
    ]  # fmt: skip
    mapped = slots.clone()
    mapped[2] = -1
    yield "_post_update_kernel", (4,), [
        mapped, b["computed"].clone(), torch.zeros(SLOTS, 1, dtype=torch.int64), None, 0,
        torch.from_numpy(rng.integers(0, 99, (4, 5)).astype(np.int32)), 5,
        torch.from_numpy(rng.integers(0, 6, 4).astype(np.int32)),
        torch.from_numpy(rng.integers(0, 9, 4).astype(np.int32)),
        bounds, b["tokens"].clone(), LONGEST, b["prefill"].clone(),
    ]  # fmt: skip
    tables = torch.from_numpy(rng.integers(0, 50, (SLOTS, 16)).astype(np.int32))
    gathered = torch.full((SLOTS, 16), 5, dtype=torch.int32)
    strides = torch.tensor([16])
    yield "_gather_block_tables_kernel", (1, 5), [
        slots, torch.tensor([tables.data_ptr()], dtype=torch.uint64),
        torch.tensor([gathered.data_ptr()], dtype=torch.uint64), strides,
        torch.from_numpy(rng.integers(0, 16, (1, SLOTS)).astype(np.int32)), SLOTS, 4, 1024, tables, gathered,
    ]  # fmt: skip
    positions[:total] = torch.from_numpy(rng.integers(0, 64, total))
    yield "_compute_slot_mappings_kernel", (1, 5), [
        200, mapped, bounds, positions, torch.tensor([tables.data_ptr()], dtype=torch.uint64), strides,
        torch.tensor([4], dtype=torch.int32), torch.tensor([True]), torch.tensor([False]),
        torch.zeros(1, 200, dtype=torch.int64), 200, 0, 1, 1, -1, 1024, tables,
    ]  # fmt: skip
    written = torch.zeros(SLOTS, 16, dtype=torch.int32)
    writes = [
        torch.tensor([4, 1], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32),
        torch.arange(9, dtype=torch.int32), torch.tensor([5, 9], dtype=torch.int32),
    ]  # fmt: skip
    yield "_apply_write_kernel", (2,), [written, 16, *writes, None, 1024, False]
    yield "_apply_write_kernel", (2,), [
        torch.tensor([written.data_ptr()], dtype=torch.uint64), strides, *writes,
        torch.zeros(2, dtype=torch.int32), 1024, True, written,
    ]  # fmt: skip


def kernels():
    from sinkprune_plugin.vllm.host_kernels import KERNELS

    return {function.__name__: (place, function) for place, functions in KERNELS.items() for function in functions}


@pytest.mark.parametrize("seed", range(4))
def test_the_same_bytes(seed):
    import importlib

    from sinkprune_plugin.vllm.host_kernels import HostKernel, install

    known, seen = kernels(), set()
    # Written before the replacement, so that this compares with vLLM's own.
    originals = {}
    for name, (place, _) in known.items():
        kernel = getattr(importlib.import_module(place), name)
        originals[name] = kernel.original if isinstance(kernel, HostKernel) else kernel
    for (name, grid, theirs), (_, _, ours) in zip(calls(seed), calls(seed), strict=True):
        count = len(originals[name].arg_names)
        originals[name][grid](*theirs[:count])
        HostKernel(known[name][1], originals[name])[grid](*ours[:count])
        for index, (one, other) in enumerate(zip(theirs, ours, strict=True)):
            # Tables of addresses differ, what they lead to comes after the arguments.
            if isinstance(one, torch.Tensor) and one.dtype != torch.uint64:
                assert torch.equal(one, other), (name, index)
        seen.add(name)
    assert seen == set(known)
    assert install() == []
    assert install() == []


def test_a_kernel_with_other_parameters_stays_with_the_interpreter(monkeypatch):
    from vllm.v1.worker.gpu import input_batch

    from sinkprune_plugin.vllm.host_kernels import install

    install()
    name = "_prepare_pos_seq_lens_kernel"
    original = getattr(input_batch, name).original

    class Renamed:
        arg_names = [*original.arg_names, "more"]  # noqa: RUF012

    monkeypatch.setattr(input_batch, name, Renamed)
    assert install() == [f"vllm.v1.worker.gpu.input_batch.{name}"]
    assert getattr(input_batch, name) is Renamed

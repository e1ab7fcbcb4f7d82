"""What the sampler's kernels do, counted: launches, bytes of logits that are read, noise that is hashed; and that they
compile for GPUs, which needs none."""

import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from sampler_cases import DEVICE, GPU, MASK, Case, device_batch, prepared, torch_backend, triton_backend
from torch.utils._python_dispatch import TorchDispatchMode

from sinkprune_plugin.sampling.batch_table import Column
from sinkprune_plugin.sampling.tokens import Needs

interpreted = pytest.mark.skipif(GPU, reason="counts in Triton's interpreter; a GPU runs the compiled kernels")
# The exponentials are float32: relative errors of 2^-23 in their sum, a few times that in an entropy, whose terms are
# larger.
CLOSE = {"rtol": 2e-6, "atol": 2e-7}


def proposals(backend, case, logits, needs):
    rows = len(logits)
    tokens = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    confidence = torch.empty(rows, dtype=torch.float64, device=DEVICE)
    logits = logits.clone().to(DEVICE)
    backend.propose(logits, device_batch(case), prepared(case), slice(0, rows), needs, None, tokens, confidence)
    return tokens.cpu(), confidence.cpu()


@contextmanager
def counted_kernels(case):
    """Counts of launches, of bytes loaded from a tensor of logits, and of logarithms of whole tiles.

    Yields (counts, watch): ``watch(logits)`` names the tensor.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    counts = {"launches": 0, "bytes": 0, "logs": 0, "operations": []}
    span = [0, 0]
    load, log, run = builder.create_masked_load, builder.create_log, interpreter.GridExecutor.__call__

    def counting_load(pointers, mask, *rest):
        inside = (pointers.data >= span[0]) & (pointers.data < span[1]) & mask.data
        counts["bytes"] += int(inside.sum()) * span[2] if len(span) > 2 else 0
        return load(pointers, mask, *rest)

    def counting_log(value):
        counts["logs"] += value.data.size > 1
        return log(value)

    def counting_run(self, *args, **kwargs):
        counts["launches"] += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *args, **kwargs)

    def watch(logits):
        span[:] = [logits.data_ptr(), logits.data_ptr() + logits.numel() * logits.element_size(), logits.element_size()]

    class Operations(TorchDispatchMode):
        """Every torch operation but views and allocations is a launch on a GPU."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.name()
            if not func.is_view and "empty" not in name and "detach" not in name and "alias" not in name:
                counts["operations"].append(name)
            return func(*args, **(kwargs or {}))

    builder.create_masked_load, builder.create_log = counting_load, counting_log
    interpreter.GridExecutor.__call__ = counting_run
    try:
        with Operations():
            yield counts, watch
    finally:
        builder.create_masked_load, builder.create_log = load, log
        interpreter.GridExecutor.__call__ = run


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_two_launches_and_one_read_of_the_logits(dtype, monkeypatch):
    from sinkprune_plugin.sampling.batched import BatchSampler

    monkeypatch.setattr(triton_backend, "TILE", 64)
    case = Case(1, vocabulary=500, greedy=True, dtype=dtype)
    logits = case.logits.clone()
    sampler = BatchSampler(prepared(case), lambda _: logits, case.vocabulary, backend=triton_backend)
    batch, hidden = device_batch(case), torch.zeros(len(logits), 4)
    with counted_kernels(case) as (counts, watch):
        watch(logits)
        sampler(hidden, batch, case.needs)
    assert counts["launches"] + len(counts["operations"]) == 2, counts
    assert counts["bytes"] <= 1.2 * logits.numel() * logits.element_size()
    # Each row is read whole: nothing else would make this a test of the greedy path.
    assert counts["bytes"] == (case.vocabulary - 1) * len(logits) * logits.element_size()
    assert counts["logs"] == 0


@interpreted
def test_only_rows_with_a_temperature_hash_noise(monkeypatch):
    monkeypatch.setattr(triton_backend, "TILE", 64)
    case = Case(2, vocabulary=500, greedy=True)
    request = case.row_request[0]
    case.floats[request, Column.TEMPERATURE] = 0.7
    hot = int((case.row_request == request).sum())
    assert 0 < hot < len(case.logits)
    with counted_kernels(case) as (counts, _):
        proposals(triton_backend, case, case.logits, Needs(True, False, (0,)))
    # Two logarithms in each of eight tiles.
    assert counts["logs"] == 2 * 8 * hot


@pytest.mark.parametrize("backend", [torch_backend, triton_backend])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_confidences_are_those_of_float64(backend, scale, monkeypatch):
    monkeypatch.setattr(triton_backend, "TILE", 64)
    for remasking in range(4):
        case = Case(7, vocabulary=300, greedy=True)
        case.table[:, Column.REMASKING] = remasking
        case.floats[::2, Column.TEMPERATURE] = 1.0
        case.logits = case.logits / 3 * scale
        tokens, confidence = proposals(backend, case, case.logits, Needs(True, False, (remasking,)))
        expected_tokens, expected = case.proposals()
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(confidence, expected, **CLOSE)
        if remasking == 0 and scale == 30.0:
            # How sure beyond 1 - 2^-24 stays told apart, which float32 would round to 1.
            sure = (expected > 1 - 1e-9) & (expected < 1)
            assert sure.any()
            torch.testing.assert_close(1 - confidence[sure], 1 - expected[sure], rtol=1e-5, atol=1e-16)


@pytest.mark.parametrize("backend", [torch_backend, triton_backend])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_broken_logits_are_counted_and_end_the_block(backend, broken):
    name = "torch" if backend is torch_backend else "triton"
    case = Case(9, greedy=True)
    case.table[:, Column.COUNT] = 1
    case.floats[:, Column.THRESHOLD], case.floats[:, Column.FACTOR] = np.inf, 0.0
    row = int(np.flatnonzero(np.bincount(case.row_request, minlength=6) > 1)[0])
    first = int(case.table[row, Column.FIRST_ROW])
    case.logits[first + 1, 11] = broken
    state, result = case.run(name)
    assert result.num_nans.tolist() == [int(number == row) for number in range(6)]
    # The broken position goes first, so that the request comes to its end.
    block = state.canvas[int(case.table[row, Column.SLOT])]
    column = int(case.masked[row][1])
    assert result.num_sampled[row] > 0 or block[column] != MASK


@pytest.mark.parametrize("shifted", [False, True])
def test_hidden_states_of_masked_positions(shifted):
    case = Case(4)
    hidden = torch.randn(6 * 24, 10, device=DEVICE)
    before = torch.randn(16, 10, device=DEVICE) if shifted else None
    state, batch = prepared(case), device_batch(case)
    expected = []
    for line, columns in zip(case.table, case.masked, strict=True):
        for column in columns:
            if shifted and column == 0:
                expected.append(before[line[Column.STATE_BEFORE]])
            else:
                expected.append(hidden[line[Column.FIRST_HIDDEN] + column - shifted])
    for backend in (torch_backend, triton_backend):
        assert torch.equal(backend.gather(hidden, before, batch, state), torch.stack(expected))


def test_nothing_is_needed_but_torch_until_a_gpu_is_used():
    """On a machine without Triton and vLLM everything but the kernels imports and runs."""
    code = (
        "import sys; sys.modules['triton'] = sys.modules['vllm'] = None\n"
        "import torch\n"
        "from sinkprune_plugin.sampling.batched import backend_for\n"
        "print(backend_for(torch.device('cpu')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "sinkprune_plugin.sampling.torch_backend", done.stderr


def test_kernels_compile_for_gpus():
    """For compute capability 8.0 and 9.0, all options on and off; a compiler needs no GPU."""
    code = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sinkprune_plugin.sampling import row_kernel, unmask_kernel

def compile(kernel, types, options, capability, **flags):
    names = kernel.arg_names
    constants = {name: options[name] for name in names if name in options}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=flags)
    return compiled.asm["ptx"].count("ld.global")

i64, f64, i32 = "*i64", "*fp64", "*i32"
needs = [f"NEEDS_{name}" for name in ("NOISE", "FILTER", "RANDOM", "MARGIN", "ENTROPY")]
rows = dict(table_pointer=i64, float_pointer=f64, request_pointer=i64, slot_order_pointer=i32,
            cut_pointer="*fp32", cut_index_pointer=i64, token_pointer=i64, confidence_pointer=f64)
unmask = dict(table_pointer=i64, float_pointer=f64, token_pointer=i64, confidence_pointer=f64, canvas_pointer=i64,
              order_pointer=i32, committing_pointer="*i8", left_pointer=i32, stop_pointer=i64, sampled_pointer=i32,
              num_sampled_pointer=i32, num_rejected_pointer=i32, num_nans_pointer=i32)
gather = dict(hidden_pointer="*bf16", state_pointer="*bf16", table_pointer=i64, request_pointer=i64,
              order_pointer=i32, result_pointer="*bf16")
for capability in (80, 90):
    for on, logits in ((False, "*bf16"), (True, "*fp32")):
        options = dict.fromkeys(needs, on) | {"TILE": 4096}
        compile(row_kernel.row_kernel, rows | {"logits_pointer": logits}, options, capability, num_warps=8)
    for stops in (0, 3):
        compile(unmask_kernel.unmask_kernel, unmask, {"STOPS": stops, "LANES": 32}, capability)
    for shifted in (False, True):
        compile(unmask_kernel.gather_kernel, gather, {"SHIFTED": shifted, "TILE": 1024}, capability)
print("compiled")
"""
    import os

    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]

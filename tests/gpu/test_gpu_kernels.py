"""GPU checks that need neither vLLM nor llm-compressor (`make test-gpu`, first tier): the sampler, column sums of
attention, solvers, cuSPARSELt. Each check also runs small on a CPU, so that it works on the day a GPU is there."""

import contextlib
import math
import statistics
import time

import pytest
import torch
from sampler_cases import Case, device_batch, prepared, torch_backend, triton_backend
from torch.nn import functional as F

from sinkprune_plugin.sampling.batch_state import BatchState, DeviceBatch
from sinkprune_plugin.sampling.batched import BatchSampler, StepNeeds
from sinkprune_plugin.sampling.options import REMASKINGS
from sinkprune_plugin.sampling.tokens import EVERYTHING, Needs
from sinkprune_plugin.sinks import attention_column_sums

GPU = torch.cuda.is_available()
ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")], id="cuda"
)
DEVICES = ["cpu", ON_GPU]
# Vocabulary, and widths in and out of the projections of LLaDA-8B: q, k, v and o; gate and up; down. Fused as in vLLM.
VOCABULARY = 126_464
LINEARS = {"attention": (4096, 4096), "qkv": (12288, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
ROWS = (256, 512, 1024, 2048, 4096, 8192)


def seconds(run, device, repeats):
    """Median time of a call, without the first ones."""
    times = []
    for _ in range(2 + repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def step_of(device, batch, vocabulary, *, width=32, temperature=0.0):
    """A step of ``batch`` blocks, all of them masked, as the engine plans it; and random logits of its rows."""
    import numpy as np

    from sinkprune_plugin.sampling.options import SamplingOptions
    from sinkprune_plugin.vllm.step_plan import BatchLayout, SlotTable

    slots = SlotTable(batch, 4 * width)
    for slot in range(batch):
        slots.add(slot, 64, SamplingOptions.resolve(gen_length=4 * width, block_length=width, temperature=temperature))
    canvas = np.full(batch, 4 * width)
    plan = slots.plan(BatchLayout(np.arange(batch), np.zeros(batch, np.int64), canvas + 64, canvas))
    parts = (plan.table, plan.row_request, plan.needs.filtered)
    state = BatchState(torch.full((batch, 4 * width), vocabulary - 1, device=device), vocabulary - 1)
    generator = torch.Generator(device).manual_seed(0)
    rows = len(plan.row_request)
    logits = torch.randn(rows, vocabulary, device=device, generator=generator, dtype=torch.bfloat16) * 3
    return state, DeviceBatch(*(torch.from_numpy(part).to(device) for part in parts)), plan.needs, logits


@pytest.mark.parametrize("device", [ON_GPU])
@pytest.mark.parametrize("vocabulary", [300, VOCABULARY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_against_the_cpu(device, vocabulary, dtype, measured):
    """All options mixed, several seeds, all tokens equal; on a CPU tests/sampling/test_batched.py does this."""
    differing = total = 0
    for seed in range(5):
        case = Case(seed, vocabulary=vocabulary, requests=12, width=16, stops=True, dtype=dtype)
        results = {}
        for place, backend in ((device, triton_backend), ("cpu", torch_backend)):
            batch, state = device_batch(case, place), prepared(case, place)
            sampler = BatchSampler(state, lambda _, p=place: case.logits.to(p), vocabulary, backend=backend)  # noqa: B023
            result = sampler(torch.zeros(len(case.row_request), 1, device=place), batch, case.needs)
            results[place] = state.canvas.cpu(), result.num_sampled.cpu(), result.num_rejected.cpu()
        (canvas, *numbers), (expected, *expected_numbers) = results[device], results["cpu"]
        differing += int((canvas != expected).sum())
        total += canvas.numel()
        if torch.equal(canvas, expected):
            assert all(map(torch.equal, numbers, expected_numbers))
    measured |= {"differing": differing, "positions": total}
    # A float64 logarithm of another library, or a float32 exponential, may resolve a tie within its last bit otherwise.
    assert differing <= total * 1e-3


@contextlib.contextmanager
def without_waiting(device):
    """Anything that makes the host wait for the device raises."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_step_never_waits_for_the_device(device, temperature):
    state, batch, needs, logits = step_of(device, 4, 500, temperature=temperature)
    sampler = BatchSampler(state, lambda hidden: logits[: len(hidden)].clone(), 500)
    hidden = torch.randn(4 * 128, 16, device=device)
    for _ in range(2):
        with without_waiting(device):
            rows = sampler.gather(hidden, None, batch)
            result = sampler(rows, batch, needs)
    # All of the work was done: one token of each block in each step, and the block isn't finished.
    assert result.num_sampled.tolist() == [0] * 4
    assert (state.canvas[:, :32] != 499).sum(dim=1).tolist() == [2] * 4


@pytest.mark.parametrize(
    ("device", "vocabulary", "batches"),
    [("cpu", 500, (2,)), pytest.param("cuda", VOCABULARY, (8, 32, 64), marks=ON_GPU.marks)],
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_time_of_a_step(device, vocabulary, batches, temperature, measured):
    """At most a few times the time that one read of the logits takes; greedy is bound by memory."""
    for batch in batches:
        state, table, needs, logits = step_of(device, batch, vocabulary, temperature=temperature)
        canvas = state.canvas.clone()
        sampler = BatchSampler(state, lambda hidden, x=logits: x[: len(hidden)], vocabulary)
        hidden = logits[:, :1]

        def run(sampler=sampler, state=state, canvas=canvas, hidden=hidden, table=table, needs=needs):
            state.canvas.copy_(canvas)
            sampler(hidden, table, needs)

        taken = seconds(run, device, 20 if device == "cuda" else 3)
        read = seconds(lambda x=logits: x.amax(), device, 20 if device == "cuda" else 3)
        measured[f"batch {batch}"] = {
            "rows": len(logits),
            "step_ms": 1000 * taken,
            "amax_ms": 1000 * read,
            "logits_gbytes_per_s": logits.numel() * 2 / taken / 1e9,
        }
        assert math.isfinite(taken)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("remasking", REMASKINGS)
def test_memory_of_a_step_is_bounded_by_the_chunk(device, remasking, measured):
    """Two chunks of 64 rows hold no more than one does."""
    vocabulary, seen = 4096, []
    for blocks in (2, 8):
        state, batch, needs, _ = step_of(device, blocks, vocabulary, temperature=0.5)
        needs = StepNeeds(needs.widest, Needs(True, False, (REMASKINGS.index(remasking),)), needs.filtered, False)
        largest = []

        def head(hidden, largest=largest):
            largest.append(len(hidden))
            return torch.randn(len(hidden), vocabulary, device=device)

        sampler = BatchSampler(state, head, vocabulary, logits_bytes=64 * vocabulary * 4)
        hidden = torch.zeros(32 * blocks, 8, device=device)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        sampler(hidden, batch, needs)
        seen.append(torch.cuda.max_memory_allocated() - before if device == "cuda" else max(largest))
        assert largest == [64] * (blocks // 2)
    measured |= {"bytes" if device == "cuda" else "rows": seen}
    # The numbers of each row, 16 bytes, and the allocator's granularity.
    assert seen[1] <= seen[0] + (1 << 20)


@pytest.mark.parametrize(("device", "length"), [("cpu", 96), pytest.param("cuda", 4096, marks=ON_GPU.marks)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_sums(device, length, dtype, measured):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, length, 64, generator=generator).to(dtype) for heads in (8, 2))
    valid = torch.arange(length)[None] < length - 7
    found = attention_column_sums(query.to(device), key.to(device), valid=valid.to(device)).cpu()
    scores = query.double() @ key.double().repeat_interleave(4, 1).transpose(-1, -2) / 8
    scores.masked_fill_(~valid[:, None, None], -torch.inf)
    expected = (scores.softmax(-1) * valid[:, None, :, None]).sum((1, 2))
    measured["largest relative error"] = float(((found - expected) / expected.clamp(min=1e-9))[valid].abs().max())
    # Products of float32; on a GPU they may be TF32 if somebody has switched that on, which this would show.
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-4)


def two_of_four(weight):
    groups = weight.view(-1, 4)
    return groups.scatter(1, groups.float().abs().topk(2, largest=False).indices, 0).view(weight.shape)


@pytest.mark.parametrize(
    ("device", "shapes", "rows"),
    [("cpu", {"small": (64, 128)}, (8,)), pytest.param("cuda", LINEARS, ROWS, marks=ON_GPU.marks)],
)
def test_sparse_tensor_cores_against_dense(device, shapes, rows, measured):
    """cuSPARSELt on each projection of LLaDA-8B against the dense bfloat16 product; on a CPU the dense one twice."""
    if device == "cuda" and not torch.backends.cusparselt.is_available():
        pytest.skip("this torch has no cuSPARSELt")
    for name, (outputs, inputs) in shapes.items():
        weight = two_of_four(torch.randn(outputs, inputs, dtype=torch.bfloat16, device=device))
        packed = torch._cslt_compress(weight) if device == "cuda" else weight
        for count in rows:
            x = torch.randn(count, inputs, dtype=torch.bfloat16, device=device)

            def sparse(x=x, packed=packed, weight=weight):
                if device == "cuda":
                    return torch._cslt_sparse_mm(packed, x.t(), transpose_result=True)
                return F.linear(x, weight)

            dense = F.linear(x, weight)
            # bfloat16 has 8 bits; sums of thousands of terms are taken in float32 in another order.
            torch.testing.assert_close(sparse(), dense, rtol=2e-2, atol=2e-2 * float(dense.std()))
            repeats = 10 if device == "cuda" else 1
            slow, fast = (
                seconds(run, device, repeats) for run in (lambda x=x, weight=weight: F.linear(x, weight), sparse)
            )
            numbers = {"dense_ms": 1000 * slow, "sparse_ms": 1000 * fast, "gain": slow / fast}
            measured[f"{name} {count}"] = numbers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pattern", ["0:0", "2:4"])
def test_solvers(device, pattern, measured):
    """SparseGPT's and ADMM's solutions on a device have the error of the CPU's."""
    from sinkprune_plugin.pruning import admm, sparsegpt
    from sinkprune_plugin.pruning.hessian import prepare_hessian
    from sinkprune_plugin.pruning.patterns import parse_mask_structure

    def by_admm(W, H):
        return admm.solve(W, prepare_hessian(H, 0.01, "layer"), 0.5, structure)[0]

    def by_sparsegpt(W, H):
        return sparsegpt.sparsify_weight(W, sparsegpt.invert_hessian(H, 0.01, "layer"), 0.5, structure, block_size=128)[
            0
        ]

    generator = torch.Generator().manual_seed(0)
    X = torch.randn(512, 128, generator=generator)
    W = torch.randn(64, 128, generator=generator)
    structure = parse_mask_structure(pattern)
    for name, solve in (("sparsegpt", by_sparsegpt), ("admm", by_admm)):
        errors = {}
        for place in ("cpu", device):
            pruned = solve(W.to(place), X.T.to(place) @ X.to(place))
            assert float((pruned == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
            errors[place] = float(((X @ (W - pruned.cpu()).T) ** 2).sum())
        measured[name] = errors
        # Near ties fall either way; the error is what counts.
        assert errors[device] == pytest.approx(errors["cpu"], rel=0.01)


def test_a_step_that_needs_everything_is_profiled():
    """What an engine measures at start covers the largest chunk, with filters."""
    rows = []
    state = BatchState(torch.full((3, 64), 9), 9)
    sampler = BatchSampler(
        state, lambda hidden: rows.append(len(hidden)) or torch.zeros(len(hidden), 10), 10, logits_bytes=4 * 10 * 50
    )
    sampler.profile(torch.zeros(1, 4), most_rows=192)
    sampler.profile(torch.zeros(1, 4), most_rows=20)
    assert rows == [50, 20]
    assert EVERYTHING.filters

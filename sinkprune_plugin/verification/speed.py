"""Tokens per second of two models, taking turns, at several batch sizes and cache modes."""

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from sinkprune_plugin.devices import wait_for_device
from sinkprune_plugin.diffusion import DiffusionSpec
from sinkprune_plugin.sampling import denoise
from sinkprune_plugin.verification.speed_verdict import (
    CONFIDENCE,
    LEAST_REPETITIONS,
    Interval,
    Verdict,
    judge,
    ratio_interval,
)

__all__ = ["SpeedComparison", "SpeedRow", "Workload", "compare_speed", "transformers_sampler", "vllm_sampler"]

# More repetitions hardly narrow the interval.
MOST_REPETITIONS = 40
# The first pass allocates and compiles, the second tells how long a repetition takes.
WARM_UP = 2


@dataclass(frozen=True)
class Workload:
    """What is generated.

    :param prompts: (B, P) int64, as many as the largest batch
    :param gen_length: tokens of each answer
    :param block_length: tokens in a block
    :param steps: denoising steps of an answer
    :param batch_sizes: prompts at once
    :param caches: cache modes
    :param seconds: how long to measure; there are at least 15 repetitions, however long they take, and at most 40
    :param seed: seed of the order in which models and cells run
    """

    prompts: torch.Tensor
    gen_length: int = 32
    block_length: int = 16
    steps: int = 16
    batch_sizes: tuple[int, ...] = (1, 8)
    caches: tuple[str, ...] = ("none", "dual")
    seconds: float = 30.0
    seed: int = 0


@dataclass(frozen=True)
class SpeedRow:
    """One cell.

    :param batch: prompts at once
    :param cache: cache mode
    :param dense_tokens_per_s: median over the repetitions
    :param pruned_tokens_per_s: the same of the pruned model
    :param ratio: pruned to dense speed, estimated from the repetitions' pairs of runs in immediate succession
    :param ratio_low: lower end of its interval
    :param ratio_high: upper end
    :param dense_ms_per_step: milliseconds per denoising step of the whole batch
    :param pruned_ms_per_step: the same of the pruned model
    :param forward_share: share of the pruned model's time in its forward; None where the backend doesn't tell
    """

    batch: int
    cache: str
    dense_tokens_per_s: float
    pruned_tokens_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    dense_ms_per_step: float
    pruned_ms_per_step: float
    forward_share: float | None


@dataclass(frozen=True)
class SpeedComparison:
    """The whole comparison.

    :param verdict: what the interval shows
    :param ratio: how many times as fast the pruned model is, as the geometric mean over the cells
    :param ratio_low: lower end of its interval
    :param ratio_high: upper end
    :param confidence: of all intervals
    :param repetitions: how often each cell was timed
    :param rows: the cells
    """

    verdict: Verdict
    ratio: float
    ratio_low: float
    ratio_high: float
    confidence: float
    repetitions: int
    rows: tuple[SpeedRow, ...]


class Sampler(Protocol):
    """A model in a backend. ``forward_seconds`` sums the time in its forward; None where it isn't measured."""

    forward_seconds: float | None

    def __call__(self, prompts: torch.Tensor, workload: Workload, cache: str) -> None:
        """Generate, and wait until that is done."""


class _TransformersSampler:
    def __init__(self, model: Any, spec: DiffusionSpec) -> None:
        self.forward_seconds: float | None = 0.0
        self._model, self._spec = model, spec
        self._started = 0.0

    def __call__(self, prompts: torch.Tensor, workload: Workload, cache: str) -> None:
        hooks = [
            self._model.register_forward_pre_hook(lambda *_: self._start()),
            self._model.register_forward_hook(lambda *_: self._stop()),
        ]
        try:
            denoise(
                self._model,
                prompts,
                gen_length=workload.gen_length,
                block_length=workload.block_length,
                steps=workload.steps,
                cache=cache,
                spec=self._spec,
            )
        finally:
            for hook in hooks:
                hook.remove()
        wait_for_device()

    def _start(self) -> None:
        wait_for_device()
        self._started = time.perf_counter()

    def _stop(self) -> None:
        wait_for_device()
        self.forward_seconds = (self.forward_seconds or 0.0) + time.perf_counter() - self._started


class _VllmSampler:
    def __init__(self, directory: Path, workload: Workload, dtype: torch.dtype, **options: Any) -> None:
        from sinkprune_plugin.vllm.offline import OfflineEngine

        # vLLM doesn't report it; benchmarks/serving.py measures it.
        self.forward_seconds: float | None = None
        self._engine = OfflineEngine(
            directory,
            max_requests=max(workload.batch_sizes),
            max_model_len=workload.prompts.shape[1] + workload.gen_length,
            canvas_length=workload.gen_length,
            dtype=dtype,
            # Two engines share the machine, so that their runs can take turns.
            gpu_memory_utilization=0.42,
            # Each run reads its prompts, also where a model's family allows that they are found again.
            enable_prefix_caching=False,
            **options,
        )

    def __call__(self, prompts: torch.Tensor, workload: Workload, cache: str) -> None:
        options = {"dlm_block_length": workload.block_length, "dlm_steps": workload.steps, "dlm_cache": cache}
        self._engine.generate(prompts.tolist(), workload.gen_length, options)


def transformers_sampler(model: Any, spec: DiffusionSpec) -> Sampler:
    """The plain sampler on a transformers model.

    :param model: the model
    :param spec: family and mask token
    """
    return _TransformersSampler(model, spec)


def vllm_sampler(directory: Path, workload: Workload, dtype: torch.dtype, **options: Any) -> Sampler:
    """vLLM's engine on a checkpoint.

    :param directory: the checkpoint
    :param workload: what will be generated, for the engine's limits
    :param dtype: precision to run in
    :param options: further arguments of vLLM's ``LLM``
    :raises UsageError: if vLLM isn't installed or can't start
    """
    return _VllmSampler(directory, workload, dtype, **options)


def compare_speed(
    dense: Sampler,
    pruned: Sampler,
    workload: Workload,
    *,
    progress: bool = False,
    clock: Callable[[], float] | None = None,
) -> SpeedComparison:
    """Time both models, in turns.

    Each repetition goes through all cells in a random order. In half of them, drawn anew, the dense model runs first,
    so that neither place is an advantage. See :mod:`~sinkprune_plugin.verification.speed_verdict` for what that is good
    for. How many repetitions there are is settled before the first of them is measured: stopping as soon as the result
    looks clear would make chance differences look clear more often than the interval says.

    :param dense: one model
    :param pruned: the other
    :param workload: what is generated
    :param progress: show a progress bar
    :param clock: seconds; None takes wall time
    :return: the verdict over all cells, and a row for each batch size and cache mode
    """
    cells = [_Cell(batch, cache) for batch in workload.batch_sizes for cache in workload.caches]
    order = random.Random(workload.seed)
    clock = clock or time.perf_counter
    with tqdm(total=WARM_UP + LEAST_REPETITIONS, desc="speed", unit="pass", disable=None if progress else True) as bar:
        for _ in range(WARM_UP):
            began = clock()
            for cell in cells:
                _time_pair(dense, pruned, workload, _Cell(cell.batch, cell.cache), clock, dense_first=True)
            taken = clock() - began
            bar.update()
        repetitions = min(MOST_REPETITIONS, max(LEAST_REPETITIONS, int(workload.seconds / max(taken, 1e-9))))
        bar.total = WARM_UP + repetitions
        for _ in range(repetitions):
            shuffled = order.sample(cells, len(cells))
            halves = [place < len(cells) // 2 for place in range(len(cells))]
            if len(cells) % 2:
                halves[-1] = order.random() < 0.5
            order.shuffle(halves)
            for cell, dense_first in zip(shuffled, halves, strict=True):
                _time_pair(dense, pruned, workload, cell, clock, dense_first=dense_first)
            bar.update()
    whole = ratio_interval([statistics.fmean(each) for each in zip(*(cell.log_ratios for cell in cells), strict=True)])
    return SpeedComparison(
        verdict=judge(whole),
        ratio=whole.ratio,
        ratio_low=whole.low,
        ratio_high=whole.high,
        confidence=CONFIDENCE,
        repetitions=repetitions,
        rows=tuple(cell.row(workload) for cell in cells),
    )


class _Cell:
    """Times of one batch size and cache mode, in the order of the repetitions."""

    def __init__(self, batch: int, cache: str) -> None:
        self.batch, self.cache = batch, cache
        self.dense_seconds: list[float] = []
        self.pruned_seconds: list[float] = []
        self.shares: list[float] = []

    @property
    def log_ratios(self) -> list[float]:
        return [math.log(a / b) for a, b in zip(self.dense_seconds, self.pruned_seconds, strict=True)]

    def row(self, workload: Workload) -> SpeedRow:
        interval: Interval = ratio_interval(self.log_ratios)
        first, second = statistics.median(self.dense_seconds), statistics.median(self.pruned_seconds)
        tokens = self.batch * workload.gen_length
        return SpeedRow(
            batch=self.batch,
            cache=self.cache,
            dense_tokens_per_s=tokens / first,
            pruned_tokens_per_s=tokens / second,
            ratio=interval.ratio,
            ratio_low=interval.low,
            ratio_high=interval.high,
            dense_ms_per_step=1000 * first / workload.steps,
            pruned_ms_per_step=1000 * second / workload.steps,
            forward_share=statistics.median(self.shares) if self.shares else None,
        )


def _time_pair(
    dense: Sampler,
    pruned: Sampler,
    workload: Workload,
    cell: _Cell,
    clock: Callable[[], float],
    *,
    dense_first: bool,
) -> None:
    prompts = workload.prompts[: cell.batch]
    for is_dense in (dense_first, not dense_first):
        sampler = dense if is_dense else pruned
        inside = sampler.forward_seconds
        started = clock()
        sampler(prompts, workload, cell.cache)
        taken = clock() - started
        (cell.dense_seconds if is_dense else cell.pruned_seconds).append(taken)
        if not is_dense and inside is not None and sampler.forward_seconds is not None:
            cell.shares.append((sampler.forward_seconds - inside) / taken)

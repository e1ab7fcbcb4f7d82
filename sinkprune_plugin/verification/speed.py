"""Tokens per second of two models, taking turns, at several batch sizes and cache modes."""

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

__all__ = ["SpeedRow", "Workload", "compare_speed", "transformers_sampler", "vllm_sampler"]


@dataclass(frozen=True)
class Workload:
    """What is generated.

    :param prompts: (B, P) int64, as many as the largest batch
    :param gen_length: tokens of each answer
    :param block_length: tokens in a block
    :param steps: denoising steps of an answer
    :param batch_sizes: prompts at once
    :param caches: cache modes
    :param rounds: timed rounds, after one to warm up
    """

    prompts: torch.Tensor
    gen_length: int = 32
    block_length: int = 16
    steps: int = 16
    batch_sizes: tuple[int, ...] = (1, 8)
    caches: tuple[str, ...] = ("none", "dual")
    rounds: int = 3


@dataclass(frozen=True)
class SpeedRow:
    """One cell.

    :param batch: prompts at once
    :param cache: cache mode
    :param dense_tokens_per_s: median over the rounds
    :param pruned_tokens_per_s: the same of the pruned model
    :param ratio: median over the rounds of pruned to dense speed, each round's two runs in immediate succession
    :param ratio_low: lowest of the rounds
    :param ratio_high: highest
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
    def __init__(self, directory: Path, workload: Workload, dtype: torch.dtype) -> None:
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


def vllm_sampler(directory: Path, workload: Workload, dtype: torch.dtype) -> Sampler:
    """vLLM's engine on a checkpoint.

    :param directory: the checkpoint
    :param workload: what will be generated, for the engine's limits
    :param dtype: precision to run in
    :raises UsageError: if vLLM isn't installed or can't start
    """
    return _VllmSampler(directory, workload, dtype)


def compare_speed(
    dense: Sampler, pruned: Sampler, workload: Workload, *, progress: bool = False
) -> tuple[SpeedRow, ...]:
    """Time both models, in turns.

    :param dense: one model
    :param pruned: the other
    :param workload: what is generated
    :param progress: show a progress bar
    :return: a row for each batch size and cache mode
    """
    rows = []
    cells = [(batch, cache) for batch in workload.batch_sizes for cache in workload.caches]
    with tqdm(
        total=len(cells) * (workload.rounds + 1), desc="speed", unit="round", disable=None if progress else True
    ) as bar:
        for batch, cache in cells:
            rows.append(_measure(dense, pruned, workload, batch, cache, bar.update))
    return tuple(rows)


def _measure(
    dense: Sampler, pruned: Sampler, workload: Workload, batch: int, cache: str, advance: Callable[[], Any]
) -> SpeedRow:
    prompts = workload.prompts[:batch]
    seconds: dict[str, list[float]] = {"dense": [], "pruned": []}
    shares: list[float] = []
    for round_number in range(workload.rounds + 1):
        for name, sampler in (("dense", dense), ("pruned", pruned)):
            inside = sampler.forward_seconds
            started = time.perf_counter()
            sampler(prompts, workload, cache)
            taken = time.perf_counter() - started
            if round_number:
                seconds[name].append(taken)
                if name == "pruned" and inside is not None and sampler.forward_seconds is not None:
                    shares.append((sampler.forward_seconds - inside) / taken)
        advance()
    ratios = [a / b for a, b in zip(seconds["dense"], seconds["pruned"], strict=True)]
    tokens = batch * workload.gen_length
    first, second = (statistics.median(seconds[name]) for name in ("dense", "pruned"))
    return SpeedRow(
        batch=batch,
        cache=cache,
        dense_tokens_per_s=tokens / first,
        pruned_tokens_per_s=tokens / second,
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        dense_ms_per_step=1000 * first / workload.steps,
        pruned_ms_per_step=1000 * second / workload.steps,
        forward_share=statistics.median(shares) if shares else None,
    )

"""Sink-aware Wanda's calibration against the published formulation and against llm-compressor's own Wanda.

Workload: a random LLaDA (8 layers, d_model 1024, 16 heads, MLP 3072, float32), windows of 1024 random tokens, 50 %
sparsity.

- *published*: the formulation of the paper's program, written out below. For every sample and timestep one forward pass
  with explicit (B, H, T, T) attention for the sink mask, and a second pass for the norms of the masked rows.
- *stock Wanda*: llm-compressor's WandaPruningModifier through the same oneshot(), on as many clean windows as ours has
  (sample, timestep) pairs, so that the number of forward tokens is the same.

The three take turns over several rounds; the table gives medians, the ratios are medians of the ratios round by round.
Model
construction and data are outside the timing. Memory is what torch's allocator hands out above its level at the start.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from loguru import logger
from rich.console import Console
from rich.table import Table
from torch.overrides import TorchFunctionMode

from sinkprune_plugin.diffusion import corrupt, resolve_diffusion, sample_generator, timestep_grid
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.models.decoder_blocks import block_linears
from sinkprune_plugin.models.llada import LLaDAConfig, LLaDAModelLM
from sinkprune_plugin.modifiers.oneshot_flow import run_oneshot, stock_modifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier
from sinkprune_plugin.pruning.patterns import MaskStructure
from sinkprune_plugin.pruning.wanda import sparsify_weight
from sinkprune_plugin.sinks import attention_column_sums, capture_attention_mass, soft_sink_mask

DIFFUSION_STEPS, SAMPLE_INTERVAL, NOISE_EPS = 4, 1, 1e-3


class ExplicitAttention(TorchFunctionMode):
    """Attention as the published program computes it: the whole probability matrix in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.mass: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        probabilities = torch.softmax(
            query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, dim=-1, dtype=torch.float32
        )
        mass = probabilities.sum(dim=(1, 2))
        self.mass = mass if self.mass is None else self.mass + mass
        return probabilities.to(value.dtype) @ value


def published(model: Any, windows: torch.Tensor) -> None:
    """Two passes for every sample and timestep, then Wanda on the sums of norms."""
    spec = resolve_diffusion(model.config)
    linears = block_linears(model).values()
    norms: dict[torch.nn.Module, torch.Tensor] = {}
    weights = torch.empty(0)

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows = args[0][0].float() * weights
        norms[module] = norms.get(module, 0.0) + rows.norm(dim=0)

    with torch.no_grad():
        for window in windows:
            for step, timestep in enumerate(timestep_grid(DIFFUSION_STEPS, SAMPLE_INTERVAL)):
                noisy = corrupt(
                    window[None],
                    timestep,
                    spec,
                    noise_eps=NOISE_EPS,
                    generators=[sample_generator(0, step, window)],
                ).noisy_ids
                with ExplicitAttention() as attention:
                    model(input_ids=noisy)
                assert attention.mass is not None
                weights = (1 - soft_sink_mask(attention.mass)).reshape(-1, 1)
                handles = [module.register_forward_pre_hook(hook) for module in linears]
                model(input_ids=noisy)
                for handle in handles:
                    handle.remove()
        for module in linears:
            module.weight.copy_(sparsify_weight(module.weight, norms[module], 0.5, MaskStructure(0, 0)))


def ours(model: Any, windows: torch.Tensor) -> None:
    """The modifier through oneshot()."""
    modifier = SinkAwareWandaModifier(
        sparsity=0.5, diffusion_steps=DIFFUSION_STEPS, sample_interval=SAMPLE_INTERVAL, noise_eps=NOISE_EPS
    )
    run_oneshot(model, load_tokenizer(EMBEDDED_MODEL), modifier, windows)


def stock(model: Any, windows: torch.Tensor) -> None:
    """llm-compressor's Wanda through oneshot(), on one clean window for every pass of ours."""
    repeated = torch.cat([windows.roll(step, dims=1) for step in range(DIFFUSION_STEPS // SAMPLE_INTERVAL)])
    run_oneshot(model, load_tokenizer(EMBEDDED_MODEL), stock_modifier("WandaPruningModifier", 0.5), repeated)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most memory that torch's CPU allocator had handed out during a call, beyond its level at the start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    level = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def capture_memory(model: Any, windows: torch.Tensor) -> dict[str, int]:
    """Peak of one forward pass, plain, with our capture, and with the explicit attention."""

    def plain() -> None:
        model(input_ids=windows[:1])

    def captured() -> None:
        with capture_attention_mass():
            model(input_ids=windows[:1])

    def explicit() -> None:
        with ExplicitAttention():
            model(input_ids=windows[:1])

    query, key = torch.randn(2, 1, 16, 1024, 64).unbind()
    with torch.no_grad():
        return {
            "plain": peak_bytes(plain),
            "capture": peak_bytes(captured),
            "explicit": peak_bytes(explicit),
            "one layer": peak_bytes(lambda: attention_column_sums(query, key)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the three runs (default 3)")
    parser.add_argument("--windows", type=int, default=1, help="calibration windows, 4 timesteps each (default 1)")
    options = parser.parse_args()
    logger.remove()
    console = Console(width=110)

    config = LLaDAConfig(
        d_model=1024,
        n_layers=8,
        n_heads=16,
        n_kv_heads=16,
        mlp_hidden_size=3072,
        vocab_size=2048,
        embedding_size=2048,
        max_sequence_length=1024,
        mask_token_id=2,
    )
    torch.manual_seed(0)
    windows = torch.randint(3, 2048, (options.windows, 1024))
    methods = {"ours": ours, "published": published, "stock Wanda": stock}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with tempfile.TemporaryDirectory() as directory:
        # On disk, since oneshot() reads the checkpoint's config again.
        LLaDAModelLM(config).save_pretrained(directory)
        for _ in range(options.rounds + 1):
            for name, method in methods.items():
                model = load_model(directory, torch.float32)
                started = time.perf_counter()
                method(model, windows)
                seconds[name].append(time.perf_counter() - started)
    # The first round warms up caches, thread pools and imports.
    seconds = {name: values[1:] for name, values in seconds.items()}

    memory = capture_memory(LLaDAModelLM(config).eval(), windows)
    extra = {name: memory[name] - memory["plain"] for name in ("capture", "explicit")}
    attention_bytes = 16 * 1024 * 1024 * 4
    ratios = {
        name: statistics.median(b / a for a, b in zip(seconds["ours"], seconds[name], strict=True))
        for name in ("published", "stock Wanda")
    }

    table = Table(title=f"calibration, 8 layers, d 1024, T 1024, float32, {torch.get_num_threads()} threads")
    for heading in ("method", "median s", "min", "max", "× ours"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, values in seconds.items():
        ratio = ratios.get(name, 1.0)
        table.add_row(name, *(f"{f(values):.2f}" for f in (statistics.median, min, max)), f"{ratio:.2f}")
    console.print(table)
    console.print(
        f"memory of the capture alone, one layer: {memory['one layer'] / 2**20:.1f} MiB, one (B, H, T, T) float32 is "
        f"{attention_bytes / 2**20:.0f} MiB; added to the peak of a pass: capture {extra['capture'] / 2**20:.1f} MiB, "
        f"explicit attention {extra['explicit'] / 2**20:.1f} MiB"
    )
    result = {
        "benchmark": "calibration",
        "seconds": seconds,
        "speedup_over_published": round(ratios["published"], 3),
        "speedup_over_stock_wanda": round(ratios["stock Wanda"], 3),
        "capture_layer_bytes": memory["one layer"],
        "capture_extra_bytes": extra["capture"],
        "explicit_extra_bytes": extra["explicit"],
        "attention_matrix_bytes": attention_bytes,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""`sinkprune demo`: the whole chain on the embedded model, in a minute or two and without a network."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sinkprune_plugin.devices import choose_device
from sinkprune_plugin.diffusion import elbo_perplexity, resolve_diffusion
from sinkprune_plugin.inspection.info import inspect_checkpoint
from sinkprune_plugin.inspection.structure import ZeroCount
from sinkprune_plugin.loading import EMBEDDED_MODEL, load_model, load_tokenizer
from sinkprune_plugin.modifiers import check_llmcompressor, load_oneshot_flow
from sinkprune_plugin.outputs import check_output, new_directory
from sinkprune_plugin.provenance import write_provenance
from sinkprune_plugin.steps import quiet_steps
from sinkprune_plugin.text_windows import embedded_text, read_documents, token_windows
from sinkprune_plugin.verification.report import print_report
from sinkprune_plugin.verification.speed import SpeedComparison, Workload, compare_speed, transformers_sampler
from sinkprune_plugin.verification.speed_verdict import NO_DIFFERENCE
from sinkprune_plugin.verification.verify import VerifyOptions, verify

__all__ = ["DemoRow", "run_demo"]

CALIBRATION_WINDOWS = 16
TEST_WINDOWS = 24
SEQ_LEN = 256
CORRUPTIONS = 8
# The method whose model is verified in full.
BEST = "sink-aware-admm"
# Half of the FFN channels: not sparse but smaller, so its speed is measured too.
STRUCTURED = "structured"
# Seconds of timing; there are enough repetitions in any case.
TIMING = 5.0


@dataclass
class DemoRow:
    """One line of the demo's table.

    :param method: what pruned the model
    :param sparsity: share of zeros in the decoder blocks' Linears
    :param perplexity: Monte-Carlo ELBO perplexity on the embedded test text
    :param standard_error: its standard error
    :param seconds: wall time of oneshot()
    :param format: how the weights were saved
    :param file_bytes: size of the saved weights
    :param speed: times the dense model's speed, where it can differ: of the structured model, whose layers are smaller
    """

    method: str
    sparsity: float
    perplexity: float
    standard_error: float
    seconds: float
    format: str
    file_bytes: int
    speed: SpeedComparison | None = None


def run_demo(
    output: Path, *, sparsity: float = 0.5, seed: int = 0, overwrite: bool = False, verbose: bool = False
) -> list[DemoRow]:
    """Prune the embedded model with several methods through oneshot(), save, reload, compare, and verify one of them.

    :param output: directory for the pruned models, the table (demo.json) and the report
    :param sparsity: share of zeros
    :param seed: seed of corruption, calibration windows and evaluation
    :param overwrite: replace an existing output
    :param verbose: show what llm-compressor and transformers say and their progress bars
    :return: the rows of the table, dense first
    """
    check_llmcompressor()
    check_output(output, overwrite=overwrite)
    with quiet_steps(verbose=verbose) as steps, new_directory(output, overwrite=overwrite) as directory:
        with steps.step("dense: measuring the embedded model"):
            flow = load_oneshot_flow()

            tokenizer = load_tokenizer(EMBEDDED_MODEL)
            calibration = token_windows(
                read_documents(embedded_text("calibration")), tokenizer, SEQ_LEN, CALIBRATION_WINDOWS, seed=seed
            )
            test = token_windows(read_documents(embedded_text("test")), tokenizer, SEQ_LEN, TEST_WINDOWS, seed=seed)
            rows = [_row("dense", EMBEDDED_MODEL, test, 0.0, seed)]
        for method, make_modifier in _methods(sparsity, seed).items():
            with steps.step(f"{method}: pruning it with oneshot()"), flow.log_to(steps, summaries=False):
                model = load_model(EMBEDDED_MODEL, torch.float32)
                started = time.monotonic()
                flow.run_oneshot(model, tokenizer, make_modifier(), calibration)
                seconds = time.monotonic() - started
                saved = directory / method
                # In its original precision, so that sizes can be compared; the reload below measures what that costs.
                model.to(torch.bfloat16)
                model.save_pretrained(str(saved))
                tokenizer.save_pretrained(str(saved))
                # The numbers in the table are those of the checkpoint on disk, not of the model in memory.
                rows.append(_row(method, saved, test, seconds, seed))
        with steps.step(f"{STRUCTURED}: timing it and the dense model in turns"):
            rows[-1].speed = _speed(directory / STRUCTURED, test, seed)
        with steps.step(f"{BEST}: comparing it with the dense model"):
            options = VerifyOptions(quick=True, seed=seed)
            report = verify(EMBEDDED_MODEL, directory / BEST, directory / "verify", options)
        table = json.dumps([asdict(row) for row in rows], indent=2)
        (directory / "demo.json").write_text(table + "\n", encoding="utf-8")
        write_provenance(directory, sparsity=sparsity, seed=seed, windows=CALIBRATION_WINDOWS, seq_len=SEQ_LEN)
    console = Console()
    _print(rows, console)
    print_report(report, console)
    where = f"models, demo.json and verify/report.html (with a picture of the sinks) are in {output}"
    console.print(Text(where), soft_wrap=True)
    return rows


def _methods(sparsity: float, seed: int) -> dict[str, Callable[[], Any]]:
    """Stock modifiers and ours, with the settings that a user would try first."""
    from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
    from sinkprune_plugin.modifiers.oneshot_flow import stock_modifier
    from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
    from sinkprune_plugin.modifiers.structured import SinkAwareStructuredModifier

    return {
        "wanda": lambda: stock_modifier("WandaPruningModifier", sparsity),
        "sparsegpt": lambda: stock_modifier("SparseGPTModifier", sparsity),
        "sink-aware-sparsegpt": lambda: SinkAwareSparseGPTModifier(sparsity=sparsity, seed=seed),
        "sink-aware-admm": lambda: SinkAwareADMMModifier(sparsity=sparsity, seed=seed),
        STRUCTURED: lambda: SinkAwareStructuredModifier(mlp_channels=0.5, seed=seed),
    }


def _row(method: str, checkpoint: Path, test: torch.Tensor, seconds: float, seed: int) -> DemoRow:
    model = load_model(checkpoint, torch.float32, choose_device())
    estimate = elbo_perplexity(model, test, num_samples=CORRUPTIONS, seed=seed, progress=True)
    stored = inspect_checkpoint(checkpoint)
    zeros = ZeroCount.total([layer.count for layer in stored.linears])
    return DemoRow(
        method,
        zeros.sparsity,
        estimate.perplexity,
        estimate.standard_error,
        seconds,
        stored.storage.format.value,
        stored.file_bytes,
    )


def _speed(checkpoint: Path, test: torch.Tensor, seed: int) -> SpeedComparison:
    models = [load_model(path, torch.float32, choose_device()) for path in (EMBEDDED_MODEL, checkpoint)]
    samplers = [transformers_sampler(model, resolve_diffusion(model.config)) for model in models]
    prompts = test[:4, : test.shape[1] // 4]
    workload = Workload(prompts, 16, 16, 4, batch_sizes=(1, 4), seconds=TIMING, seed=seed)
    return compare_speed(samplers[0], samplers[1], workload)


def _print(rows: list[DemoRow], console: Console) -> None:
    # Eighty columns wide, so that nothing is cut off on a plain terminal or in a log.
    table = Table(
        title="tiny-llada, ELBO perplexity (ppl) on the embedded test text",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        collapse_padding=True,
    )
    for heading in ("method", "zeros", "ppl", "± s.e.", "change", "sec.", "saved as", "MB"):
        table.add_column(heading, justify="left" if heading in ("method", "saved as") else "right", no_wrap=True)
    dense = rows[0].perplexity
    for row in rows:
        table.add_row(
            f"{row.method}, {row.speed.ratio:.2f} ×"
            if row.speed and row.speed.verdict != NO_DIFFERENCE
            else row.method,
            f"{row.sparsity:.2f}",
            f"{row.perplexity:.2f}",
            f"{row.standard_error:.2f}",
            f"{100 * (row.perplexity / dense - 1):+.1f} %",
            f"{row.seconds:.1f}" if row.seconds else "",
            row.format,
            f"{row.file_bytes / 1e6:.2f}",
        )
    console.print(table)
    for row in rows:
        if row.speed is not None:
            console.print(
                f"speed of {row.method}: {row.speed.verdict}, {row.speed.ratio:.2f} × dense (99 %: "
                f"{row.speed.ratio_low:.2f} to {row.speed.ratio_high:.2f}); the others run the dense kernels"
            )

"""The `sinkprune` command. Exit codes: 0 success, 1 a check failed, 2 usage error; errors are one line on stderr."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from sinkprune_plugin import __version__
from sinkprune_plugin.errors import UsageError, short

__all__ = ["app", "main"]

app = typer.Typer(
    name="sinkprune",
    help="Sink-aware pruning of diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Directory to write; appears whole or not at all.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output directory if it exists.")]
SeedOption = Annotated[int, typer.Option(help="Seed of corruption and of the choice of text.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show all messages and progress bars.")]
DeviceOption = Annotated[str, typer.Option(help="auto (the accelerator if there is one), cpu, cuda, cuda:1, …")]
BATCH_SIZE = "Windows in a forward pass: more is faster and takes more memory; results are the same."
SeqLenOption = Annotated[int | None, typer.Option(help="Tokens in a sample; default: the model's maximum.")]
DatasetOption = Annotated[
    str | None,
    typer.Option(help="Text file, .jsonl with a text field, or saved dataset; default: the embedded text."),
]


# The base of typer's usage errors, ClickException. Recent typer carries its own copy of click, so there is no other
# name for it that is public in all releases: BadParameter ← UsageError ← ClickException.
_WrongOptions: Any = typer.BadParameter.__mro__[2]


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    _debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    _show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: OutputOption = Path("demo-output"),
    sparsity: Annotated[float, typer.Option(help="Share of zeros.")] = 0.5,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prune the embedded model with our modifiers and the stock ones, save, reload and compare."""
    from sinkprune_plugin.commands.demo import run_demo

    run_demo(output, sparsity=sparsity, seed=seed, overwrite=overwrite, verbose=verbose)


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Model directory or hub name.")],
    recipe: Annotated[Path, typer.Option(help="YAML recipe.")],
    output: OutputOption,
    dataset: DatasetOption = None,
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    seq_len: SeqLenOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help=BATCH_SIZE)] = 1,
    overwrite: OverwriteOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prune a model with a recipe, through llm-compressor's oneshot()."""
    from sinkprune_plugin.commands.prune import prune as run

    path = run(
        model,
        recipe,
        output,
        dataset=dataset,
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        batch_size=batch_size,
        overwrite=overwrite,
        verbose=verbose,
    )
    typer.echo(f"pruned model written to {path}")


@app.command()
def sinks(
    model: Annotated[str, typer.Argument(help="Model directory or hub name; a diffusion LM or any other.")],
    output: OutputOption,
    dataset: DatasetOption = None,
    num_samples: Annotated[int, typer.Option(help="Text windows to look at.")] = 8,
    seq_len: SeqLenOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    batch_size: Annotated[int | None, typer.Option(min=1, help=BATCH_SIZE)] = None,
    overwrite: OverwriteOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure where attention sinks are over the denoising steps: numbers and a plot, no pruning."""
    from sinkprune_plugin.commands.sinks import measure_sinks

    measure_sinks(
        model,
        output,
        dataset=dataset,
        num_samples=num_samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        batch_size=batch_size,
        overwrite=overwrite,
        verbose=verbose,
    )


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(help="Checkpoint directory, dense or sparse.")],
    to: Annotated[str, typer.Option("--to", help="dense, sparse-bitmask, sparse-24-bitmask or auto.")],
    output: OutputOption,
    layout: Annotated[
        str, typer.Option(help="sinkprune, or legacy for compressed-tensors 0.9 to 0.14 and vLLM up to 0.18.")
    ] = "sinkprune",
    overwrite: OverwriteOption = False,
) -> None:
    """Write a checkpoint again in another format, one tensor in memory at a time."""
    from sinkprune_plugin.formats import convert_checkpoint

    written = convert_checkpoint(path, output, to, layout=layout, overwrite=overwrite)
    for note in written.notes:
        typer.echo(note)
    # A checkpoint may have no tensor at all.
    share = written.stored_bytes / (written.dense_bytes or 1)
    typer.echo(
        f"{written.format}: {written.stored_bytes / 1e6:.2f} MB, {share:.4f} of dense, written to {written.directory}"
    )


@app.command()
def info(
    path: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show what is in a checkpoint: format, sparsity, size, who can load it."""
    from rich.console import Console

    from sinkprune_plugin.inspection.info import inspect_checkpoint
    from sinkprune_plugin.inspection.table import print_info

    found = inspect_checkpoint(path)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        print_info(found, Console())


@app.command()
def verify(
    dense: Annotated[Path, typer.Argument(help="Directory of the dense checkpoint.")],
    pruned: Annotated[Path, typer.Argument(help="Directory of the checkpoint pruned from it, dense or sparse.")],
    output: OutputOption,
    backend: Annotated[str, typer.Option(help="What times generation: transformers or vllm.")] = "transformers",
    dataset: DatasetOption = None,
    seq_len: SeqLenOption = None,
    seed: SeedOption = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer windows, shorter runs, wider intervals.")] = False,
    ar_model: Annotated[str | None, typer.Option(help="An autoregressive model whose sinks are shown too.")] = None,
    recovered: Annotated[
        Path | None, typer.Option(help="A model recovered from the pruned one, as a third column.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; default: each checkpoint's own.")] = None,
    max_ppl_increase: Annotated[float | None, typer.Option(help="Fail above this increase, in percent.")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Fail below this share of equal tokens, 0 to 1.")] = None,
    max_size_ratio: Annotated[float | None, typer.Option(help="Fail above this share of the dense size.")] = None,
    min_speedup: Annotated[
        float | None, typer.Option(help="Fail unless this ratio to the dense speed is certain (low end of interval).")
    ] = None,
    peak_memory: Annotated[
        bool, typer.Option("--peak-memory", help="Load each model in a process of its own to see the most it takes.")
    ] = False,
    device: DeviceOption = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help=BATCH_SIZE)] = 8,
    overwrite: OverwriteOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare a pruned model with the dense one: quality, size, speed, sinks; a report, and limits to meet."""
    from rich.console import Console

    from sinkprune_plugin.steps import quiet_steps
    from sinkprune_plugin.verification.bars import Bars
    from sinkprune_plugin.verification.report import print_report
    from sinkprune_plugin.verification.verify import VerifyOptions
    from sinkprune_plugin.verification.verify import verify as run

    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UsageError(f"dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
    options = VerifyOptions(
        backend=backend,  # type: ignore[arg-type]
        dataset=dataset,
        seq_len=seq_len,
        seed=seed,
        quick=quick,
        ar_model=ar_model,
        recovered=recovered,
        bars=Bars(max_ppl_increase, min_agreement, max_size_ratio, min_speedup),
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        peak_memory=peak_memory,
    )
    with quiet_steps(verbose=verbose) as steps, steps.step(f"comparing {pruned} with {dense}"):
        report = run(dense, pruned, output, options, overwrite=overwrite)
    print_report(report, Console())
    typer.echo(f"report.html, report.json and plots are in {output}")
    if not report["passed"]:
        raise typer.Exit(1)


@app.command()
def recover(
    dense: Annotated[Path, typer.Argument(help="Directory of the dense model, the teacher.")],
    pruned: Annotated[Path, typer.Argument(help="Directory of the model pruned from it.")],
    output: OutputOption,
    dataset: DatasetOption = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; default: 300.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on, instead of steps.")] = None,
    method: Annotated[str, typer.Option(help="distill, elbo (text alone) or blockwise (little memory).")] = "distill",
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a window; default: at most 1024.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of a step, over all processes.")] = 8,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows in a forward pass; default: all.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak; warms up over a tenth, then falls linearly.")] = 6e-4,
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 1.0,
    elbo_share: Annotated[float, typer.Option(help="Share of the text's own loss, 0 to 1.")] = 0.0,
    train: Annotated[str, typer.Option(help="weights, weights-and-norms or lora.")] = "weights",
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    teacher_top_k: Annotated[
        int, typer.Option(help="Keep so many predictions a token on disk, and no teacher in memory.")
    ] = 0,
    evaluations: Annotated[int, typer.Option(min=1, help="How often the held-out text is looked at.")] = 10,
    patience: Annotated[int, typer.Option(min=0, help="Stop after so many without a new best; 0: never.")] = 3,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16, of the products.")] = "auto",
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Split the model over the processes of torchrun.")] = False,
    seed: SeedOption = 0,
    device: Annotated[str, typer.Option(help="auto or cpu.")] = "auto",
    tensorboard: Annotated[Path | None, typer.Option(help="Directory for TensorBoard's files.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: OverwriteOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a pruned model a little on its fixed zeros, toward the dense model: closes part of the distance."""
    from sinkprune_plugin.commands.recover import recover_model
    from sinkprune_plugin.recovery.options import RecoveryOptions

    options = RecoveryOptions(
        method=method,  # type: ignore[arg-type]
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        learning_rate=learning_rate,
        temperature=temperature,
        elbo_share=elbo_share,
        train=train,  # type: ignore[arg-type]
        lora_rank=lora_rank,
        teacher_top_k=teacher_top_k,
        evaluations=evaluations,
        patience=patience,
        gradient_checkpointing=gradient_checkpointing,
        precision=precision,  # type: ignore[arg-type]
        seed=seed,
    )
    result = recover_model(
        dense,
        pruned,
        output,
        options=options,
        steps=steps,
        tokens=tokens,
        dataset=dataset,
        seq_len=seq_len,
        device=device,
        fsdp=fsdp,
        resume=resume,
        overwrite=overwrite,
        tensorboard=tensorboard,
        verbose=verbose,
    )
    if result.directory is not None and os.environ.get("RANK", "0") == "0":
        typer.echo(f"recovered model written to {result.directory}")
    if result.stopped_because is not None:
        raise typer.Exit(1)


# What follows DIR isn't parsed here: options of vLLM may have the names of ours.
@app.command(context_settings={"allow_interspersed_args": False})
def serve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint directory, dense or sparse.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="VLLM_OPTIONS", help="Options of `vllm serve`; DIR --help lists them."),
    ] = None,
) -> None:
    """Serve a checkpoint with vLLM: `vllm serve`, also, slowly, on a machine without a GPU. Ctrl-C ends it.

    Everything after DIR goes to `vllm serve` as it is: sinkprune serve DIR --port 8001 --served-model-name tiny
    """
    from sinkprune_plugin.commands.serve import serve as run

    raise typer.Exit(run(directory, options or []))


def _one_line(error: UsageError | ValidationError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error" and isinstance(first["input"], int | float | str):
            text += f", not {first['input']!r:.100}"
        return f"{error.title}: {field + ': ' if field else ''}{text}"
    return " ".join(str(error).split())


def main() -> None:
    """Run the command line."""
    debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that isn't text, or a terminal without Unicode, is no reason to lose a result.
            stream.reconfigure(errors="backslashreplace")
    try:
        # Outside its standalone mode click returns the code of an Exit instead of exiting.
        sys.exit(app(standalone_mode=False))
    except (UsageError, ValidationError) as error:
        if debug:
            raise
        sys.stderr.write(f"sinkprune: {_one_line(error)}\n")
        sys.exit(2)
    except OSError as error:
        # A name that is too long, no permission, a disk that fails.
        if debug:
            raise
        sys.stderr.write(f"sinkprune: {short(error.filename or 'the system')}: {error.strerror or error}\n")
        sys.exit(2)
    except _WrongOptions as error:
        # Without a command typer has printed the help already and raises an error that says nothing.
        if error.format_message():
            sys.stderr.write(f"sinkprune: {error.format_message()}\n")
        sys.exit(2)
    except RuntimeError as error:
        # By its name: torch isn't imported just because of a wrong option.
        if debug or type(error).__name__ != "OutOfMemoryError":
            raise
        said = str(error).split(". ")[0]
        sys.stderr.write(f"sinkprune: {said}; use a smaller --batch-size, a shorter --seq-len, or --device cpu\n")
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("sinkprune: interrupted; nothing was written\n")
        sys.exit(130)

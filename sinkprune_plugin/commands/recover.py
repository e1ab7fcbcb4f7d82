"""`sinkprune recover`: a short training of a pruned model, from two checkpoints on disk to a third."""

import contextlib
import importlib.util
import math
import os
from pathlib import Path

from sinkprune_plugin.devices import choose_device
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.inputs import check_checkpoint, training_windows
from sinkprune_plugin.loading import default_sequence_length, load_config, load_tokenizer
from sinkprune_plugin.recovery.options import RecoveryOptions
from sinkprune_plugin.recovery.recover import Recovered, recover
from sinkprune_plugin.steps import Steps, quiet_steps
from sinkprune_plugin.verification.compatibility import check_pair

__all__ = ["recover_model", "steps_of"]

# Longer windows cost more than they add; LLaDA's maximum is 4096, Dream's 131072.
LONGEST_DEFAULT = 1024


def steps_of(steps: int | None, tokens: int | None, batch_size: int, seq_len: int, default: int) -> int:
    """Optimiser steps of a run.

    :param steps: as asked for
    :param tokens: tokens asked for instead
    :param batch_size: windows of a step
    :param seq_len: tokens of a window
    :param default: steps if neither was given
    :return: steps, so many that at least ``tokens`` tokens are seen
    :raises UsageError: if both were given, or a number isn't positive
    """
    if steps is not None and tokens is not None:
        raise UsageError(f"--steps {steps} and --tokens {tokens} say the same thing; give one of them")
    if tokens is None:
        return default if steps is None else steps
    if tokens < 1:
        raise UsageError(f"--tokens is {tokens}; it must be at least 1")
    return math.ceil(tokens / (batch_size * seq_len))


def recover_model(
    dense: Path,
    pruned: Path,
    output: Path,
    *,
    options: RecoveryOptions,
    steps: int | None = None,
    tokens: int | None = None,
    dataset: str | None = None,
    seq_len: int | None = None,
    device: str = "auto",
    fsdp: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: Path | None = None,
    verbose: bool = False,
) -> Recovered:
    """Recover a pruned model and save it.

    :param dense: checkpoint directory of the dense model
    :param pruned: checkpoint directory pruned from it
    :param output: directory to write
    :param options: what to do; its ``steps`` are those given here
    :param steps: optimiser steps
    :param tokens: tokens to train on, instead of steps
    :param dataset: text file, JSON-lines file or saved dataset; None takes the embedded calibration text
    :param seq_len: tokens in a window; None takes the model's maximum, at most 1024
    :param device: ``auto`` or ``cpu``; which GPUs there are is said by CUDA_VISIBLE_DEVICES
    :param fsdp: split the model over the processes
    :param resume: go on with an interrupted run
    :param overwrite: replace an existing output
    :param tensorboard: directory for TensorBoard's files
    :param verbose: show what the libraries say and their progress bars
    :return: what came out
    :raises UsageError: on wrong input; nothing is written then
    """
    if device not in ("auto", "cpu"):
        raise UsageError(
            f"device {device!r} can't be chosen here; use auto or cpu, and CUDA_VISIBLE_DEVICES to choose among GPUs"
        )
    if options.method == "blockwise":
        for name, value in (("--resume", resume), ("--fsdp", fsdp), ("--tensorboard", tensorboard)):
            if value:
                raise UsageError(f"{name} belongs to methods distill and elbo, not blockwise; leave it out")
    _check_places(dense, pruned, output)
    use_cpu = choose_device(device).type == "cpu"
    if tensorboard is not None:
        _require_tensorboard()
    for path in (dense, pruned):
        if not check_checkpoint(path):
            raise UsageError(f"{path} isn't a directory with safetensors; recovery needs both models on disk")
    config, tokenizer = load_config(dense), load_tokenizer(dense)
    spec = check_pair(dense, pruned, config, tokenizer)
    length = seq_len if seq_len is not None else default_sequence_length(config, LONGEST_DEFAULT)
    count = steps_of(steps, tokens, options.batch_size, length, options.steps)
    options = RecoveryOptions(**(options.model_dump() | {"steps": count}))
    windows = training_windows(
        config, tokenizer, dataset, length=length, most=count * options.batch_size, seed=options.seed
    )
    with quiet_steps(verbose=verbose) as shown:
        # Several processes do this together; one of them speaks.
        main = os.environ.get("RANK", "0") == "0"
        title = f"recovering {pruned}: {count} steps of {options.batch_size} × {length} tokens"
        with shown.step(title) if main else contextlib.nullcontext():
            result = recover(
                dense,
                pruned,
                output,
                windows,
                spec,
                options,
                use_cpu=use_cpu,
                fsdp=fsdp,
                resume=resume,
                overwrite=overwrite,
                tensorboard=tensorboard,
            )
        if main:
            _report(result, shown)
    return result


def _report(result: Recovered, shown: Steps) -> None:
    before, after = result.held_out_before, result.held_out_after
    if result.directory is None:
        shown.note(f"nothing was written: {result.stopped_because}")
        return
    shown.note(
        f"held-out loss {before:.4f} before, {after:.4f} after {result.best_step} of {result.steps} steps, "
        f"{result.seconds:.0f} s"
    )
    if result.stopped_because is not None:
        shown.note(f"stopped: {result.stopped_because}; the best state before was kept")


def _check_places(dense: Path, pruned: Path, output: Path) -> None:
    if dense.resolve() == pruned.resolve():
        raise UsageError(f"{dense} is given as the dense and as the pruned model; name both")
    for path in (dense, pruned):
        # The dense weights may be read until the end, and the pruned ones may be wanted for comparison.
        if output.resolve() == path.resolve():
            raise UsageError(f"output {output} is one of the two models that are read; choose another directory")


def _require_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs the package tensorboard; install sinkprune-plugin[recover]")

"""Recovery from end to end: two checkpoints and windows of text in, a recovered checkpoint out."""

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sinkprune_plugin.diffusion import DiffusionSpec
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import CheckpointReader
from sinkprune_plugin.loading import load_model
from sinkprune_plugin.models.decoder_blocks import block_linears, find_decoder_blocks
from sinkprune_plugin.outputs import check_output, new_directory
from sinkprune_plugin.recovery.fixed_zeros import FixedZeros
from sinkprune_plugin.recovery.loss_curve import CURVE_FOLDER, write_curve
from sinkprune_plugin.recovery.noisy_windows import NoisyWindows, split_windows
from sinkprune_plugin.recovery.options import RecoveryOptions
from sinkprune_plugin.recovery.result import check_recoverable, write_result
from sinkprune_plugin.recovery.teacher import LiveTeacher, StoredTeacher, Teacher, store_predictions, stored_bytes
from sinkprune_plugin.recovery.unfinished_run import UnfinishedRun, fingerprint

__all__ = ["Recovered", "recover"]


@dataclass(frozen=True)
class Recovered:
    """What came out.

    :param directory: of the recovered model; None if nothing was written
    :param best_step: optimiser steps of the state that was chosen
    :param steps: optimiser steps that were made
    :param held_out_before: loss on the held-out windows before training, nats per token; with method blockwise the
        relative error of the blocks' outputs
    :param held_out_after: the same of the chosen state
    :param stopped_because: why it went wrong; None if it didn't
    :param seconds: time taken, without loading
    """

    directory: Path | None
    best_step: int
    steps: int
    held_out_before: float
    held_out_after: float
    stopped_because: str | None
    seconds: float


def recover(
    dense: Path,
    pruned: Path,
    output: Path,
    windows: torch.Tensor,
    spec: DiffusionSpec,
    options: RecoveryOptions | None = None,
    *,
    use_cpu: bool = False,
    fsdp: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: Path | None = None,
    after_evaluation: Callable[[int, float, torch.nn.Module], None] | None = None,
) -> Recovered:
    """Train a pruned model on fixed zeros and write the best state, in the format of the pruned checkpoint.

    Run by several processes (torchrun, accelerate launch), each trains on its share of every batch.

    :param dense: checkpoint directory of the dense model, the teacher
    :param pruned: checkpoint directory pruned from it
    :param output: directory to write; while the training lasts, its states are in ``OUTPUT.unfinished``
    :param windows: (N, T) int64 token ids of text
    :param spec: the models' diffusion spec
    :param options: what to do
    :param use_cpu: leave an accelerator alone
    :param fsdp: split weights, gradients and optimiser states over the processes (PyTorch FSDP)
    :param resume: go on with an interrupted run of the same settings
    :param overwrite: replace an existing output
    :param tensorboard: directory for TensorBoard's files
    :param after_evaluation: called with the step, the held-out loss and the model each time the held-out windows have
        been looked at, the first time before any training; not with ``blockwise``
    :return: what came out; nothing is written where no state was better than the pruned model
    :raises UsageError: on wrong input, or a full disk; states that were saved before stay
    """
    options = options or RecoveryOptions()
    reader = check_recoverable(pruned)
    if options.method == "blockwise":
        return _recover_blockwise(dense, pruned, output, windows, spec, options, reader, use_cpu, overwrite)
    training, held_out = split_windows(
        windows,
        spec,
        held_out=options.held_out,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    run = UnfinishedRun(output)
    check_output(output, overwrite=overwrite)
    # Imports of accelerate and the Trainer take seconds; wrong input is found before.
    from sinkprune_plugin.recovery.training_arguments import training_arguments

    arguments = training_arguments(run.states, options, use_cpu=use_cpu, fsdp=fsdp)
    main = arguments.process_index == 0
    settings = _settings(dense, pruned, windows, options)
    with arguments.main_process_first(desc="looking for an interrupted run"):
        state = run.begin(settings, resume=resume or not main, overwrite=overwrite)
    check_output(run.directory, overwrite=True, needed_bytes=_needed_bytes(reader, training, held_out, options))
    started = time.monotonic()
    student, zeros = _student(pruned, reader, options, arguments)
    teachers = _teachers(dense, spec, training, held_out, options, run, arguments)
    from sinkprune_plugin.recovery.trainer import AfterEvaluation, RecoveryTrainer

    trainer = RecoveryTrainer(
        student,
        zeros,
        spec,
        options,
        training=training,
        held_out=held_out,
        teachers=teachers,
        arguments=arguments,
        tensorboard=tensorboard,
    )
    if after_evaluation is not None:
        trainer.add_callback(AfterEvaluation(after_evaluation))
    arguments.eval_on_start = state is None
    try:
        trainer.train(resume_from_checkpoint=None if state is None else str(state))
    except (OSError, SafetensorError) as error:
        if "space" not in str(error) and getattr(error, "errno", None) is None:
            raise
        raise UsageError(
            f"a state couldn't be saved in {run.states}: {error}; free some space and go on with --resume"
        ) from error
    return _finish(trainer, reader, zeros, output, run, settings, overwrite, time.monotonic() - started)


def _recover_blockwise(
    dense: Path,
    pruned: Path,
    output: Path,
    windows: torch.Tensor,
    spec: DiffusionSpec,
    options: RecoveryOptions,
    reader: CheckpointReader,
    use_cpu: bool,
    overwrite: bool,
) -> Recovered:
    from sinkprune_plugin.recovery.blockwise import fit_student

    check_output(output, overwrite=overwrite)
    started = time.monotonic()
    # Masters are float32 in any case, so the model may wait in its own precision.
    student = load_model(pruned, "auto")
    zeros = _fixed_zeros(student, pruned)
    with new_directory(output, overwrite=overwrite) as directory:
        blocks = fit_student(student, dense, windows, spec, options, use_cpu=use_cpu)
        seconds = time.monotonic() - started
        values = {name: tensor for name, tensor in student.state_dict().items() if name in reader}
        settings = _settings(dense, pruned, windows, options)
        write_result(reader, values, zeros, directory, recovery=settings, blocks=blocks)
        (directory / CURVE_FOLDER).mkdir()
        summary = {"dense": settings["dense"], "pruned": settings["pruned"], "seconds": round(seconds, 1)}
        (directory / CURVE_FOLDER / "recovery.json").write_text(
            json.dumps(summary | {"options": settings["options"], "blocks": blocks}, indent=1) + "\n", encoding="utf-8"
        )
    steps = max(block["kept_step"] for block in blocks)
    before, after = (sum(block[key] for block in blocks) / len(blocks) for key in ("before", "after"))
    return Recovered(output, steps, options.steps, before, after, None, seconds)


def _finish(
    trainer: Any,
    reader: CheckpointReader,
    zeros: FixedZeros,
    output: Path,
    run: UnfinishedRun,
    settings: dict[str, Any],
    overwrite: bool,
    seconds: float,
) -> Recovered:
    history = trainer.state.log_history
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    before = losses[min(losses)]
    best = trainer.state.best_metric
    if best is None or not best < before:
        reason = trainer.stopped_because or (
            f"no state was better on the held-out windows than the pruned model ({before:.4f} nats per token)"
        )
        return Recovered(None, 0, trainer.state.global_step, before, before, reason, seconds)
    best_step = trainer.state.best_global_step
    # All processes gather the weights; one writes.
    values = _trained_weights(trainer, reader)
    result = Recovered(output, best_step, trainer.state.global_step, before, best, trainer.stopped_because, seconds)
    if trainer.is_world_process_zero():
        with new_directory(output, overwrite=overwrite) as directory:
            write_result(reader, values, zeros, directory, recovery=settings)
            summary = {
                "dense": settings["dense"],
                "pruned": settings["pruned"],
                "best_step": best_step,
                "steps": result.steps,
                "held_out_loss_before": before,
                "held_out_loss_after": best,
                "seconds": round(seconds, 1),
                "stopped_because": result.stopped_because or "all steps made, or no more progress",
            }
            write_curve(directory, history, summary | settings["options"])
        run.remove()
    trainer.accelerator.wait_for_everyone()
    return result


def _settings(dense: Path, pruned: Path, windows: torch.Tensor, options: RecoveryOptions) -> dict[str, Any]:
    return {
        "dense": dense.resolve().name,
        "pruned": pruned.resolve().name,
        "options": options.model_dump(),
        "windows": list(windows.shape),
        "text": fingerprint(windows),
    }


def _needed_bytes(
    reader: CheckpointReader, training: NoisyWindows, held_out: NoisyWindows, options: RecoveryOptions
) -> int:
    """Of two states: all weights in float32, and two moments of AdamW for each; and of the predictions."""
    weights = sum(math.prod(reader.spec(name).shape) for name in reader)
    states = 2 * (12 if options.train != "lora" else 1) * weights
    return states + sum(stored_bytes(each, options.teacher_top_k) for each in (training, held_out))


def _student(
    pruned: Path, reader: CheckpointReader, options: RecoveryOptions, arguments: Any
) -> tuple[Any, FixedZeros]:
    lora = options.train == "lora"
    # Updates of a few in ten thousand vanish in bfloat16: what is trained is float32.
    student: Any = load_model(pruned, "auto" if lora and not arguments.use_cpu else torch.float32)
    zeros = _fixed_zeros(student, pruned)
    student.requires_grad_(requires_grad=False)
    if lora:
        from sinkprune_plugin.recovery.masked_lora import add_adapters

        return add_adapters(student, options.lora_rank, options.seed), zeros
    for module in block_linears(student).values():
        module.requires_grad_(requires_grad=True)
    if options.train == "weights-and-norms":
        for name, parameter in find_decoder_blocks(student)[1].named_parameters():
            if parameter.dim() == 1 and "norm" in name:
                parameter.requires_grad = True
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and name not in reader:
            raise UsageError(
                f"{name} isn't stored under its own name in {pruned}, so it can't be written again; this model can't "
                "be recovered"
            )
    return student, zeros


def _fixed_zeros(student: Any, pruned: Path) -> FixedZeros:
    zeros = FixedZeros(student)
    if not zeros.zeros:
        warnings.warn(
            f"{pruned} has no zeros in its decoder blocks, so there are none to keep and all their weights are "
            "trained; if it isn't a smaller model without units or experts, check that the dense model comes first",
            stacklevel=2,
        )
    return zeros


def _teachers(
    dense: Path,
    spec: DiffusionSpec,
    training: NoisyWindows,
    held_out: NoisyWindows,
    options: RecoveryOptions,
    run: UnfinishedRun,
    arguments: Any,
) -> tuple[Teacher, Teacher] | None:
    if options.effective_elbo_share == 1.0:
        return None
    places = run.predictions / "training", run.predictions / "held-out"
    if options.teacher_top_k == 0:
        teacher = LiveTeacher(load_model(dense, "auto", arguments.device), spec)
        return teacher, teacher
    with arguments.main_process_first(desc="predictions of the dense model"):
        if arguments.process_index == 0:
            model = load_model(dense, "auto", arguments.device)
            for draws, place in zip((training, held_out), places, strict=True):
                store_predictions(
                    model,
                    draws,
                    spec,
                    place,
                    top_k=options.teacher_top_k,
                    batch_size=options.micro_batch_size or options.batch_size,
                )
    return StoredTeacher(places[0]), StoredTeacher(places[1])


def _trained_weights(trainer: Any, reader: CheckpointReader) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        from sinkprune_plugin.recovery.masked_lora import merge_adapters

        model = merge_adapters(model)
        trained = {f"{name}.weight" for name in block_linears(model)}
    else:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else model.state_dict()
    return {name: tensor for name, tensor in state.items() if name in trained and name in reader}

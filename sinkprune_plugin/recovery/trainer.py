"""transformers' Trainer with our loss, our fixed zeros and one line of progress."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from sinkprune_plugin.diffusion import (
    DiffusionSpec,
    divergence,
    elbo_weights,
    negative_log_likelihood,
    noisy_inputs,
    predict_noisy,
    predictions,
)
from sinkprune_plugin.formats import CheckpointReader
from sinkprune_plugin.recovery.fixed_zeros import FixedZeros
from sinkprune_plugin.recovery.noisy_windows import NoisyWindows, batch_of
from sinkprune_plugin.recovery.options import RecoveryOptions
from sinkprune_plugin.recovery.teacher import Teacher

__all__ = ["AfterEvaluation", "KeepZeros", "RecoveryTrainer", "weighted_loss"]

# A held-out loss that is this many times the one before training will not come back.
DIVERGED = 2.0


def weighted_loss(
    logits: torch.Tensor,
    batch: Mapping[str, torch.Tensor],
    spec: DiffusionSpec,
    options: RecoveryOptions,
    teacher: Teacher | None,
) -> torch.Tensor:
    """The loss of a batch, in nats per token: (1 − α) KL(teacher ‖ student) + α (−log p), each corrupted token weighted
    by the ELBO's bounded 1/t. Divided by all tokens, not by the corrupted ones, whose number is part of the estimate.

    :param logits: (B, T, V) of the student
    :param batch: a batch of draws
    :param spec: the model's diffusion spec
    :param options: temperature, α, bound
    :param teacher: predictions of the dense model; not needed for α = 1
    :return: () float32
    """
    chosen = predictions(logits, batch["corrupted"], spec)
    share = options.effective_elbo_share
    losses = chosen.new_zeros(len(chosen), dtype=torch.float32)
    if share < 1.0:
        assert teacher is not None  # the caller loads one for distill
        losses = losses + (1.0 - share) * divergence(chosen, teacher(batch), options.temperature)
    if share > 0.0:
        losses = losses + share * negative_log_likelihood(chosen, batch["clean"][batch["corrupted"]])
    weights = elbo_weights(batch["corrupted"], batch["p_mask"], options.weight_bound)
    return (weights.to(losses.device) * losses).sum() / batch["corrupted"].numel()


class RecoveryTrainer(Trainer):
    """Trains a student on draws of noisy windows.

    :param student: pruned model, its trained weights in float32
    :param zeros: its zeros
    :param spec: its diffusion spec
    :param options: what to do
    :param training: draws to train on
    :param held_out: draws to check with
    :param teachers: for the training draws and for the held-out ones
    :param arguments: of the Trainer
    :param tensorboard: directory for TensorBoard's files, or None
    """

    def __init__(
        self,
        student: Any,
        zeros: FixedZeros,
        spec: DiffusionSpec,
        options: RecoveryOptions,
        *,
        training: NoisyWindows,
        held_out: NoisyWindows,
        teachers: tuple[Teacher, Teacher] | None,
        arguments: TrainingArguments,
        tensorboard: Path | None = None,
    ) -> None:
        self._spec, self._options = spec, options
        self._teachers = teachers
        self.stopped_because: str | None = None
        callbacks: list[TrainerCallback] = [
            KeepZeros(zeros, trained=options.train != "lora"),
            _StopWhenDiverging(self),
            _Progress(),
        ]
        if options.patience:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=options.patience))
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter
            from transformers.integrations import TensorBoardCallback

            callbacks.append(TensorBoardCallback(SummaryWriter(str(tensorboard))))
        super().__init__(
            model=student,
            args=arguments,
            data_collator=batch_of,
            train_dataset=training,
            eval_dataset=held_out,
            callbacks=callbacks,
        )
        for shown_otherwise in (PrinterCallback, ProgressCallback):
            self.remove_callback(shown_otherwise)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """See the base class; the loss is :func:`weighted_loss`."""
        noisy = noisy_inputs(inputs["input_ids"], inputs["clean"], self._spec)
        logits = predict_noisy(model, noisy, inputs["input_ids"].device)
        teacher = None if self._teachers is None else self._teachers[0 if model.training else 1]
        loss = weighted_loss(logits, inputs, self._spec, self._options, teacher)
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: ARG002
        ignore_keys: list[str] | None = None,  # noqa: ARG002
    ) -> tuple[torch.Tensor, None, None]:
        """See the base class; only the loss is wanted."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None


class KeepZeros(TrainerCallback):
    """Restores the zeros after each step, and checks every state that is saved.

    :param zeros: zeros of the student
    :param trained: whether its weights are trained; adapters leave them as they are
    """

    def __init__(self, zeros: FixedZeros, *, trained: bool) -> None:
        self._zeros = zeros
        self._in_danger = trained and zeros.zeros > 0
        self._restore: Callable[[], None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Mask the gradients; see the base class."""
        self._restore = self._zeros.attach(model) if self._in_danger else None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Restore the zeros; see the base class."""
        if self._restore is not None:
            self._restore()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Check the state; see the base class."""
        # Whole models are saved, in several files where one would be too large.
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._in_danger and state.is_world_process_zero:
            self._zeros.require(CheckpointReader(saved), str(saved))


class AfterEvaluation(TrainerCallback):
    """Hands the model over each time the held-out windows have been looked at.

    :param receive: called with the step, the held-out loss and the model
    """

    def __init__(self, receive: Callable[[int, float, torch.nn.Module], None]) -> None:
        self._receive = receive

    def on_evaluate(
        self,
        args: Any,  # noqa: ARG002
        state: Any,
        control: Any,  # noqa: ARG002
        *,
        model: Any,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """See the base class."""
        self._receive(state.global_step, metrics["eval_loss"], model)


class _StopWhenDiverging(TrainerCallback):
    """Stops at the first loss that isn't finite, or when the held-out loss is far beyond that before training."""

    def __init__(self, trainer: RecoveryTrainer) -> None:
        self._trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:  # noqa: ARG002
        loss, held_out = logs.get("loss"), logs.get("eval_loss")
        before = next((entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry), None)
        if loss is not None and not math.isfinite(loss):
            self._stop(control, f"the loss is {loss} at step {state.global_step}")
        elif held_out is not None and not math.isfinite(held_out):
            self._stop(control, f"the held-out loss is {held_out} at step {state.global_step}")
        elif held_out is not None and before is not None and held_out > DIVERGED * before > 0:
            self._stop(
                control,
                f"the held-out loss is {held_out:.3g} at step {state.global_step}, {held_out / before:.1f} times that "
                "before training",
            )

    def _stop(self, control: Any, reason: str) -> None:
        self._trainer.stopped_because = reason
        control.should_training_stop = True


class _Progress(TrainerCallback):
    """One bar with the losses, on the process that reports."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc="recovery", unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:  # noqa: ARG002
        names = {"loss": "loss", "eval_loss": "held out"}
        self._shown |= {title: f"{logs[key]:.3f}" for key, title in names.items() if key in logs}
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self._bar is not None:
            self._bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self._bar is not None:
            self._bar.close()

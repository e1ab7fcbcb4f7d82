"""Our options as the Trainer's arguments."""

import math
from pathlib import Path

import torch
from transformers import TrainingArguments

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.recovery.options import RecoveryOptions

__all__ = ["training_arguments"]

# The block classes to split are those that the models name themselves.
_FSDP = {"fsdp_version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}


def training_arguments(states: Path, options: RecoveryOptions, *, use_cpu: bool, fsdp: bool) -> TrainingArguments:
    """Translate options.

    :param states: where the states go
    :param options: what to do
    :param use_cpu: leave an accelerator alone
    :param fsdp: split the model over the processes
    :return: the Trainer's arguments
    :raises UsageError: if the batch can't be split as asked for, or there is no GPU to split the model over
    """
    if fsdp and (use_cpu or not torch.cuda.is_available()):
        raise UsageError("fsdp splits a model over GPUs and there is none; leave it out")
    every = math.ceil(options.steps / options.evaluations)
    arguments = TrainingArguments(
        output_dir=str(states),
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(options.warmup * options.steps),
        weight_decay=options.weight_decay,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=_bfloat16(options, use_cpu),
        use_cpu=use_cpu,
        fsdp=True if fsdp else None,
        # Whole weights in the saved states, in which the zeros are checked.
        fsdp_config=dict(_FSDP) if fsdp else None,
        # Every step is logged: the curve is a result, and a loss that isn't finite ends the run at once.
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        prediction_loss_only=True,
        remove_unused_columns=False,
        # The draws are shuffled already, in a way that resuming and several processes don't change.
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
        seed=options.seed,
    )
    # Several GPUs in one process would be nn.DataParallel, which copies the model in each step. torchrun starts one
    # process for each.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    processes = arguments.world_size
    share, rest = divmod(options.batch_size, processes)
    if rest:
        raise UsageError(f"batch size {options.batch_size} can't be split over {processes} processes; use a multiple")
    micro = options.micro_batch_size or share
    if share % micro:
        raise UsageError(
            f"batch size {options.batch_size} over {processes} processes gives {share} windows to each, which micro "
            f"batches of {micro} don't fill; use a divisor"
        )
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = micro
    arguments.gradient_accumulation_steps = share // micro
    return arguments


def _bfloat16(options: RecoveryOptions, use_cpu: bool) -> bool:
    if options.precision == "auto":
        return not use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return options.precision == "bfloat16"

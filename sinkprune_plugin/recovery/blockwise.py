"""Recovery block by block: each block fits the dense block's output, with the memory of one block."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.devices import choose_device
from sinkprune_plugin.diffusion import DiffusionSpec, timestep_grid
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import CheckpointReader
from sinkprune_plugin.loading import load_config
from sinkprune_plugin.models.decoder_blocks import block_linears, find_decoder_blocks
from sinkprune_plugin.recovery.noisy_windows import NOISE_EPS
from sinkprune_plugin.recovery.options import RecoveryOptions

__all__ = ["fit_student"]

# Noise levels of each window, and how often each of its passes is trained on.
TIMESTEPS, EPOCHS = 4, 2


def fit_student(
    student: Any,
    dense: Path,
    windows: torch.Tensor,
    spec: DiffusionSpec,
    options: RecoveryOptions,
    *,
    use_cpu: bool,
) -> list[dict[str, Any]]:
    """Fit the surviving weights of every block, in place, with zeros fixed.

    The model stays in main memory; one block at a time is on the device. As many windows are used as ``steps`` need at
    four noise levels and two epochs; with less text there are more epochs.

    :param student: pruned model, on CPU
    :param dense: checkpoint directory of the dense model, of which one block at a time is read
    :param windows: (N, T) int64
    :param spec: the models' diffusion spec
    :param options: steps for each block, batch size, learning rate, held-out share, seed
    :param use_cpu: leave an accelerator alone
    :return: for each block its relative error before and after, and its steps
    :raises UsageError: if several processes were started, or the text is too short
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            "method blockwise runs in one process here; for several use BlockwiseRecoveryModifier in a recipe, with "
            "oneshot() under torchrun"
        )
    # llm-compressor's part of the package, which takes seconds to import.
    from compressed_tensors.offload import remove_dispatch, set_onload_device

    from sinkprune_plugin.modifiers.block_recovery import fit_blocks
    from sinkprune_plugin.modifiers.calibration import CalibrationBatch
    from sinkprune_plugin.modifiers.trajectory import TrajectoryCorruption, corrupted_passes

    passes_wanted = options.steps * options.batch_size
    count = min(len(windows), math.ceil(passes_wanted / (TIMESTEPS * EPOCHS)))
    if count < 2:
        raise UsageError(f"the text gives {count} windows; blockwise recovery needs at least 2, one of them held out")
    batches = [CalibrationBatch(index, window[None], None) for index, window in enumerate(windows[:count])]
    grid = timestep_grid(TIMESTEPS, 1)
    passes = corrupted_passes(batches, grid, TrajectoryCorruption(spec, options.seed, NOISE_EPS))
    device = choose_device("cpu" if use_cpu else "auto")
    if device.type != "cpu":
        set_onload_device(student, device)
    results = fit_blocks(
        student,
        CheckpointReader(dense),
        passes,
        len(grid),
        _fit_options(options, count),
        dense_blocks=_dense_blocks(dense, student),
    )
    if device.type != "cpu":
        remove_dispatch(student)
    return [
        {"block": each.index, "before": each.before, "after": each.after, "kept_step": each.kept_step}
        for each in results
    ]


def _fit_options(options: RecoveryOptions, windows: int) -> Any:
    from sinkprune_plugin.modifiers.block_fit import FitOptions

    trained = max(1, windows - max(1, round(options.held_out * windows)))
    return FitOptions(
        epochs=max(1, math.ceil(options.steps * options.batch_size / (TIMESTEPS * trained))),
        learning_rate=options.learning_rate,
        warmup=options.warmup,
        step_windows=options.batch_size,
        held_out=options.held_out,
        evaluations=options.evaluations,
        patience=options.patience or options.evaluations,
        train_norms=options.train == "weights-and-norms",
        seed=options.seed,
    )


def _dense_blocks(dense: Path, student: Any) -> list[torch.nn.Module] | None:
    """The dense model's blocks without memory, where their shapes differ from the student's."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(dense), dtype=student.dtype)
    if _shapes(model) == _shapes(student):
        return None
    blocks = find_decoder_blocks(model)[1]
    if len(blocks) != len(find_decoder_blocks(student)[1]):
        raise UsageError(
            f"the dense model has {len(blocks)} decoder blocks and the pruned one "
            f"{len(find_decoder_blocks(student)[1])}, so blocks have no counterpart; use method distill"
        )
    return list(blocks)


def _shapes(model: Any) -> Mapping[str, torch.Size]:
    return {name: module.weight.shape for name, module in block_linears(model).items()}

"""Recovery block by block: each block fits the dense block's output, with the memory of one block."""

import math
import os
from pathlib import Path
from typing import Any

import torch

from sinkprune_plugin.devices import choose_device
from sinkprune_plugin.diffusion import DiffusionSpec, timestep_grid
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
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

    A block before others that were removed is fitted to the output of the last of these. The model stays in main
    memory; one block at a time is on the device. As many windows are used as ``steps`` need at four noise levels and
    two epochs; with less text there are more epochs.

    :param student: pruned model, on CPU
    :param dense: checkpoint directory of the dense model, of which one block at a time is read
    :param windows: (N, T) int64
    :param spec: the models' diffusion spec
    :param options: steps for each block, batch size, learning rate, held-out share, seed
    :param use_cpu: leave an accelerator alone
    :return: for each block its number, also among the dense ones, its relative error before and after, and its steps
    :raises UsageError: if several processes were started, the text is too short, or the models don't belong together
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            "method blockwise runs in one process here; for several use BlockwiseRecoveryModifier in a recipe, with "
            "oneshot() under torchrun"
        )
    # llm-compressor's part of the package, which takes seconds to import.
    from compressed_tensors.offload import remove_dispatch, set_onload_device

    from sinkprune_plugin.modifiers.block_origins import find_origins
    from sinkprune_plugin.modifiers.block_recovery import fit_blocks
    from sinkprune_plugin.modifiers.calibration import CalibrationBatch
    from sinkprune_plugin.modifiers.dense_weights import open_dense_model
    from sinkprune_plugin.modifiers.trajectory import TrajectoryCorruption, corrupted_passes

    passes_wanted = options.steps * options.batch_size
    count = min(len(windows), math.ceil(passes_wanted / (TIMESTEPS * EPOCHS)))
    if count < 2:
        raise UsageError(f"the text gives {count} windows; blockwise recovery needs at least 2, one of them held out")
    dense_weights, dense_blocks = open_dense_model(dense, student)
    name, blocks = find_decoder_blocks(student)
    origins = find_origins(name, blocks, dense_weights, len(dense_blocks))
    batches = [CalibrationBatch(index, window[None], None) for index, window in enumerate(windows[:count])]
    grid = timestep_grid(TIMESTEPS, 1)
    passes = corrupted_passes(batches, grid, TrajectoryCorruption(spec, options.seed, NOISE_EPS))
    device = choose_device("cpu" if use_cpu else "auto")
    if device.type != "cpu":
        set_onload_device(student, device)
    results = fit_blocks(
        student,
        dense_weights,
        passes,
        len(grid),
        _fit_options(options, count),
        dense_blocks=dense_blocks,
        origins=origins,
    )
    if device.type != "cpu":
        remove_dispatch(student)
    return [
        {
            "block": each.index,
            "dense_block": origins[each.index],
            "before": each.before,
            "after": each.after,
            "kept_step": each.kept_step,
        }
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

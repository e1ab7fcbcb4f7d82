"""llm-compressor's plain oneshot() on token windows; that it finds our modifiers is registration.py's work."""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from loguru import logger

__all__ = ["calibration_dataset", "log_to_stderr", "run_oneshot", "stock_modifier"]


def log_to_stderr(level: str) -> None:
    """Replace llm-compressor's log handler by a plain one, for a command line that people read.

    :param level: least level shown; the two METRIC lines a module are left out at any level
    """
    logger.remove()
    logger.add(
        sys.stderr,
        level=level,
        format="{time:HH:mm:ss} {level: <7} {message}",
        filter=lambda record: record["level"].name != "METRIC",
    )


def calibration_dataset(windows: torch.Tensor) -> Any:
    """Wrap token windows as the dataset that oneshot() takes.

    :param windows: (N, T) int64
    :return: ``datasets.Dataset`` with ``input_ids`` and ``attention_mask``
    """
    rows = windows.tolist()
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


def run_oneshot(model: Any, tokenizer: Any, recipe: Any, windows: torch.Tensor) -> None:
    """Run llm-compressor's oneshot() on token windows, in place.

    :param model: loaded model
    :param tokenizer: its tokenizer
    :param recipe: path of a YAML recipe, or modifier objects
    :param windows: (N, T) int64 calibration tokens
    """
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=calibration_dataset(windows),
        recipe=str(recipe) if isinstance(recipe, Path) else recipe,
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )


def stock_modifier(name: str, sparsity: float, mask_structure: str = "0:0") -> Any:
    """Make one of llm-compressor's own pruning modifiers, set up as for a fair comparison with ours.

    :param name: ``WandaPruningModifier`` or ``SparseGPTModifier``
    :param sparsity: share of zeros
    :param mask_structure: ``N:M``, or ``0:0`` for unstructured
    :return: a fresh modifier; decoder-block Linears only
    """
    modifier = {"WandaPruningModifier": WandaPruningModifier, "SparseGPTModifier": SparseGPTModifier}[name]
    # A pattern that reaches below the blocks: "Linear" with an ignored head would prune the head in 0.14, whose
    # matching adds a trailing dot to a target's own name.
    return modifier(sparsity=sparsity, mask_structure=mask_structure, targets=[r"re:.*\.(blocks|layers)\.\d+$"])

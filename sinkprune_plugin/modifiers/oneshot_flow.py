"""llm-compressor's plain oneshot() on token windows; that it finds our modifiers is registration.py's work."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.entrypoints import utils as oneshot_setup
from llmcompressor.logger import configure_logger
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.pipelines.data_free import pipeline as data_free_pipeline
from llmcompressor.pipelines.sequential import pipeline as sequential_pipeline
from llmcompressor.recipe import Recipe
from loguru import logger
from pydantic import ValidationError

from sinkprune_plugin.errors import UsageError, reason_of, short
from sinkprune_plugin.steps import Steps, is_noise

__all__ = ["calibration_dataset", "check_recipe", "log_to", "run_oneshot", "stock_modifier"]


@contextlib.contextmanager
def log_to(steps: Steps, *, summaries: bool = True) -> Iterator[None]:
    """Show what llm-compressor and the modifiers log as a command line should, in place of llm-compressor's own way.

    Quiet: all warnings and errors, and this package's own lines. Verbose: everything but the two METRIC lines
    that llm-compressor writes for each module.

    :param steps: the command's display
    :param summaries: show this package's own lines too where it is quiet
    """

    def matters(record: Any) -> bool:
        own = summaries and record["name"].startswith("sinkprune_plugin")
        least = "INFO" if own else "WARNING"
        return record["level"].no >= logger.level(least).no and not is_noise(record["message"])

    def no_metric(record: Any) -> bool:
        return record["level"].name != "METRIC"

    logger.remove()
    if steps.verbose:
        logger.add(sys.stderr, level="INFO", format="{time:HH:mm:ss} {level: <7} {message}", filter=no_metric)
    else:
        logger.add(
            lambda line: steps.note(line.rstrip("\n")),
            format=_line,
            filter=lambda record: no_metric(record) and matters(record),
        )
    try:
        yield
    finally:
        configure_logger()


def _line(record: Any) -> str:
    return "{message}\n" if record["level"].name == "INFO" else record["level"].name.lower() + ": {message}\n"


def check_recipe(file: Path, content: dict[str, Any]) -> Recipe:
    """Check that llm-compressor can run a recipe.

    :param file: where it is, for messages
    :param content: what it holds
    :return: the recipe with its modifiers
    :raises UsageError: if its modifiers can't be made, or it has none
    :raises pydantic.ValidationError: if a modifier refuses its fields
    """
    try:
        recipe = Recipe.from_dict(content)
    except (UsageError, ValidationError):
        raise
    except Exception as error:
        # Of any type: llm-compressor doesn't check the types of a recipe's parts.
        raise UsageError(f"recipe {file} can't be read by llm-compressor: {short(reason_of(error), 300)}") from error
    if not recipe.modifiers:
        raise UsageError(
            f"recipe {file} has no modifiers; name them below a key in _modifiers, and that below one in _stage"
        )
    return recipe


def calibration_dataset(windows: torch.Tensor) -> Any:
    """Wrap token windows as the dataset that oneshot() takes.

    :param windows: (N, T) int64
    :return: ``datasets.Dataset`` with ``input_ids`` and ``attention_mask``
    """
    rows = windows.tolist()
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


def run_oneshot(
    model: Any,
    tokenizer: Any,
    recipe: Any,
    windows: torch.Tensor,
    *,
    device: torch.device | None = None,
    batch_size: int = 1,
) -> None:
    """Run llm-compressor's oneshot() on token windows, in place.

    :param model: loaded model
    :param tokenizer: its tokenizer
    :param recipe: path of a YAML recipe, or modifier objects
    :param windows: (N, T) int64 calibration tokens
    :param device: where llm-compressor's pipelines bring modules for their forward passes; None leaves the choice to
        them: this process's accelerator if there is one
    :param batch_size: windows in a forward pass
    """
    # In a process group llm-compressor would take away everybody's log handlers, the caller's too, and add its own.
    with _onload_to(device), patch_attr(oneshot_setup, "configure_distributed_logger", lambda: None):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=calibration_dataset(windows),
            recipe=str(recipe) if isinstance(recipe, Path) else recipe,
            num_calibration_samples=len(windows),
            max_seq_length=windows.shape[1],
            batch_size=batch_size,
            shuffle_calibration_samples=False,
        )


@contextlib.contextmanager
def _onload_to(device: torch.device | None) -> Iterator[None]:
    """Make llm-compressor's pipelines move modules to a device of the user's choice.

    The pipelines ask one function, which takes the accelerator of this process's rank and has no parameter for another.
    """
    if device is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for pipeline in (data_free_pipeline, sequential_pipeline):
            stack.enter_context(patch_attr(pipeline, "get_main_device", lambda: device))
        yield


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

"""What a command works on: a checkpoint, its tokenizer and windows of text, checked before anything takes long."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sinkprune_plugin.diffusion import block_length_of, check_blocks
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats import load_sparse_checkpoint
from sinkprune_plugin.formats.files.shard_reader import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, read_json
from sinkprune_plugin.loading import default_sequence_length, load_config, load_tokenizer, maximum_length
from sinkprune_plugin.text_windows import embedded_text, leading_windows, read_documents, token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Inputs", "check_checkpoint", "load_inputs", "text_windows", "training_windows"]

# Those that transformers reads; each holds a mapping.
_JSON_FILES = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class Inputs:
    """What is known of a model before its weights are loaded.

    :param config: its configuration
    :param tokenizer: its tokenizer
    :param windows: (N, T) int64 token ids of text
    :param weight_bytes: size of its weights, as many as there are when they are dense; 0 where that isn't known
    """

    config: Any
    tokenizer: "PreTrainedTokenizerBase"
    windows: torch.Tensor
    weight_bytes: int


def load_inputs(
    model_name: str | Path,
    *,
    dataset: str | None,
    default: Literal["calibration", "test"],
    seq_len: int | None,
    longest: int,
    count: int,
    seed: int,
) -> Inputs:
    """Check a model's files and make windows of text for it. No weight is read.

    :param model_name: directory or hub name
    :param dataset: text file, JSON-lines file or saved dataset
    :param default: embedded text to use instead where it is None
    :param seq_len: tokens in a window; None takes the model's maximum
    :param longest: upper bound of that
    :param count: number of windows
    :param seed: seed of their choice
    :return: what the command needs in addition to the weights
    :raises UsageError: if a file is damaged, or model, tokenizer and text don't fit together
    """
    weight_bytes = check_checkpoint(model_name)
    config = load_config(model_name)
    tokenizer = load_tokenizer(model_name)
    length = seq_len if seq_len is not None else _default_length(config, longest)
    windows = text_windows(config, tokenizer, dataset, default, length, count, seed)
    return Inputs(config, tokenizer, windows, weight_bytes)


def check_checkpoint(name: str | Path) -> int:
    """Check everything that needs no weight to be read: the JSON files, and the headers of all shards.

    :param name: checkpoint directory; a hub name is left to transformers
    :return: size of its weights when dense, in bytes; 0 for a hub name and for weights that aren't safetensors
    :raises UsageError: naming the file that is damaged or missing
    """
    directory = Path(name)
    if directory.is_file():
        raise UsageError(f"{name} is a file; name the directory of a checkpoint")
    if not directory.is_dir():
        # A hub's names are "name" or "owner/name".
        if directory.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
            raise UsageError(f"{name} doesn't exist; name the directory of a checkpoint, or a model on the hub")
        return 0
    if not (directory / CONFIG_NAME).is_file():
        raise UsageError(f"{name} has no {CONFIG_NAME}; name the directory of a checkpoint")
    for file in _JSON_FILES:
        if (directory / file).is_file():
            read_json(directory / file)
    if not any((directory / file).is_file() for file in (SINGLE_NAME, INDEX_NAME)):
        return 0
    reader = load_sparse_checkpoint(directory)
    return sum(reader.spec(tensor).nbytes for tensor in reader)


def text_windows(
    config: Any,
    tokenizer: Any,
    dataset: str | None,
    default: Literal["calibration", "test"],
    length: int,
    count: int,
    seed: int,
) -> torch.Tensor:
    """Make windows of text that a model can take.

    :param config: its configuration
    :param tokenizer: its tokenizer
    :param dataset: text file, JSON-lines file or saved dataset
    :param default: embedded text to use instead where it is None
    :param length: tokens in a window
    :param count: number of windows
    :param seed: seed of their choice
    :return: (``count``, ``length``) int64
    :raises UsageError: if the text can't be read, is too short, or gives tokens that the model doesn't have
    """
    _check_length(config, length)
    source = dataset if dataset is not None else embedded_text(default)
    # Shorter than the default windows of a published model.
    remedy = "use a longer text than the package's own (--dataset)" if dataset is None else "use more text"
    windows = token_windows(read_documents(source), tokenizer, length, count, seed=seed, remedy=remedy)
    _check_ids(config, windows)
    return windows


def training_windows(
    config: Any, tokenizer: Any, dataset: str | None, *, length: int, most: int, seed: int
) -> torch.Tensor:
    """Make as many windows as a training can use, or as the text gives.

    :param config: the model's configuration
    :param tokenizer: its tokenizer
    :param dataset: text file, JSON-lines file or saved dataset; None takes the embedded calibration text
    :param length: tokens in a window
    :param most: windows wanted; documents beyond them aren't read, so their order is shuffled first
    :param seed: seed of that order
    :return: (N, ``length``) int64, at most ``most`` rows
    :raises UsageError: if the text can't be read, gives fewer than two windows, or tokens that the model doesn't have
    """
    _check_length(config, length)
    documents = read_documents(dataset if dataset is not None else embedded_text("calibration"))
    random.Random(seed).shuffle(documents)
    windows = leading_windows(documents, tokenizer, length, most)
    _check_ids(config, windows)
    return windows


def _default_length(config: Any, longest: int) -> int:
    length, block = default_sequence_length(config, longest), block_length_of(config)
    return length if block is None or length < block else length // block * block


def _check_length(config: Any, length: int) -> None:
    check_blocks(length, block_length_of(config))
    limit = maximum_length(config)
    if limit is not None and length > limit:
        raise UsageError(f"--seq-len {length} is longer than the model's {limit}; use at most {limit}")


def _check_ids(config: Any, windows: torch.Tensor) -> None:
    # LLaDA's embedding table may be longer than its vocabulary.
    sizes = [getattr(config, key, None) for key in ("vocab_size", "embedding_size")]
    rows = max((size for size in sizes if isinstance(size, int)), default=None)
    if rows is not None and int(windows.max()) >= rows:
        raise UsageError(
            f"the tokenizer gives token {int(windows.max())} and the model has {rows}; use the model's own tokenizer"
        )

"""Plain text in, token windows of equal length out: for calibration, perplexity and training."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from sinkprune_plugin.errors import UsageError, reason_of

__all__ = ["embedded_text", "leading_windows", "read_documents", "read_text", "token_stream", "token_windows"]

MINIMUM_TOKENS = 8
_ASSETS = Path(__file__).parent / "assets"


def embedded_text(kind: Literal["calibration", "test"]) -> Path:
    """Path of a text file that ships with the package.

    :param kind: "calibration" or "test"; they come from different speeches, see assets/README.md
    :return: a .jsonl file with the fields year, president and text
    :raises UsageError: if there is no such text
    """
    path = _ASSETS / f"{kind}.jsonl"
    if not path.is_file():
        raise UsageError(f"there is no embedded text {kind!r}; use 'calibration' or 'test'")
    return path


def read_documents(source: Path | str, text_column: str = "text") -> list[str]:
    """Read documents from a file or a saved dataset; documents without any text are left out.

    :param source: a .txt file (one document), a .jsonl file (one object with ``text_column`` per line), or a directory
        written by ``datasets``' ``save_to_disk`` (one document per row; of several splits, "train")
    :param text_column: name of the field that holds the text
    :return: documents in the order of the source
    :raises UsageError: if the source can't be read or holds no text
    """
    path = Path(source)
    if path.is_dir():
        documents = _read_dataset(path, text_column)
    elif not path.is_file():
        raise UsageError(f"{path} does not exist; give a .txt or .jsonl file or a saved dataset")
    elif path.suffix == ".txt":
        documents = [read_text(path)]
    elif path.suffix == ".jsonl":
        documents = _read_jsonl(path, text_column)
    else:
        raise UsageError(f"{path} is neither .txt nor .jsonl nor a saved dataset; convert it to one of them")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UsageError(f"{path} holds no text; give a source with at least one non-empty document")
    return documents


def token_stream(documents: Iterable[str], tokenizer: Any, enough: int | None = None) -> list[int]:
    """Token ids of all documents, one after the other.

    :param documents: texts
    :param tokenizer: a transformers tokenizer; its EOS goes between documents (nothing if it has none), and no other
        special token is added
    :param enough: stop reading documents once there are this many tokens
    :return: token ids
    """
    stream: list[int] = []
    for document in tqdm(documents, desc="tokenizing", unit="document", delay=2, disable=None):
        if stream and tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        # verbose=False: a document longer than the model's context is fine here, it gets cut.
        stream += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if enough is not None and len(stream) >= enough:
            break
    return stream


def token_windows(
    documents: Iterable[str],
    tokenizer: Any,
    seq_len: int,
    num_windows: int,
    *,
    seed: int | None = 0,
    remedy: str = "use more text",
) -> torch.Tensor:
    """Cut documents into token windows that don't overlap and need no padding.

    The windows tile :func:`token_stream`; what is left at its end is dropped.

    :param documents: texts
    :param tokenizer: a transformers tokenizer
    :param seq_len: tokens in a window, at least 8
    :param num_windows: windows wanted
    :param seed: a seeded choice among all windows, in random order; None takes the first ones in order
    :param remedy: what a message says to do if the text is too short
    :return: (num_windows, seq_len) int64
    :raises UsageError: if the windows are too short or the text yields fewer of them
    """
    _check_window(seq_len)
    if num_windows < 1:
        raise UsageError(f"num_windows is {num_windows}; ask for at least 1")
    stream = token_stream(documents, tokenizer, None if seed is not None else num_windows * seq_len)
    available = len(stream) // seq_len
    if available < num_windows:
        raise UsageError(
            f"the text has {len(stream)} tokens, enough for {available} windows of {seq_len}, but {num_windows} were "
            f"asked for; {remedy}, fewer windows or shorter ones"
        )
    windows = torch.tensor(stream[: available * seq_len], dtype=torch.int64).reshape(available, seq_len)
    if seed is None:
        return windows[:num_windows]
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return windows[order[:num_windows]]


def leading_windows(documents: Iterable[str], tokenizer: Any, seq_len: int, most: int) -> torch.Tensor:
    """Cut the beginning of a text into windows as :func:`token_windows` does; the rest isn't tokenized.

    :param documents: texts
    :param tokenizer: a transformers tokenizer
    :param seq_len: tokens in a window, at least 8
    :param most: windows wanted; fewer are returned if the text has no more
    :return: (N, seq_len) int64
    :raises UsageError: if the windows are too short, or the text gives fewer than two
    """
    _check_window(seq_len)
    stream = token_stream(documents, tokenizer, most * seq_len)
    count = min(len(stream) // seq_len, most)
    if count < 2:
        raise UsageError(
            f"the text has {len(stream)} tokens, {count} windows of {seq_len}; training needs at least 2, so use more "
            "text or shorter windows"
        )
    return torch.tensor(stream[: count * seq_len], dtype=torch.int64).reshape(count, seq_len)


def _check_window(seq_len: int) -> None:
    if seq_len < MINIMUM_TOKENS:
        raise UsageError(f"seq_len is {seq_len}; windows need at least {MINIMUM_TOKENS} tokens")


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    :param path: the file
    :return: its text
    :raises UsageError: if it can't be read or isn't UTF-8
    """
    try:
        # With or without the mark that some editors put first.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}") from error


def _read_jsonl(path: Path, text_column: str) -> list[str]:
    documents = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = getattr(error, "msg", None) or reason_of(error)
            raise UsageError(f"{path} line {number} is not JSON ({what}); write one object per line") from error
        text = record.get(text_column) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UsageError(f"{path} line {number} has no text in field {text_column!r}; name the right text_column")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"{path} line {number} has half of a character (\\ud…) in its text; correct it"
                ) from error
        documents.append(text)
    return documents


def _read_dataset(path: Path, text_column: str) -> list[str]:
    # Here and not above: importing datasets takes seconds.
    from datasets import DatasetDict, load_from_disk

    if not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise UsageError(f"{path} is a directory but no dataset written by save_to_disk; give one, or a text file")
    try:
        data = load_from_disk(str(path))
        if isinstance(data, DatasetDict):
            split = "train" if "train" in data else next(iter(data)) if len(data) == 1 else None
            if split is None:
                raise UsageError(f"{path} has the splits {', '.join(data)} and no 'train'; give the directory of one")
            data = data[split]
        if text_column not in data.column_names:
            raise UsageError(
                f"{path} has no column {text_column!r}, only {', '.join(data.column_names)}; name the right text_column"
            )
        # A row may be None.
        return [text if isinstance(text, str) else "" for text in data[text_column]]
    except UsageError:
        raise
    except Exception as error:
        # Of any type: a damaged file shows wherever datasets uses it.
        raise UsageError(f"{path} can't be read as a saved dataset: {reason_of(error)}; save it again") from error

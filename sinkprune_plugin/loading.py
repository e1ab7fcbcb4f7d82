"""Loading a local or hub model and its tokenizer, with failures reported in one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkprune_plugin.errors import UsageError, reason_of, short
from sinkprune_plugin.models.catalogue import missing_reason

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "EMBEDDED_MODEL",
    "default_sequence_length",
    "fetch_files",
    "load_config",
    "load_model",
    "load_tokenizer",
    "maximum_length",
]

# The same weights in formats that nothing here reads file by file.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*")
EMBEDDED_MODEL = Path(__file__).parent / "assets" / "tiny-llada"


def load_model(name: str | Path, dtype: Any = "auto", device: "torch.device | None" = None) -> "PreTrainedModel":
    """Load a model without executing anything from the checkpoint.

    :param name: directory or hub name
    :param dtype: torch dtype, or ``auto`` for the checkpoint's own
    :param device: where to; None leaves it in main memory
    :return: the model in evaluation mode
    :raises UsageError: if it can't be loaded, or its weights aren't those that its configuration asks for
    """
    from transformers import AutoModelForCausalLM

    with _in_one_line("model", name):
        # Sizes that don't match are allowed here, since transformers names them only in a table that it logs.
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True
        )
    for weight, stored, wanted in sorted(found["mismatched_keys"]):
        raise UsageError(
            f"can't load the model {name}: {short(weight)} is {list(stored)} in its weights and {list(wanted)} by its "
            "config.json; fetch both again"
        )
    # transformers initialises what it doesn't find, with a warning.
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(
            f"can't load the model {name}: its weights lack {short(missing[0])}{more}, which its config.json asks for; "
            "fetch both again"
        )
    return (model if device is None else model.to(device)).eval()


def load_config(name: str | Path) -> Any:
    """Load a model's configuration without executing anything from the checkpoint.

    :param name: directory or hub name
    :return: the configuration
    :raises UsageError: if it can't be loaded
    """
    from transformers import AutoConfig

    with _in_one_line("configuration", name):
        return AutoConfig.from_pretrained(name, trust_remote_code=False)


def fetch_files(name: str | Path) -> Path:
    """Fetch all files of a model on the hub that aren't in its cache yet, of the weights those in safetensors.

    :param name: hub name
    :return: the directory in the cache
    :raises UsageError: if they can't be fetched
    """
    from huggingface_hub import snapshot_download

    with _in_one_line("files", name):
        return Path(snapshot_download(str(name), ignore_patterns=list(_OTHER_WEIGHTS)))


def load_tokenizer(name: str | Path) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer.

    :param name: directory or hub name
    :return: the tokenizer
    :raises UsageError: if it can't be loaded
    """
    from transformers import AutoTokenizer

    with _in_one_line("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # Values of a wrong type in its configuration show only when it is used.
        tokenizer.decode(tokenizer("a", add_special_tokens=False)["input_ids"])
        return tokenizer


def default_sequence_length(config: Any, longest: int) -> int:
    """Tokens per sample if the user gives no number.

    :param config: the model's configuration
    :param longest: upper bound
    :return: the model's maximum length or ``longest``, whichever is less
    :raises UsageError: if the configuration names no maximum, or one that isn't a number of tokens
    """
    maximum = maximum_length(config)
    if maximum is None:
        raise UsageError("the model's config names no maximum length; pass --seq-len")
    return min(maximum, longest)


def maximum_length(config: Any) -> int | None:
    """Tokens that a model can take.

    :param config: the model's configuration
    :return: their number, None where the configuration names none
    :raises UsageError: if the configuration's value isn't a number of tokens
    """
    for key in ("max_sequence_length", "max_position_embeddings"):
        length = getattr(config, key, None)
        if length is None:
            continue
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise UsageError(f"{key}={short(repr(length))} in the model's config isn't a number of tokens; correct it")
        return length
    return None


@contextlib.contextmanager
def _in_one_line(what: str, name: str | Path) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        # Of any type: with a damaged or odd file transformers, safetensors and tokenizers fail wherever it shows.
        reason = _missing_here(name) or reason_of(error)
        raise UsageError(f"can't load the {what} {name}: {reason}") from error


def _missing_here(name: str | Path) -> str | None:
    """What is missing for a model that people ask for; transformers knows only that its class is remote code."""
    from transformers import PreTrainedConfig

    try:
        return missing_reason(PreTrainedConfig.get_config_dict(name)[0].get("model_type"))
    except Exception:  # noqa: BLE001 - the error that led here is the one to report
        return None

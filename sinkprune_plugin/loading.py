"""Loading a local or hub model and its tokenizer, with failures said in one line."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkprune_plugin.errors import UsageError, reason_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "EMBEDDED_MODEL",
    "checkpoint_bytes",
    "default_sequence_length",
    "load_config",
    "load_model",
    "load_tokenizer",
]

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "tiny-llada"


def load_model(name: str | Path, dtype: Any = "auto", device: "torch.device | None" = None) -> "PreTrainedModel":
    """Load a model without executing anything from the checkpoint.

    :param name: directory or hub name
    :param dtype: torch dtype, or ``auto`` for the checkpoint's own
    :param device: where to; None leaves it in main memory
    :return: the model in evaluation mode
    :raises UsageError: if it can't be loaded
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable("model", name, error) from error
    return (model if device is None else model.to(device)).eval()


def load_config(name: str | Path) -> Any:
    """Load a model's configuration without executing anything from the checkpoint.

    :param name: directory or hub name
    :return: the configuration
    :raises UsageError: if it can't be loaded
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable("configuration", name, error) from error


def load_tokenizer(name: str | Path) -> "PreTrainedTokenizerBase":
    """Load a model's tokenizer.

    :param name: directory or hub name
    :return: the tokenizer
    :raises UsageError: if it can't be loaded
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable("tokenizer", name, error) from error


def checkpoint_bytes(name: str | Path) -> int:
    """Size of a local checkpoint's weights in bytes; 0 for a hub name, whose size isn't known here."""
    return sum(file.stat().st_size for file in Path(name).glob("*.safetensors")) if Path(name).is_dir() else 0


def default_sequence_length(config: Any, longest: int) -> int:
    """Tokens in a sample where the user names no number.

    :param config: the model's configuration
    :param longest: upper bound
    :return: the model's maximum length or ``longest``, whichever is less
    :raises UsageError: if the configuration names no maximum
    """
    for key in ("max_sequence_length", "max_position_embeddings"):
        length = getattr(config, key, None)
        if length:
            return min(int(length), longest)
    raise UsageError("the model's config names no maximum length; pass --seq-len")


def _unloadable(what: str, name: str | Path, error: Exception) -> UsageError:
    if isinstance(error, UsageError):
        return error
    return UsageError(f"can't load the {what} {name}: {reason_of(error)}")

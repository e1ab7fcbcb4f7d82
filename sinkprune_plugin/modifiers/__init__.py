"""llm-compressor modifiers: sink-aware Wanda and SparseGPT."""

import contextlib
import importlib.util
import io
from typing import Any

from sinkprune_plugin.errors import UsageError

__all__ = ["check_llmcompressor", "load_oneshot_flow"]


def check_llmcompressor() -> None:
    """Check that pruning is possible at all, without the seconds that importing llm-compressor takes.

    :raises UsageError: if llm-compressor isn't installed
    """
    if importlib.util.find_spec("llmcompressor") is None:
        raise UsageError(
            "pruning needs llm-compressor, which isn't installed; pip install 'sinkprune-plugin[prune]' (with vLLM in "
            "the same environment see README, Versions)"
        )


def load_oneshot_flow() -> Any:
    """Import the module that runs oneshot(), and with it llm-compressor, which takes seconds.

    While it is imported llm-compressor starts to log to stdout, and immediately reports whether there is an
    accelerator; that doesn't belong in a command's results.

    :return: :mod:`sinkprune_plugin.modifiers.oneshot_flow`
    :raises UsageError: if llm-compressor isn't installed
    """
    check_llmcompressor()
    with contextlib.redirect_stdout(io.StringIO()):
        from sinkprune_plugin.modifiers import oneshot_flow
    return oneshot_flow

"""llm-compressor modifiers: sink-aware Wanda and SparseGPT."""

import contextlib
import io
from typing import Any

__all__ = ["load_oneshot_flow"]


def load_oneshot_flow() -> Any:
    """Import the module that runs oneshot(), and with it llm-compressor, which takes seconds.

    While it is imported llm-compressor starts to log to stdout, and immediately reports whether there is an
    accelerator; that doesn't belong in a command's results.

    :return: :mod:`sinkprune_plugin.modifiers.oneshot_flow`
    """
    with contextlib.redirect_stdout(io.StringIO()):
        from sinkprune_plugin.modifiers import oneshot_flow
    return oneshot_flow

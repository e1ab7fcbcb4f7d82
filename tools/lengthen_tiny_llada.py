"""Train a LLaDA further on longer windows than it has seen, for measurements at such lengths.

    python tools/lengthen_tiny_llada.py TRAIN_TEXT --output DIR [--validation TEST_TEXT]

TRAIN_TEXT is a .txt or .jsonl file; the model is sinkprune_plugin/assets/tiny-llada unless --dense names another. All
that changes besides the weights is the length that its configuration names.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from continued_training import parse_further, run_tool, train_further, write_further

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.llada import LLaDAModelLM


@dataclass(frozen=True)
class Settings:
    """Everything that determines the weights, besides the dense model and the text."""

    steps: int = 200
    batch_size: int = 4
    seq_len: int = 1024
    learning_rate: float = 5e-4
    warmup: int = 20
    precision: str = "float32"
    seed: int = 0


HELP = {
    "steps": "optimiser steps",
    "batch_size": "sequences per step",
    "seq_len": "tokens in a sequence, from then on also the model's maximum",
    "learning_rate": "peak of the cosine",
    "warmup": "steps of linear warm-up",
    "precision": "float32, or bfloat16 for autocast; weights stay float32 while training",
    "seed": "of the batches and the noise",
}


def lengthen(dense: LLaDAModelLM, settings: Settings) -> LLaDAModelLM:
    """The model with a longer maximum; rotary embedding needs nothing else.

    :param dense: changed in place
    :raises UsageError: if it takes as many tokens already
    """
    longest = dense.config.max_sequence_length
    if settings.seq_len <= longest:
        raise UsageError(f"the model takes {longest} tokens already; --seq-len {settings.seq_len} must be more")
    dense.config.max_sequence_length = settings.seq_len
    return dense


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0 on success, 2 on wrong input."""
    args, settings = parse_further(__doc__, Settings, HELP, arguments)

    def make(dense: LLaDAModelLM, _: torch.Tensor) -> LLaDAModelLM:
        return lengthen(dense, settings)

    return run_tool(
        lambda: write_further(args, settings, make, lambda model, stream: train_further(model, stream, settings))
    )


if __name__ == "__main__":
    sys.exit(main())

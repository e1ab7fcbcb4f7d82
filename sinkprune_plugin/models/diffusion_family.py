"""What all checkpoints of one kind of diffusion LM have in common: how they are corrupted, and who sees whom."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["ContextAttention", "DiffusionFamily"]

ContextAttention = Literal["bidirectional", "causal", "block_causal"]


@dataclass(frozen=True)
class DiffusionFamily:
    """Facts shared by all checkpoints of one kind of diffusion LM.

    :param name: short name for messages and reports
    :param model_types: values of ``config.model_type`` that belong to the family (compared without case)
    :param corruption: forward process. "absorbing": a corrupted token becomes the mask token. (Uniform corruption,
        where it becomes any token of the vocabulary, as in DiffusionGemma, is refused for now: its likelihood differs.)
    :param keep_first: the first real token of a sequence is never corrupted
    :param keep_last: the last real token of a sequence is never corrupted
    :param logit_shift: the logit that predicts token i is at position i - ``logit_shift``; 0 or 1
    :param default_mask_token_id: mask token id of the published checkpoints, used only where neither the configuration
        nor the tokenizer names one and the vocabulary holds it
    :param shared_types: values of ``config.model_type`` that are another family's, unless the configuration has all
        keys of ``marks``
    :param marks: see ``shared_types``
    :param context: how the tokens before an open block see each other. "bidirectional": there are no blocks, all
        tokens see all. "causal", "block_causal": the model denoises block by block and never sees what comes after a
        block; see :mod:`sinkprune_plugin.models.block_attention`
    :param block_key: key of config.json with the tokens in a block; needed with the latter two
    :param default_block_length: tokens in a block where config.json has no such key
    """

    name: str
    model_types: tuple[str, ...]
    corruption: Literal["absorbing"] = "absorbing"
    keep_first: bool = False
    keep_last: bool = False
    logit_shift: int = 0
    default_mask_token_id: int | None = None
    shared_types: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()
    context: ContextAttention = "bidirectional"
    block_key: str | None = None
    default_block_length: int = 32

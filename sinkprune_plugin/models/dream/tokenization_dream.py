"""Dream's tokenizer: Qwen2's byte-level BPE under another name, with a mask token."""

from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

__all__ = ["DreamTokenizer"]


class DreamTokenizer(Qwen2Tokenizer):
    """Reads the official ``vocab.json`` and ``merges.txt``, in place of the checkpoint's ``tokenization_dream.py``."""

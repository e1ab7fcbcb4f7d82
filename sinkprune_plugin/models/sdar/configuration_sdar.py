"""Configuration of SDAR models, with the keys of the official ``config.json`` files."""

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from sinkprune_plugin.models.auto_classes import register_imported
from sinkprune_plugin.models.config_checks import (
    check_even_heads,
    check_head_groups,
    check_numbers,
    check_unscaled_rotary,
    check_values,
    take_rotary_keys,
)
from sinkprune_plugin.models.sizes_in_config import SIZES_KEY, mark_formula, sizes_in_config, unmark_formula

__all__ = ["SDARConfig"]


class SDARConfig(PreTrainedConfig):
    """Configuration of SDAR 1.7B, 4B and 8B and models with their architecture.

    Defaults are those of SDAR-1.7B-Chat, except that ``num_key_value_heads`` follows from ``num_attention_heads``.

    :param vocab_size: rows of the embedding table and of the vocabulary projection
    :param hidden_size: width of the hidden states
    :param intermediate_size: width of the gated MLP
    :param num_hidden_layers: decoder layers
    :param num_attention_heads: query heads
    :param num_key_value_heads: key and value heads; None: ``num_attention_heads``
    :param head_dim: width of one attention head, even; heads needn't fill ``hidden_size``
    :param hidden_act: activation of the gate, any of transformers' names
    :param max_position_embeddings: positions that the model can take
    :param rope_theta: base of the rotary frequencies
    :param rope_scaling: must be None or of type default
    :param rms_norm_eps: added to the mean square
    :param initializer_range: standard deviation of fresh weights
    :param attention_bias: q, k, v and o projections have a bias
    :param attention_dropout: probability in training
    :param tie_word_embeddings: the vocabulary projection is the embedding table
    :param use_sliding_window: must be False; ``sliding_window`` and ``max_window_layers`` mean nothing without it
    :param block_size: tokens in a block, 4 in the published models unless their name says another number
    :param mask_token_id: token that masked positions hold
    """

    model_type = "sdar"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    # A field of its own hides transformers' property of this name, which would rename the key when saving.
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    tie_word_embeddings: bool = False
    block_size: int = 4
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Take over keys that aren't fields; see ``PreTrainedConfig``."""
        register_imported()
        self.hidden_act = unmark_formula(self.hidden_act, sized=kwargs.get(SIZES_KEY) is not None)
        take_rotary_keys(self, kwargs)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """See ``PreTrainedConfig``; official code refuses an activation that it doesn't know, naming it."""
        return mark_formula(super().to_dict(), "hidden_act")

    @property
    def key_value_heads(self) -> int:
        """Key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    def check_supported(self) -> None:
        """Check that the native class computes what this configuration says.

        :raises UsageError: naming the option
        """
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        check_numbers(
            self,
            sizes=(*sizes, "head_dim", "max_position_embeddings", "block_size"),
            optional=("num_key_value_heads",),
            positive=("rope_theta", "rms_norm_eps"),
        )
        check_unscaled_rotary(self, "SDAR")
        check_values(self, {"use_sliding_window": (False, None)}, "SDAR")
        check_even_heads(self)
        check_head_groups(self)
        sizes_in_config(self)

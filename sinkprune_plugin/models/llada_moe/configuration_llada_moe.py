"""Configuration of LLaDA-MoE models, with the keys of the official ``config.json`` files."""

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.auto_classes import register_imported
from sinkprune_plugin.models.config_checks import (
    check_head_groups,
    check_numbers,
    check_unscaled_rotary,
    check_values,
    take_rotary_keys,
)
from sinkprune_plugin.models.sizes_in_config import (
    SIZES_KEY,
    BlockSizes,
    check_head_width,
    check_routing,
    derived_head_width,
    mark_formula,
    unmark_formula,
)

__all__ = ["LLaDAMoEConfig"]

# What the official files say; the official code would take such a file for dense LLaDA's without its auto_map.
_OFFICIAL_TYPE = "llada"

# Options that change the computation, and the values that the native class computes. The last five are keys of the
# official configuration that the official network doesn't read: its router is a softmax over all experts whose weights
# are neither scaled nor normalised again. Other values would be another model for whoever reads them; -2 stands for
# none in the official class.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "shared_expert_intermediate_size": (None, 0),
    "moe_router_enable_expert_bias": (None, False),
    "clip_qkv": (None,),
    "partial_rotary_factor": (None, 1),
    "norm_topk_prob": (None, False),
    "moe_router_score_function": (None, "softmax"),
    "routed_scaling_factor": (None, 1),
    "router_num_group": (None, 1, -2),
    "router_topk_group": (None, 1, -2),
}


class LLaDAMoEConfig(PreTrainedConfig):
    """Configuration of LLaDA-MoE 7B-A1B and models with its architecture.

    Defaults are those of the published checkpoints, except that ``num_key_value_heads`` follows from
    ``num_attention_heads``. Official files have LLaDA's ``model_type``; this class reads and writes them, and also
    those that name it ``lladamoe``.

    :param vocab_size: rows of the embedding table and of the vocabulary projection
    :param hidden_size: width of the hidden states
    :param dense_intermediate_size: width of the gated MLP in layers without experts
    :param expert_intermediate_size: width of each expert's gated MLP
    :param num_hidden_layers: decoder layers
    :param num_attention_heads: query heads
    :param num_key_value_heads: key and value heads; None: ``num_attention_heads``
    :param head_dim: width of one attention head; 0: ``hidden_size`` ÷ ``num_attention_heads``. Anything else than that
        needs ``sinkprune_block_sizes``, the sizes of single layers from which units were removed
    :param num_experts: experts of each layer that has them; the largest number where ``sinkprune_block_sizes`` gives
        layers numbers of their own
    :param num_experts_per_tok: experts that each token goes to
    :param moe_layer_freq: for each layer 1 if it has experts, 0 if it is dense; None: all have them
    :param qk_layernorm: queries and keys are normalised, head by head, before rotation
    :param attention_bias: the four Linears of attention have a bias
    :param hidden_act: activation of the gate, any of transformers' names
    :param max_position_embeddings: positions seen in training
    :param rope_theta: base of the rotary frequencies
    :param rope_scaling: must be None or of type default
    :param partial_rotary_factor: must be 1 or None: the whole head is rotated
    :param rms_norm_eps: added to the mean square
    :param initializer_range: standard deviation of fresh weights
    :param attention_dropout: probability in training
    :param tie_word_embeddings: the vocabulary projection is the embedding table
    :param shared_expert_intermediate_size: must be None or 0
    :param moe_router_enable_expert_bias: must be None or False
    :param clip_qkv: must be None
    :param mask_token_id: token that masked positions hold
    """

    model_type = "lladamoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 157184
    hidden_size: int = 2048
    dense_intermediate_size: int = 8192
    expert_intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int = 0
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_layer_freq: list[int] | None = None
    qk_layernorm: bool | None = True
    attention_bias: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    # A field of its own hides transformers' property of this name, which would rename the key when saving.
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float | None = 1.0
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    shared_expert_intermediate_size: int | None = None
    moe_router_enable_expert_bias: bool | None = None
    clip_qkv: float | None = None
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Take over keys that aren't fields; see ``PreTrainedConfig``."""
        register_imported()
        sized = kwargs.get(SIZES_KEY) is not None
        self.hidden_act = unmark_formula(self.hidden_act, sized=sized)
        self.head_dim = self.head_dim or derived_head_width(self.hidden_size, self.num_attention_heads, sized=sized)
        take_rotary_keys(self, kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """See ``PreTrainedConfig``; without its warning about the official files' ``model_type``."""
        read, unused = super().get_config_dict(*args, **kwargs)
        if read.get("model_type") == _OFFICIAL_TYPE:
            read = {**read, "model_type": cls.model_type}
        return read, unused

    def to_dict(self) -> dict[str, Any]:
        """See ``PreTrainedConfig``; official code refuses an activation that it doesn't know, naming it."""
        return mark_formula(super().to_dict() | {"model_type": _OFFICIAL_TYPE}, "hidden_act")

    @property
    def key_value_heads(self) -> int:
        """Key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    def ordinary_block_sizes(self) -> list[BlockSizes]:
        """What the ordinary options say of each layer; see :func:`sizes_in_config`."""
        heads, key_value_heads = self.num_attention_heads, self.key_value_heads
        dense = BlockSizes(self.dense_intermediate_size, heads, key_value_heads)
        routed = BlockSizes(self.expert_intermediate_size, heads, key_value_heads, self.num_experts)
        return [routed if frequency else dense for frequency in self._layer_frequencies()]

    def fit_ordinary_options(self, sizes: Sequence[BlockSizes]) -> None:
        """Make the ordinary options say as much of other sizes as they can; see :func:`sizes_in_config`.

        :param sizes: of each layer
        """
        dense, routed = ([each for each in sizes if bool(each.experts) is kind] for kind in (False, True))
        if dense or self.moe_layer_freq is not None:
            self.moe_layer_freq = [int(each.experts > 0) for each in sizes]
        if dense:
            self.dense_intermediate_size = max(each.mlp_channels for each in dense)
        if routed:
            self.num_experts = max(each.experts for each in routed)
            self.expert_intermediate_size = max(each.mlp_channels for each in routed)

    def check_supported(self) -> None:
        """Check that the native class computes what this configuration says.

        :raises UsageError: naming the option
        """
        check_numbers(
            self,
            sizes=(
                "vocab_size",
                "hidden_size",
                "dense_intermediate_size",
                "expert_intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "head_dim",
                "num_experts",
                "num_experts_per_tok",
                "max_position_embeddings",
            ),
            optional=("num_key_value_heads",),
            positive=("rope_theta", "rms_norm_eps"),
        )
        check_values(self, _SUPPORTED, "LLaDA-MoE")
        check_unscaled_rotary(self, "LLaDA-MoE")
        check_head_width(self, "hidden_size", "num_attention_heads")
        check_head_groups(self)
        frequencies = self._layer_frequencies()
        if len(frequencies) != self.num_hidden_layers or any(frequency not in (0, 1) for frequency in frequencies):
            raise UsageError(
                f"moe_layer_freq={self.moe_layer_freq} must hold a 0 or 1 for each of num_hidden_layers="
                f"{self.num_hidden_layers}; correct config.json"
            )
        check_routing(self)

    def _layer_frequencies(self) -> list[int]:
        return [1] * self.num_hidden_layers if self.moe_layer_freq is None else self.moe_layer_freq

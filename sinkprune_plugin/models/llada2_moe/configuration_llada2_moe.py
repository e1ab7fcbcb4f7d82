"""Configuration of LLaDA2 models, with the keys of the official ``config.json`` files."""

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.models.auto_classes import register_imported
from sinkprune_plugin.models.config_checks import check_numbers, check_values
from sinkprune_plugin.models.sizes_in_config import (
    SIZES_KEY,
    BlockSizes,
    check_routing,
    mark_formula,
    sizes_in_config,
    unmark_formula,
)

__all__ = ["LLaDA2MoeConfig"]

# Options that change the computation, and the values that the native class computes: keys of the official configuration
# class, of published files, and what other engines read. The official network reads none of them but rope_scaling and,
# in LLaDA2.1, use_qk_norm, and computes what the values here say. Without a meaning in evaluation: embedding_dropout,
# output_dropout, max_window_layers, sliding_window; rotary_dim is partial_rotary_factor once more.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "norm_head": (None, False),
    "norm_softmax": (None, False),
    "norm_topk_prob": (None, True),
    "score_function": (None, "sigmoid"),
    "moe_router_enable_expert_bias": (None, True),
    "router_dtype": (None, "fp32"),
    "use_qk_norm": (None, True),
    "use_rmsnorm": (None, True),
    "use_sliding_window": (None, False),
    "using_split_qkv_in_self_attention": (None, False),
    "rope_scaling": (None,),
}


class LLaDA2MoeConfig(PreTrainedConfig):
    """Configuration of LLaDA2 mini and flash and models with their architecture.

    Defaults are those of LLaDA2.0-mini.

    :param vocab_size: rows of the embedding table and of the vocabulary projection
    :param hidden_size: width of the hidden states
    :param intermediate_size: width of the gated MLP in layers without experts
    :param moe_intermediate_size: width of each expert's gated MLP
    :param num_hidden_layers: decoder layers
    :param first_k_dense_replace: so many layers at the beginning have no experts
    :param num_attention_heads: query heads
    :param num_key_value_heads: key and value heads
    :param head_dim: width of one attention head; None: ``hidden_size`` ÷ ``num_attention_heads``
    :param partial_rotary_factor: part of each head that is rotated, its beginning
    :param num_experts: experts of each layer that has them; the largest number where ``sinkprune_block_sizes`` gives
        layers numbers of their own
    :param num_experts_per_tok: experts that each token goes to
    :param num_shared_experts: experts' widths of the MLP that all tokens go to; None or 0: there is none
    :param n_group: groups that a router chooses among first; they must divide the experts of each layer
    :param topk_group: groups that a token's experts are in
    :param routed_scaling_factor: sum of the weights of a token's experts
    :param use_qkv_bias: query_key_value has a bias
    :param use_bias: dense, the projection after attention, has a bias
    :param hidden_act: activation of the gate, any of transformers' names
    :param max_position_embeddings: positions seen in training
    :param rope_theta: base of the rotary frequencies
    :param rope_scaling: must be None, or of type default
    :param rms_norm_eps: added to the mean square
    :param initializer_range: standard deviation of fresh weights
    :param attention_dropout: probability in training
    :param tie_word_embeddings: the vocabulary projection is the embedding table
    :param block_length: tokens in a block; not in official files, whose examples all give 32
    :param norm_head: must be False
    :param norm_topk_prob: must be True, see ``_SUPPORTED`` for further keys with one possible value
    :param score_function: must be ``sigmoid``
    :param use_sliding_window: must be False
    :param mask_token_id: token that masked positions hold
    """

    model_type = "llada2_moe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 20
    first_k_dense_replace: int = 1
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int | None = None
    partial_rotary_factor: float = 0.5
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int | None = 1
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    use_qkv_bias: bool = False
    use_bias: bool = False
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 600000.0
    # A field of its own hides transformers' property of this name, which would rename the key when saving.
    rope_scaling: dict[str, Any] | None = None
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    block_length: int = 32
    norm_head: bool | None = False
    norm_topk_prob: bool | None = True
    score_function: str | None = "sigmoid"
    use_sliding_window: bool | None = False
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Take over keys that aren't fields; see ``PreTrainedConfig``."""
        register_imported()
        self.hidden_act = unmark_formula(self.hidden_act, sized=kwargs.get(SIZES_KEY) is not None)
        width, heads = self.hidden_size, self.num_attention_heads
        if self.head_dim is None and type(width) is type(heads) is int and heads > 0:
            self.head_dim = width // heads
        # transformers 5 writes the rotary keys like this in files that it converted.
        parameters = kwargs.pop("rope_parameters", None)
        if parameters is not None:
            self.rope_theta = parameters.get("rope_theta", self.rope_theta)
            self.partial_rotary_factor = parameters.get("partial_rotary_factor", self.partial_rotary_factor)
            self.rope_scaling = parameters
        scaling = self.rope_scaling or {}
        if scaling.get("rope_type", scaling.get("type", "default")) == "default":
            self.rope_scaling = None
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """See ``PreTrainedConfig``; official code refuses an activation that it doesn't know, naming it."""
        return mark_formula(super().to_dict(), "hidden_act")

    @property
    def rotary_width(self) -> int:
        """Elements of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor) if self.head_dim else 0

    @property
    def shared_channels(self) -> int:
        """Width of the MLP that all tokens go to, 0 where there is none."""
        return self.moe_intermediate_size * (self.num_shared_experts or 0)

    def ordinary_block_sizes(self) -> list[BlockSizes]:
        """What the ordinary options say of each layer; see :func:`sizes_in_config`."""
        heads, key_value_heads = self.num_attention_heads, self.num_key_value_heads
        dense = BlockSizes(self.intermediate_size, heads, key_value_heads)
        routed = BlockSizes(self.moe_intermediate_size, heads, key_value_heads, self.num_experts, self.shared_channels)
        first = min(self.first_k_dense_replace, self.num_hidden_layers)
        return [dense] * first + [routed] * (self.num_hidden_layers - first)

    def fit_ordinary_options(self, sizes: Sequence[BlockSizes]) -> None:
        """Make the ordinary options say as much of other sizes as they can; see :func:`sizes_in_config`.

        :param sizes: of each layer
        """
        dense, routed = ([each for each in sizes if bool(each.experts) is kind] for kind in (False, True))
        self.first_k_dense_replace = len(dense)
        if dense:
            self.intermediate_size = max(each.mlp_channels for each in dense)
        if routed:
            self.num_experts = max(each.experts for each in routed)
            if not self.num_shared_experts:
                # Otherwise it is the shared expert's width as well.
                self.moe_intermediate_size = max(each.mlp_channels for each in routed)

    def check_supported(self) -> None:
        """Check that the native class computes what this configuration says.

        :raises UsageError: naming the option
        """
        counts = ("num_experts", "num_experts_per_tok", "n_group", "topk_group", "num_hidden_layers", "block_length")
        widths = ("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "rotary_width")
        heads = ("num_attention_heads", "num_key_value_heads")
        check_numbers(
            self,
            sizes=("vocab_size", *widths, *heads, *counts, "max_position_embeddings"),
            optional=(),
            positive=("rope_theta", "rms_norm_eps", "routed_scaling_factor", "partial_rotary_factor"),
        )
        for option in ("first_k_dense_replace", "num_shared_experts"):
            value = getattr(self, option)
            if value is not None and (type(value) is not int or value < 0):
                raise self._wrong(f"{option}={short(repr(value))} must be a whole number of at least 0")
        # Block routing, as in sgl-project/sglang's pull request 31768.
        capacity = getattr(self, "expert_capacity", None)
        if capacity is not None:
            raise UsageError(
                f"expert_capacity={short(repr(capacity))} in this LLaDA2 configuration: the tokens of a block choose "
                "among the experts that the block admits (LLaDA2.2), which isn't computed; use LLaDA2.0 or 2.1"
            )
        check_values(self, _SUPPORTED, "LLaDA2")
        if self.rotary_width % 2 or self.partial_rotary_factor > 1:
            raise self._wrong(
                f"partial_rotary_factor={self.partial_rotary_factor} of head_dim={self.head_dim} must be an even "
                "number of elements, at most all"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise self._wrong(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.topk_group > self.n_group:
            raise self._wrong(f"topk_group={self.topk_group} must be at most n_group={self.n_group}")
        check_routing(self)
        self._check_groups()

    def _check_groups(self) -> None:
        for number, sizes in enumerate(sizes_in_config(self)):
            if not sizes.experts:
                continue
            share, rest = divmod(sizes.experts, self.n_group)
            if rest or share < 2:
                raise self._wrong(
                    f"decoder block {number} has {sizes.experts} experts in n_group={self.n_group} groups, which must "
                    "have as many each, at least 2"
                )
            if share * self.topk_group < self.num_experts_per_tok:
                raise self._wrong(
                    f"decoder block {number} has {share} experts in each group, and a token chooses "
                    f"num_experts_per_tok={self.num_experts_per_tok} in topk_group={self.topk_group} groups: too few"
                )

    def _wrong(self, what: str) -> UsageError:
        return UsageError(f"{what}; correct config.json of this LLaDA2 model")

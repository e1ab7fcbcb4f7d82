"""Configuration of LLaDA models, with the keys of the official ``config.json`` files."""

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.auto_classes import register_imported
from sinkprune_plugin.models.config_checks import check_numbers, check_values
from sinkprune_plugin.models.sizes_in_config import (
    SIZES_KEY,
    check_head_width,
    derived_head_width,
    mark_formula,
    sizes_in_config,
    unmark_formula,
)

__all__ = ["LLaDAConfig", "MMaDAConfig"]

# Options of the official configuration that change the computation, and the values that the native class computes.
# Everything else is refused when a model is built: a checkpoint must never run with a formula other than its own.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu", "gelu", "relu"),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "clip_qkv": (None,),
    "rope_scaling": (None,),
}


class LLaDAConfig(PreTrainedConfig):
    """Configuration of LLaDA, LLaDA-1.5 and models with their architecture.

    Defaults are those of LLaDA-8B, except that sizes that can be derived from others are. Keys not listed here (such as
    MMaDA's codebook sizes) are kept as they are.

    :param vocab_size: tokens that the tokenizer knows
    :param embedding_size: rows of the embedding table and of the vocabulary projection; None: ``vocab_size``
    :param d_model: width of the hidden states
    :param n_layers: decoder blocks
    :param n_heads: query heads
    :param n_kv_heads: key and value heads; None: ``n_heads``, or 1 with ``multi_query_attention``
    :param head_dim: width of one attention head; 0: ``d_model`` ÷ ``n_heads``. Anything else than that needs
        ``sinkprune_block_sizes``, the sizes of single blocks from which units were removed
    :param multi_query_attention: True for one key head; contradicting ``n_kv_heads`` is refused
    :param mlp_hidden_size: width of the gated MLP; None: ``mlp_ratio`` × ``d_model``
    :param mlp_ratio: see ``mlp_hidden_size``
    :param activation_type: silu, gelu or relu, applied to ``ff_proj``
    :param max_sequence_length: positions seen in training
    :param rope_theta: base of the rotary frequencies
    :param rope_full_precision: rotate queries and keys in float32 whatever the model's dtype
    :param rms_norm_eps: added to the mean square
    :param layer_norm_with_affine: norms have a weight
    :param bias_for_layer_norm: norms have a bias; None: as ``include_bias``
    :param include_bias: all Linears have a bias, except the vocabulary projection of a tied model
    :param include_qkv_bias: q_proj, k_proj and v_proj have a bias
    :param weight_tying: the vocabulary projection is the embedding table
    :param attention_dropout: probability in training, like ``residual_dropout`` and ``embedding_dropout``
    :param init_std: standard deviation of fresh weights. ``init_fn`` is kept but not followed: the class is for trained
        checkpoints
    """

    model_type = "llada"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # The names that transformers, llm-compressor and vLLM use.
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    }

    vocab_size: int = 126464
    embedding_size: int | None = None
    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    head_dim: int = 0
    multi_query_attention: bool | None = None
    mlp_hidden_size: int | None = None
    mlp_ratio: int = 4
    activation_type: str = "silu"
    max_sequence_length: int = 4096
    block_type: str = "llama"
    block_group_size: int = 1
    rope: bool = True
    rope_theta: float = 500000.0
    rope_full_precision: bool = True
    alibi: bool = False
    alibi_bias_max: float = 8.0
    attention_layer_norm: bool = False
    attention_layer_norm_with_affine: bool = True
    layer_norm_type: str = "rms"
    layer_norm_with_affine: bool = True
    rms_norm_eps: float = 1e-5
    bias_for_layer_norm: bool | None = False
    include_bias: bool = False
    include_qkv_bias: bool | None = False
    weight_tying: bool = False
    input_emb_norm: bool = False
    scale_logits: bool = False
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    flash_attention: bool = False
    init_device: str | None = "meta"
    init_fn: str = "mitchell"
    init_std: float = 0.02
    init_cutoff_factor: float | None = None
    precision: str | None = "amp_bf16"
    mask_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Take over keys that aren't fields; see ``PreTrainedConfig``."""
        register_imported()
        sized = kwargs.get(SIZES_KEY) is not None
        self.block_type = unmark_formula(self.block_type, sized=sized)
        self.head_dim = self.head_dim or derived_head_width(self.d_model, self.n_heads, sized=sized)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """See ``PreTrainedConfig``; official files of LLaDA-MoE have this ``model_type`` too, and give its class."""
        if cls is LLaDAConfig and config_dict.get("num_experts") is not None:
            from sinkprune_plugin.models.llada_moe.configuration_llada_moe import LLaDAMoEConfig

            return LLaDAMoEConfig.from_dict({**config_dict, "model_type": LLaDAMoEConfig.model_type}, **kwargs)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """See ``PreTrainedConfig``; official code refuses a block type that it doesn't know, naming it."""
        return mark_formula(super().to_dict(), "block_type")

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding table, at least ``vocab_size``."""
        return self.embedding_size or self.vocab_size

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads.

        :raises UsageError: if ``n_kv_heads`` and ``multi_query_attention`` contradict each other
        """
        if self.multi_query_attention is None:
            return self.n_kv_heads or self.n_heads
        implied = 1 if self.multi_query_attention else self.n_heads
        if self.n_kv_heads not in (None, implied):
            raise UsageError(
                f"n_kv_heads={self.n_kv_heads} contradicts multi_query_attention={self.multi_query_attention}, which "
                f"means {implied}; set one of them to null"
            )
        return implied

    @num_key_value_heads.setter
    def num_key_value_heads(self, heads: int | None) -> None:
        self.n_kv_heads = heads

    @property
    def intermediate_size(self) -> int:
        """Width of the gated MLP."""
        return self.mlp_hidden_size or self.mlp_ratio * self.d_model

    @intermediate_size.setter
    def intermediate_size(self, size: int | None) -> None:
        self.mlp_hidden_size = size

    def check_supported(self) -> None:
        """Check that the native class computes what this configuration says.

        :raises UsageError: naming the option
        """
        check_numbers(
            self,
            sizes=("vocab_size", "d_model", "n_layers", "n_heads", "head_dim", "max_sequence_length", "mlp_ratio"),
            optional=("embedding_size", "n_kv_heads", "mlp_hidden_size"),
            positive=("rope_theta", "rms_norm_eps"),
        )
        check_values(self, _SUPPORTED, self.model_type)
        if self.embedding_rows < self.vocab_size:
            raise UsageError(
                f"embedding_size={self.embedding_size} is less than vocab_size={self.vocab_size}; raise embedding_size"
            )
        check_head_width(self, "d_model", "n_heads")
        if self.n_heads % self.num_key_value_heads:
            raise UsageError(
                f"n_heads={self.n_heads} is no multiple of n_kv_heads={self.num_key_value_heads}; change one"
            )
        sizes_in_config(self)


class MMaDAConfig(LLaDAConfig):
    """Configuration of MMaDA (arXiv 2505.15809): LLaDA with image tokens appended to its vocabulary."""

    model_type = "mmada"

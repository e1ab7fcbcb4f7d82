"""Configuration of Nemotron-Labs-Diffusion models, with the keys of the official ``config.json`` files."""

from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.models.auto_classes import register_imported
from sinkprune_plugin.models.config_checks import check_even_heads, check_head_groups, check_numbers
from sinkprune_plugin.models.sizes_in_config import SIZES_KEY, mark_formula, sizes_in_config, unmark_formula
from sinkprune_plugin.models.yarn import YarnScaling

__all__ = ["NemotronLabsDiffusionConfig"]

# What the official code trains with; how attention looks while it denoises is the same for all of them.
_PARADIGMS = ("bidirectional", "block_diff", "sbd_block_diff")


class NemotronLabsDiffusionConfig(PreTrainedConfig):
    """Configuration of Nemotron-Labs-Diffusion 3B, 8B and 14B.

    Defaults are those of the 8B model, except that ``num_key_value_heads`` follows from ``num_attention_heads``.

    :param vocab_size: rows of the embedding table and of ``diffusion_head``
    :param hidden_size: width of the hidden states
    :param intermediate_size: width of the gated MLP
    :param num_hidden_layers: decoder layers
    :param num_attention_heads: query heads
    :param num_key_value_heads: key and value heads; None: ``num_attention_heads``
    :param head_dim: width of one attention head, even; heads needn't fill ``hidden_size``
    :param hidden_act: activation of the gate, any of transformers' names
    :param max_position_embeddings: positions that the model can take
    :param rope_parameters: ``rope_type`` (default or yarn), ``rope_theta``, what
        :class:`~sinkprune_plugin.models.yarn.YarnScaling` reads, and ``llama_4_scaling_beta``: queries at position p
        are scaled by 1 + beta · ln(1 + ⌊p / original_max_position_embeddings⌋)
    :param rms_norm_eps: added to the mean square
    :param initializer_range: standard deviation of fresh weights
    :param attention_bias: q, k, v and o projections have a bias
    :param mlp_bias: the MLP's projections have a bias
    :param attention_dropout: probability in training
    :param sliding_window: must be None
    :param tie_word_embeddings: ``diffusion_head`` is the embedding table
    :param mask_token_id: token that masked positions hold
    :param block_size: tokens in a block: it is denoised in both directions, after a causal context
    :param dlm_paradigm: the official code's switch for training; autoregressive is refused
    """

    model_type = "nemotron_labs_diffusion"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    ignore_keys_at_rope_validation: ClassVar[set[str]] = {"llama_4_scaling_beta", "max_position_embeddings"}

    vocab_size: int = 131072
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 34
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 262144
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    mask_token_id: int | None = None
    block_size: int = 32
    dlm_paradigm: str = "bidirectional"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Take over keys that aren't fields; see ``PreTrainedConfig``."""
        register_imported()
        self.hidden_act = unmark_formula(self.hidden_act, sized=kwargs.get(SIZES_KEY) is not None)
        # Changed in place by transformers, and it may be the caller's.
        parameters = self.rope_parameters
        self.rope_parameters = dict(parameters) if parameters else {"rope_theta": 1000000.0}
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """See ``PreTrainedConfig``; official code refuses an activation that it doesn't know, naming it."""
        return mark_formula(super().to_dict(), "hidden_act")

    @property
    def key_value_heads(self) -> int:
        """Key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def rotary_theta(self) -> float:
        """Base of the rotary frequencies."""
        return float((self.rope_parameters or {})["rope_theta"])

    @property
    def yarn(self) -> YarnScaling | None:
        """How rotary frequencies are scaled; None if they aren't.

        :raises UsageError: if a number is missing or wrong
        """
        parameters = self.rope_parameters or {}
        if parameters.get("rope_type", "default") == "default":
            return None
        return YarnScaling.read(parameters, self.max_position_embeddings)

    @property
    def query_scaling(self) -> tuple[float, int] | None:
        """beta and the length of a step of the queries' scale, see ``rope_parameters``; None without it."""
        parameters = self.rope_parameters or {}
        beta = parameters.get("llama_4_scaling_beta")
        if beta is None:
            return None
        return float(beta), int(parameters.get("original_max_position_embeddings", self.max_position_embeddings))

    def check_supported(self) -> None:
        """Check that the native class computes what this configuration says.

        :raises UsageError: naming the option
        """
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        check_numbers(
            self,
            sizes=(*sizes, "head_dim", "max_position_embeddings", "block_size"),
            optional=("num_key_value_heads",),
            positive=("rms_norm_eps",),
        )
        self._check_rotary()
        if self.sliding_window is not None:
            raise self._refused("sliding_window", "only null")
        if self.dlm_paradigm not in _PARADIGMS:
            raise self._refused("dlm_paradigm", f"only {', '.join(_PARADIGMS)}: what is run here denoises")
        check_head_groups(self)
        check_even_heads(self)
        sizes_in_config(self)

    def _check_rotary(self) -> None:
        parameters = self.rope_parameters or {}
        theta, kind = parameters.get("rope_theta"), parameters.get("rope_type", "default")
        if not isinstance(theta, int | float) or isinstance(theta, bool) or not 0 < theta < float("inf"):
            raise UsageError(
                f"rope_theta={short(repr(theta))} in rope_parameters of this {self.model_type} configuration must be a "
                "number above 0; correct config.json"
            )
        if kind not in ("default", "yarn"):
            raise UsageError(
                f"rope_type={short(repr(kind))} in this {self.model_type} configuration is not supported, only default "
                "and yarn; use a checkpoint with one of them"
            )
        _ = self.yarn
        beta = parameters.get("llama_4_scaling_beta")
        length = parameters.get("original_max_position_embeddings", self.max_position_embeddings)
        if beta is not None and (isinstance(beta, bool | str | list | dict) or type(length) is not int or length < 1):
            raise UsageError(
                f"llama_4_scaling_beta={short(repr(beta))} with original_max_position_embeddings="
                f"{short(repr(length))} must be a number and a whole number of at least 1; correct config.json"
            )

    def _refused(self, option: str, supported: str) -> UsageError:
        return UsageError(
            f"{option}={short(repr(getattr(self, option)))} in this {self.model_type} configuration is not supported, "
            f"{supported}; use a checkpoint without it"
        )

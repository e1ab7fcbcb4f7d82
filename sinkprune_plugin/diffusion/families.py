"""What makes a model a diffusion LM: a registry of families, resolved from a configuration without executing it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.catalogue import NATIVE_MODELS, missing_reason
from sinkprune_plugin.models.diffusion_family import ContextAttention, DiffusionFamily

__all__ = [
    "DiffusionFamily",
    "DiffusionSpec",
    "block_length_of",
    "families",
    "find_family",
    "register_family",
    "resolve_diffusion",
]

_HOW_TO_ADD = "add yours with sinkprune_plugin.diffusion.register_family, see docs/adding-a-family.md"


@dataclass(frozen=True)
class DiffusionSpec:
    """A family together with the numbers of one checkpoint.

    :param family: the family
    :param mask_token_id: id of the mask token, in [0, ``vocab_size``)
    :param vocab_size: rows of the embedding table
    :param block_length: tokens in a block of a model that was trained to denoise block by block; None for others
    """

    family: DiffusionFamily
    mask_token_id: int
    vocab_size: int
    block_length: int | None = None

    @property
    def name(self) -> str:
        """The family's name."""
        return self.family.name

    @property
    def context(self) -> ContextAttention:
        """How the tokens before an open block see each other; bidirectional where the whole sequence is one block."""
        return self.family.context

    @property
    def logit_shift(self) -> int:
        """The logit that predicts token i is at position i - logit_shift."""
        return self.family.logit_shift

    @property
    def keep_first(self) -> bool:
        """Whether the first real token is never corrupted."""
        return self.family.keep_first

    @property
    def keep_last(self) -> bool:
        """Whether the last real token is never corrupted."""
        return self.family.keep_last


_FAMILIES: dict[str, DiffusionFamily] = {}


def register_family(family: DiffusionFamily) -> None:
    """Make a family known, in place of an earlier one with the same name.

    :param family: the family
    :raises UsageError: if its fields contradict each other, or another family already has one of its model types
    """
    if not family.name or not family.model_types:
        raise UsageError(f"family {family.name!r} needs a name and at least one model_type")
    if family.corruption != "absorbing":
        raise UsageError(
            f"family {family.name!r} has corruption {family.corruption!r}; only 'absorbing' (mask token) is supported"
        )
    if (family.context == "bidirectional") != (family.block_key is None):
        raise UsageError(
            f"family {family.name!r} has context {family.context!r} and block_key {family.block_key!r}; a model that "
            "denoises block by block needs both, any other neither"
        )
    if family.logit_shift not in (0, 1):
        raise UsageError(f"family {family.name!r} has logit_shift {family.logit_shift}; it must be 0 or 1")
    for other in _FAMILIES.values():
        taken = {_key(t) for t in other.model_types} & {_key(t) for t in family.model_types}
        if taken and other.name != family.name:
            raise UsageError(
                f"model_type {sorted(taken)[0]!r} already belongs to family {other.name!r}; "
                "register under that name to replace it"
            )
    _FAMILIES[family.name] = family


def families() -> tuple[DiffusionFamily, ...]:
    """All known families: those of the catalogue, and those registered besides.

    :return: the families
    """
    for native in NATIVE_MODELS:
        if native.family.name not in _FAMILIES:
            register_family(native.family)
    return tuple(_FAMILIES.values())


def find_family(config: Any) -> DiffusionFamily | None:
    """Tell a diffusion LM from any other model.

    :param config: as for :func:`resolve_diffusion`
    :return: the family, None if the ``model_type`` belongs to none
    """
    model_type = _field(config, "model_type")
    if not isinstance(model_type, str):
        return None
    for family in families():
        if _key(model_type) in map(_key, family.shared_types) and all(
            _field(config, mark) is not None for mark in family.marks
        ):
            return family
    of_type = (family for family in families() if _key(model_type) in map(_key, family.model_types))
    return next(of_type, None)


def resolve_diffusion(config: Any, tokenizer: Any = None, *, mask_token_id: int | None = None) -> DiffusionSpec:
    """Find a model's family and its mask token.

    The mask token id is taken from, in this order: ``mask_token_id``, ``config.mask_token_id``,
    ``tokenizer.mask_token_id``, and the family's default if the vocabulary holds it.

    :param config: a transformers configuration, or the parsed content of a config.json; only read, never executed
    :param tokenizer: the model's tokenizer, if there is one
    :param mask_token_id: mask token id given by the user
    :return: family, mask token, vocabulary size, and the block length of a model that denoises block by block
    :raises UsageError: if the family is unknown, a block length is wrong, or the mask token id is missing or outside
        the vocabulary
    """
    family = find_family(config)
    if family is None:
        model_type = _field(config, "model_type")
        reason = missing_reason(model_type)
        if reason is not None:
            raise UsageError(reason)
        known = ", ".join(f"{family.name} (model_type {' or '.join(family.model_types)})" for family in families())
        raise UsageError(
            f"model_type {_field(config, 'model_type')!r} is no known family of diffusion language models; "
            f"known: {known}; {_HOW_TO_ADD}"
        )
    vocab_size = _vocab_size(config, family)
    block_length = _block_length(config, family)
    candidates = (
        ("the mask_token_id given", mask_token_id),
        ("config.mask_token_id", _field(config, "mask_token_id")),
        ("tokenizer.mask_token_id", getattr(tokenizer, "mask_token_id", None)),
    )
    for source, value in candidates:
        if value is not None:
            return DiffusionSpec(family, _checked_mask_id(value, source, vocab_size), vocab_size, block_length)
    default = family.default_mask_token_id
    if default is not None and default < vocab_size:
        return DiffusionSpec(family, default, vocab_size, block_length)
    raise UsageError(
        f"no mask token id for this {family.name} model: config.mask_token_id and the tokenizer's mask_token are "
        f"missing and the family's default ({default}) is outside its vocabulary of {vocab_size}; set mask_token_id"
    )


def _vocab_size(config: Any, family: DiffusionFamily) -> int:
    # LLaDA's embedding table may be padded beyond the tokenizer's vocabulary; padded rows are valid ids too.
    sizes = [_field(config, key) for key in ("vocab_size", "embedding_size")]
    sizes = [size for size in sizes if isinstance(size, int) and size > 0]
    if not sizes:
        raise UsageError(f"the configuration of this {family.name} model has no vocab_size; set it in config.json")
    return max(sizes)


def block_length_of(config: Any) -> int | None:
    """Tokens in a block of a model that denoises block by block.

    :param config: as for :func:`resolve_diffusion`
    :return: their number; None for a model without blocks, or of no known family
    :raises UsageError: if the configuration's number is wrong
    """
    family = find_family(config)
    return None if family is None else _block_length(config, family)


def _block_length(config: Any, family: DiffusionFamily) -> int | None:
    if family.block_key is None:
        return None
    value = _field(config, family.block_key)
    if value is None:
        return family.default_block_length
    if type(value) is not int or value < 1:
        raise UsageError(
            f"config.{family.block_key} is {value!r}; it must be the number of tokens in a block, at least 1"
        )
    return value


def _checked_mask_id(value: Any, source: str, vocab_size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{source} is {value!r}; it must be one whole number")
    if not 0 <= value < vocab_size:
        raise UsageError(f"{source} is {value}, outside the vocabulary of {vocab_size}; set the id of the mask token")
    return value


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _key(model_type: str) -> str:
    return model_type.casefold()


families()

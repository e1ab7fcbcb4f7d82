"""Widths of single decoder blocks in config.json: the key ``sinkprune_block_sizes``, specified in docs/format.md.

It is there where the ordinary options, which hold for all blocks, can't say what the blocks are. The official code
ignores keys that it doesn't know, so an option that names a formula then has a value that it does refuse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sinkprune_plugin.errors import UsageError, short

__all__ = [
    "DENSE_KEY",
    "KEPT_KEY",
    "SIZES_KEY",
    "BlockSizes",
    "check_head_width",
    "check_routing",
    "derived_head_width",
    "mark_formula",
    "ordinary_block_sizes",
    "ordinary_sizes",
    "parse_sizes",
    "sizes_in_config",
    "unmark_formula",
    "with_sizes",
]

SIZES_KEY = "sinkprune_block_sizes"
DENSE_KEY = "sinkprune_dense_parameters"
KEPT_KEY = "sinkprune_kept_experts"

# Options that say how large a model is or mark a formula, of all families whose blocks may have sizes of their own.
_OPTIONS = frozenset(
    {
        *("n_layers", "n_heads", "n_kv_heads", "multi_query_attention", "mlp_hidden_size", "block_type"),
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "hidden_act"),
        *("num_experts", "first_k_dense_replace", "moe_layer_freq", "head_dim"),
        *("dense_intermediate_size", "expert_intermediate_size", "moe_intermediate_size"),
        *(SIZES_KEY, DENSE_KEY, KEPT_KEY),
    }
)

_EXPERTS = "experts"
_SHARED = "shared_channels"

# Shown by official code as the name of an unknown formula, hence with what to do.
_MARK = f" with {SIZES_KEY} (load it with sinkprune-plugin)"


@dataclass(frozen=True)
class BlockSizes:
    """Units of one decoder block.

    :param mlp_channels: width of the gated MLP, or of each expert
    :param attention_heads: query heads
    :param key_value_heads: key and value heads; divides ``attention_heads``
    :param experts: experts that a router chooses from; 0 in a block without
    :param shared_channels: width of the expert that all tokens go to; 0 where there is none
    """

    mlp_channels: int
    attention_heads: int
    key_value_heads: int
    experts: int = 0
    shared_channels: int = 0

    @property
    def common_channels(self) -> int:
        """Channels that all tokens go through: of the MLP or of the shared expert; 0 where all experts are routed."""
        return self.shared_channels if self.experts else self.mlp_channels

    def to_json(self) -> dict[str, int]:
        """One entry of ``sinkprune_block_sizes``; only a block with experts has numbers of these."""
        return {name: value for name, value in asdict(self).items() if value or name not in (_EXPERTS, _SHARED)}


def ordinary_sizes(config: Any) -> BlockSizes:
    """What the ordinary options say of each block; none is larger where ``sinkprune_block_sizes`` says more.

    :param config: LLaDA's, Dream's or another configuration with transformers' names
    :return: the sizes, unchecked
    """
    heads = config.num_attention_heads
    return BlockSizes(config.intermediate_size, heads, config.num_key_value_heads or heads)


def sizes_in_config(config: Any) -> list[BlockSizes]:
    """Sizes of each decoder block, by the configuration.

    A configuration whose ordinary options don't say the same of all blocks has a method ``ordinary_block_sizes``, and
    ``fit_ordinary_options`` to make them say as much of other sizes as they can.

    :param config: configuration whose ordinary options have been checked
    :return: one entry per block
    :raises UsageError: if ``sinkprune_block_sizes`` isn't a valid list, naming the entry
    """
    ordinary, stored = ordinary_block_sizes(config), getattr(config, SIZES_KEY, None)
    return ordinary if stored is None else parse_sizes(stored, len(ordinary), ordinary)


def ordinary_block_sizes(config: Any) -> list[BlockSizes]:
    """What the ordinary options say of each decoder block.

    :param config: see :func:`sizes_in_config`
    :return: one entry per block, unchecked
    """
    each = getattr(config, "ordinary_block_sizes", None)
    if each is None:
        return [ordinary_sizes(config)] * config.num_hidden_layers
    found: list[BlockSizes] = each()
    return found


def check_routing(config: Any) -> None:
    """Check that every block with experts has at least as many as each token goes to.

    :param config: configuration whose numbers have been checked one by one
    :raises UsageError: naming the block
    """
    chosen = config.num_experts_per_tok
    for number, sizes in enumerate(sizes_in_config(config)):
        if 0 < sizes.experts < chosen:
            raise UsageError(
                f"decoder block {number} has {sizes.experts} experts, fewer than the num_experts_per_tok={chosen} that "
                "each token goes to; correct config.json, or keep more experts"
            )


def parse_sizes(stored: Any, blocks: int, largest: Sequence[BlockSizes] | None = None) -> list[BlockSizes]:
    """Check the value of ``sinkprune_block_sizes``.

    :param stored: the value, not None
    :param blocks: number of decoder blocks
    :param largest: what each block may not exceed, if that is known
    :return: one entry per block
    :raises UsageError: naming the entry that is wrong
    """
    if not isinstance(stored, list | tuple):
        raise _wrong(f"{SIZES_KEY} is of type {type(stored).__name__}; it must be a list, one entry per decoder block")
    if len(stored) != blocks:
        raise _wrong(f"{SIZES_KEY} has {len(stored)} entries for {blocks} decoder blocks")
    return [_entry(number, entry, None if largest is None else largest[number]) for number, entry in enumerate(stored)]


def _entry(number: int, entry: Any, largest: BlockSizes | None) -> BlockSizes:
    where = f"{SIZES_KEY}[{number}]"
    names = [field.name for field in fields(BlockSizes) if field.name not in (_EXPERTS, _SHARED)]
    # Unknown where the ordinary options are: then an entry may say it or not.
    routed = largest.experts > 0 if largest is not None else isinstance(entry, Mapping) and _EXPERTS in entry
    names += [_EXPERTS] if routed else []
    if isinstance(entry, Mapping) and _SHARED in entry and (largest is None or largest.shared_channels):
        names.append(_SHARED)
    elif isinstance(entry, Mapping) and largest is not None and largest.shared_channels:
        # Where only experts were removed, entries needn't repeat it.
        entry = {**entry, _SHARED: largest.shared_channels}
        names.append(_SHARED)
    if not isinstance(entry, Mapping) or set(entry) != set(names):
        found = sorted(map(str, entry)) if isinstance(entry, Mapping) else entry
        raise _wrong(f"{where} must have the keys {', '.join(names)}, not {short(repr(found))}")
    for name in names:
        value = entry[name]
        if type(value) is not int or value < 1:
            raise _wrong(f"{where}.{name} is {short(repr(value))}; it must be a whole number of at least 1")
        most = value if largest is None else getattr(largest, name)
        if value > most:
            raise _wrong(f"{where}.{name} is {value}, more than the {most} that the ordinary options allow any block")
    sizes = BlockSizes(**entry)
    if sizes.attention_heads % sizes.key_value_heads:
        raise _wrong(
            f"{where}.attention_heads is {sizes.attention_heads}, no multiple of its {sizes.key_value_heads} "
            "key_value_heads"
        )
    return sizes


def _wrong(what: str) -> UsageError:
    return UsageError(f"{what}; correct config.json")


def derived_head_width(width: Any, heads: Any, *, sized: bool) -> int:
    """Width of a head where the configuration doesn't say it.

    :param width: of the hidden states
    :param heads: query heads
    :param sized: whether the configuration has ``sinkprune_block_sizes``, from which it can't be derived
    :return: the width, 0 where there is none; :func:`check_head_width` tells whether it fits
    """
    return width // heads if not sized and type(width) is type(heads) is int and heads > 0 else 0


def check_head_width(config: Any, width: str, heads: str) -> None:
    """Check the width of a head. Heads that don't fill the hidden states need ``sinkprune_block_sizes``.

    The ordinary options alone must mean what they mean to the official code, which divides the first by the second.

    :param config: configuration whose numbers have been checked one by one
    :param width: name of the option with the width of the hidden states
    :param heads: name of the option with the query heads
    :raises UsageError: if the width is odd, or isn't the quotient
    """
    given, count = getattr(config, width), getattr(config, heads)
    fills = config.head_dim * count == given or getattr(config, SIZES_KEY, None) is not None
    if config.head_dim % 2 or not fills:
        raise UsageError(
            f"{width}={given} over {heads}={count} must give heads of one even width, which head_dim={config.head_dim} "
            "isn't; change one of them"
        )


def mark_formula(config: dict[str, Any], option: str) -> dict[str, Any]:
    """Make official code refuse a configuration that it would compute wrongly, in words that say what to do.

    :param config: keys as they are going to be written, changed in place
    :param option: a key whose unknown values official code refuses by name
    :return: ``config``
    """
    value = config.get(option)
    if config.get(SIZES_KEY) is not None and isinstance(value, str) and not value.endswith(_MARK):
        config[option] = value + _MARK
    return config


def unmark_formula(value: Any, *, sized: bool) -> Any:
    """Undo :func:`mark_formula` for one value.

    :param value: as in config.json
    :param sized: whether the configuration has ``sinkprune_block_sizes``; without it, the mark stays and is refused
    """
    return value.removesuffix(_MARK) if sized and isinstance(value, str) else value


def with_sizes(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A config.json from before units were removed, with the sizes from after it.

    :param saved: content of the file
    :param config: content that the model's configuration would have
    :return: ``saved`` itself where no units were removed, else a copy with all options that say sizes
    """
    if config.get(DENSE_KEY) is None:
        return saved
    others = {key: value for key, value in saved.items() if key not in _OPTIONS}
    return others | {key: value for key, value in config.items() if key in _OPTIONS}

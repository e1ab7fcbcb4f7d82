"""Units of decoder blocks in memory: how many there are, and keeping some of them, so that the model gets smaller.

A unit is a channel of the gated MLP, a query head, or a whole block. Removing one takes rows and columns out of all
Linears that share it (:class:`~sinkprune_plugin.models.catalogue.Units`). In a block with routed experts the MLP is the
expert that all tokens go to, if there is one. After each of these functions the model's
configuration says what the model is, so that ``save_pretrained`` and ``from_pretrained`` give the same model again.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.catalogue import NATIVE_MODELS, Units, native_model
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.models.sizes_in_config import (
    DENSE_KEY,
    KEPT_KEY,
    SIZES_KEY,
    BlockSizes,
    ordinary_block_sizes,
    ordinary_sizes,
    sizes_in_config,
)
from sinkprune_plugin.models.unit_linears import experts_in_block, experts_of_family, unit_linears

__all__ = [
    "BlockSizes",
    "block_sizes",
    "keep_units",
    "record_dense",
    "remove_blocks",
    "require_own_weights",
    "settle_config",
    "units_of",
]


def units_of(model: nn.Module) -> Units:
    """What can be removed from a model's decoder blocks.

    :param model: a native model
    :return: the names of the Linears that share units
    :raises UsageError: if the model's family has none in the catalogue, or the model is of another class than ours
    """
    config = getattr(model, "config", None)
    model_type, native = getattr(config, "model_type", None), native_model(config)
    if native is None or native.units is None:
        known = ", ".join(native.model_type for native in NATIVE_MODELS if native.units is not None)
        raise UsageError(
            f"{type(model).__name__} (model_type {model_type!r}) has no units in sinkprune_plugin/models/catalogue.py, "
            f"only {known} have; docs/adding-a-family.md says how to add a family"
        )
    if not isinstance(model, native.model_class()):
        raise UsageError(
            f"{type(model).__name__} of {type(model).__module__} isn't this package's class for {model_type}, which "
            "alone computes blocks of different sizes; load the model without remote code"
        )
    return native.units


def block_sizes(model_or_config: Any) -> list[BlockSizes]:
    """Sizes of each decoder block.

    :param model_or_config: a native model, or its configuration
    :return: one entry per block; of a model those of its weights, of a configuration those it asks for
    :raises UsageError: if the configuration is wrong, or the model's family has no units
    """
    if not isinstance(model_or_config, nn.Module):
        return sizes_in_config(model_or_config)
    units, config = units_of(model_or_config), _config(model_or_config)
    return [_sizes(block, units, config) for block in find_decoder_blocks(model_or_config)[1]]


def _config(model: nn.Module) -> Any:
    # To mypy an attribute of a Module is a tensor or a module.
    return model.config


def _sizes(block: nn.Module, units: Units, config: Any) -> BlockSizes:
    heads = _linear(block, units.head_columns).in_features // config.head_dim
    rows = _linear(block, units.key_value_rows[0]).out_features // config.head_dim
    # Queries first, then keys and values, or keys alone.
    key_value_heads = (rows - heads) // 2 if units.key_value_rows[0] == units.head_rows else rows
    channels = unit_linears(block, units).get("channels")
    common = 0 if channels is None else _linear(block, channels[-1]).in_features
    experts = experts_in_block(block, config)
    if experts is None:
        return BlockSizes(common, heads, key_value_heads)
    width = _linear(experts[0], experts_of_family(config).down).in_features
    return BlockSizes(width, heads, key_value_heads, len(experts), common)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def require_own_weights(model: nn.Module) -> None:
    """Check that no Linear which shares units also shares its weights, before long work.

    :param model: a native model
    :raises UsageError: naming the Linear
    """
    units = units_of(model)
    name, blocks = find_decoder_blocks(model)
    linears = {
        f"{index}.{part}": _linear(block, part)
        for index, block in enumerate(blocks)
        for parts in unit_linears(block, units).values()
        for part in parts
    }
    _refuse_shared(model, linears, name)


def keep_units(
    model: nn.Module,
    block_index: int,
    *,
    channels: torch.Tensor | None = None,
    heads: torch.Tensor | None = None,
    expert_channels: Sequence[torch.Tensor] | None = None,
) -> None:
    """Remove all other units from one decoder block, in place; what stays keeps its order.

    With grouped-query attention each key and value head must keep all, none or one common number of its query heads; a
    key and value head without query heads is removed too.

    :param model: a native model, may be offloaded with compressed-tensors
    :param block_index: number of the block
    :param channels: (n,) int64, channels of the MLP or shared expert that stay; None: all
    :param heads: (m,) int64, query heads that stay; None: all
    :param expert_channels: for each routed expert (n,) int64, its channels that stay, as many of each; None: all
    :raises UsageError: if nothing would stay, an index is out of range or there twice, the query heads don't fit the
        key and value heads, or a Linear shares its weight with another, is quantized by groups of columns or on the
        meta device
    """
    units, head_dim = units_of(model), _config(model).head_dim
    name, blocks = find_decoder_blocks(model)
    block, where = blocks[block_index], f"{name}.{block_index}"
    sizes, linears = _sizes(block, units, _config(model)), unit_linears(block, units)
    rows: dict[str, torch.Tensor] = {}
    columns: dict[str, torch.Tensor] = {}
    if channels is not None:
        if "channels" not in linears:
            raise UsageError(
                f"{where} has routed experts only, and their channels stay; remove whole experts, or channels of "
                "another block"
            )
        kept = _checked(channels, sizes.common_channels, f"{where}: channels")
        *writers, reader = linears["channels"]
        rows |= dict.fromkeys(writers, kept)
        columns[reader] = kept
    if heads is not None:
        kept = _checked(heads, sizes.attention_heads, f"{where}: attention heads")
        groups = _kept_groups(kept, sizes, where)
        columns[units.head_columns] = _elements(kept, head_dim)
        rows |= _head_rows(units, sizes, kept, groups, head_dim)
    if expert_channels is not None:
        names = experts_of_family(_config(model))
        for number, kept in enumerate(_checked_experts(expert_channels, sizes, where)):
            expert = f"{names.experts}.{number}"
            rows |= {f"{expert}.{names.gate}": kept, f"{expert}.{names.up}": kept}
            columns[f"{expert}.{names.down}"] = kept
    changed = {part: _linear(block, part) for part in (*rows, *columns)}
    _refuse_shared(model, changed, where)
    for part, linear in changed.items():
        _refuse_unknown(linear, f"{where}.{part}", cut=part in columns)
    record_dense(model)
    for part, linear in changed.items():
        _slice(linear, rows.get(part), columns.get(part))
    settle_config(model)


def _head_rows(
    units: Units, sizes: BlockSizes, heads: torch.Tensor, groups: torch.Tensor, head_dim: int
) -> dict[str, torch.Tensor]:
    """Rows that stay of the Linears that write queries, keys and values."""
    if units.head_rows not in units.key_value_rows:
        return {units.head_rows: _elements(heads, head_dim)} | dict.fromkeys(
            units.key_value_rows, _elements(groups, head_dim)
        )
    keys = sizes.attention_heads + groups
    return {units.head_rows: _elements(torch.cat((heads, keys, keys + sizes.key_value_heads)), head_dim)}


def remove_blocks(model: nn.Module, indices: Collection[int]) -> None:
    """Remove whole decoder blocks, in place; those that stay move up.

    :param model: a native model
    :param indices: numbers of the blocks to remove
    :raises UsageError: if no block would stay, or there is no block of a number
    """
    units_of(model)
    name, blocks = find_decoder_blocks(model)
    wrong = sorted(index for index in indices if not 0 <= index < len(blocks))
    if wrong:
        raise UsageError(f"{name} has no block {wrong[0]}, only 0 to {len(blocks) - 1}; name one of those")
    gone = set(indices)
    if len(gone) == len(blocks):
        raise UsageError(f"all {len(blocks)} blocks of {name} would be removed; keep at least one")
    record_dense(model)
    # The list itself stays: forward and hooks hold on to it.
    for index in sorted(gone, reverse=True):
        del blocks[index]
    config = _config(model)
    config.num_hidden_layers = len(blocks)
    kept_experts = getattr(config, KEPT_KEY, None)
    if kept_experts is not None:
        setattr(config, KEPT_KEY, [each for index, each in enumerate(kept_experts) if index not in gone])
    settle_config(model)


def settle_config(model: nn.Module) -> None:
    """Make the configuration say what the model's weights are. Idempotent.

    Where the ordinary options can say it, they do, and official code loads the checkpoint. Otherwise
    ``sinkprune_block_sizes`` holds the sizes of each block. The numbers of heads among the ordinary options are never
    changed, since official code divides the width by them to get that of a head.

    :param model: a native model
    :raises UsageError: if its family has no units
    """
    config, sizes = _config(model), block_sizes(model)
    config.num_hidden_layers = len(sizes)
    if hasattr(config, "fit_ordinary_options"):
        config.fit_ordinary_options(sizes)
    else:
        channels = max(block.mlp_channels for block in sizes)
        if channels != ordinary_sizes(config).mlp_channels:
            config.intermediate_size = channels
    if sizes == ordinary_block_sizes(config):
        if hasattr(config, SIZES_KEY):
            delattr(config, SIZES_KEY)
    else:
        setattr(config, SIZES_KEY, [block.to_json() for block in sizes])


def _checked(indices: torch.Tensor, count: int, what: str) -> torch.Tensor:
    kept = indices.detach().cpu().sort().values
    if kept.dtype != torch.int64 or kept.dim() != 1:
        raise UsageError(
            f"{what} to keep are given as {kept.dtype} of {kept.dim()} dimensions; give their numbers, a list of int64"
        )
    if not len(kept):
        raise UsageError(f"{what}: none of {count} would stay; keep at least one, or remove the whole block")
    if kept[0] < 0 or kept[-1] >= count:
        wrong = int(kept[0] if kept[0] < 0 else kept[-1])
        raise UsageError(f"{what} are numbered from 0 to {count - 1}; there is none of number {wrong}")
    if bool((kept[1:] == kept[:-1]).any()):
        raise UsageError(f"{what}: {int(kept[1:][kept[1:] == kept[:-1]][0])} is named twice; name each once")
    return kept


def _checked_experts(kept: Sequence[torch.Tensor], sizes: BlockSizes, where: str) -> list[torch.Tensor]:
    if len(kept) != sizes.experts or len({len(each) for each in kept}) > 1:
        raise UsageError(
            f"{where}: channels of {len(kept)} experts are given, {sorted({len(each) for each in kept})} of each; give "
            f"as many for each of its {sizes.experts} experts"
        )
    return [_checked(each, sizes.mlp_channels, f"{where}: channels of an expert") for each in kept]


def _kept_groups(heads: torch.Tensor, sizes: BlockSizes, where: str) -> torch.Tensor:
    """Key and value heads that keep query heads, checked for as many each."""
    share = sizes.attention_heads // sizes.key_value_heads
    groups, counts = (heads // share).unique(return_counts=True)
    if counts.min() != counts.max():
        raise UsageError(
            f"{where}: key and value head {int(groups[counts.argmin()])} would keep {int(counts.min())} of its {share} "
            f"query heads and {int(groups[counts.argmax()])} would keep {int(counts.max())}; keep as many of each, or "
            "none"
        )
    return groups


def _elements(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    return (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()


def _parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    # Where compressed-tensors offloads a module, its dict brings a tensor in at each access; these are those at rest.
    stored = getattr(module._parameters, "offloaded_values", module._parameters)
    return ((name, tensor) for name, tensor in stored.items() if tensor is not None)


def _refuse_shared(model: nn.Module, changed: dict[str, nn.Linear], where: str) -> None:
    owners = Counter(
        id(tensor) for _, module in model.named_modules(remove_duplicate=False) for _, tensor in _parameters(module)
    )
    for part, linear in changed.items():
        for name, tensor in _parameters(linear):
            if owners[id(tensor)] > 1:
                raise UsageError(
                    f"{where}.{part}.{name} is shared with another module, which would lose the same units; give each "
                    "module its own weights first"
                )


def _refuse_unknown(linear: nn.Linear, name: str, *, cut: bool) -> None:
    """Refuse what can't be sliced: weights that aren't there, and scales that belong to several columns."""
    offloaded = hasattr(linear._parameters, "offloaded_values")
    for kind, tensor in _parameters(linear):
        if tensor.is_meta and not offloaded:
            raise UsageError(
                f"{name}.{kind} is on the meta device, so there is nothing to keep a part of; load the model without "
                "accelerate's disk offloading (llm-compressor's own is fine)"
            )
        if cut and kind != "weight" and tensor.dim() > 1 and tensor.shape[1] > 1:
            raise UsageError(
                f"{name} is quantized by groups of columns, of which some would go; remove units before quantizing"
            )


@torch.no_grad()
def _slice(linear: nn.Linear, rows: torch.Tensor | None, columns: torch.Tensor | None) -> None:
    for name, stored in list(_parameters(linear)):
        # Rows of everything there is per row, scales of a quantization included.
        kept_rows = rows if stored.dim() > 0 and stored.shape[0] == linear.out_features else None
        kept_columns = columns if name == "weight" else None
        if kept_rows is None and kept_columns is None:
            continue
        tensor = getattr(linear, name)
        if kept_rows is not None:
            tensor = tensor.index_select(0, kept_rows.to(tensor.device))
        if kept_columns is not None:
            tensor = tensor.index_select(1, kept_columns.to(tensor.device))
        # A tensor of another size can't be copied into the offloaded one; deleted and set, it is offloaded anew.
        delattr(linear, name)
        linear.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=stored.requires_grad))
    linear.out_features, linear.in_features = (int(size) for size in linear.weight.shape)


def record_dense(model: nn.Module) -> None:
    """Note in the configuration how many parameters the model has, before units leave it for the first time.

    :param model: the model
    """
    if getattr(model.config, DENSE_KEY, None) is None:
        setattr(model.config, DENSE_KEY, sum(tensor.numel() for tensor in _distinct_parameters(model)))


def _distinct_parameters(model: nn.Module) -> Collection[torch.Tensor]:
    return {id(tensor): tensor for module in model.modules() for _, tensor in _parameters(module)}.values()

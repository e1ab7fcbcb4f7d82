"""What `sinkprune info` prints: compact tables that fit the terminal."""

from collections.abc import Iterator
from itertools import groupby

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sinkprune_plugin.inspection.info import CheckpointInfo, LayerInfo, summary
from sinkprune_plugin.models.sizes_in_config import BlockSizes

__all__ = ["print_info"]

_NUMBER_WIDTH = 6
_GAP = 2
_MOST_NAMES = 8


def print_info(info: CheckpointInfo, console: Console) -> None:
    """Print what is in a checkpoint.

    :param info: what :func:`~sinkprune_plugin.inspection.info.inspect_checkpoint` found
    :param console: where to print
    """
    for line in _lines(info):
        # Names and paths are never parsed as markup, nor broken where a line is too long for the terminal.
        console.print(Text(line), soft_wrap=True)
    tables: list[tuple[str, Table]] = []
    if info.linears:
        tables.append(("Linears in decoder blocks", _by_type(info)))
        tables += _by_block(info, console.width)
    if info.block_sizes is not None:
        tables.append(("sizes of decoder blocks", _sizes(info.block_sizes)))
    others = {name: layer for name, layer in info.layers.items() if layer.role != "linear"}
    if others:
        tables.append(("outside of the blocks: not pruned unless named", _not_pruned(others)))
    for title, table in [*tables, ("who can load it", _readers(info))]:
        console.print()
        console.print(Text(title), soft_wrap=True)
        console.print(table)


def _lines(info: CheckpointInfo) -> Iterator[str]:
    found = info.to_json()
    yield info.path
    yield f"model type {info.model_type}, diffusion family {info.family or 'none'}"
    line = f"format {found['format']}"
    if found["layout"]:
        line += f", layout {found['layout']}"
    if found["quantization"]:
        line += f", quantized by {found['quantization']['method']} ({found['quantization']['format'] or 'no format'})"
    yield line
    yield (
        f"{info.file_bytes / 1e6:.2f} MB on disk in {info.files} file{'s' if info.files > 1 else ''}; "
        f"{info.tensors} tensors in {info.stored_bytes / 1e6:.2f} MB, {info.ratio:.4f} of "
        f"{info.dense_bytes / 1e6:.2f} MB dense"
    )
    line = f"{info.parameters:,} parameters"
    if info.unpruned_parameters is not None:
        share = info.parameters / info.unpruned_parameters
        line += f", {share:.4f} of the {info.unpruned_parameters:,} before units were removed"
    yield line
    if info.uncounted:
        more = len(info.uncounted) - 1
        yield f"zeros not counted in packed weights: {info.uncounted[0]}{f' and {more} more' if more else ''}"
    if not info.linears:
        yield "no weight matrix in a numbered decoder block"


def _table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(Text(column), justify="right" if column in numbers else "left", overflow="fold")
    return table


def _by_type(info: CheckpointInfo) -> Table:
    numbers = ("matrices", "weights", "sparsity")
    table = _table("module type", *numbers, "structure", numbers=numbers)
    for name, layers in info.types.items():
        table.add_row(*_row(name, layers))
    table.add_section()
    table.add_row(*_row("all", info.linears))
    return table


def _row(name: str, layers: list[LayerInfo]) -> tuple[Text, ...]:
    found = summary(layers)
    structure = found["structure"]
    if len(found["structures"]) > 1:
        structure += f" ({', '.join(f'{number} × {each}' for each, number in found['structures'].items())})"
    cells = (name, str(len(layers)), f"{found['weights']:,}", f"{found['sparsity']:.4f}", structure)
    return tuple(map(Text, cells))


def _sizes(block_sizes: list[BlockSizes]) -> Table:
    """A row for each run of blocks that are alike."""
    routed, shared = any(sizes.experts for sizes in block_sizes), any(sizes.shared_channels for sizes in block_sizes)
    others = (*(["experts"] if routed else []), *(["shared channels"] if shared else []))
    numbers = ("MLP channels", "attention heads", "key and value heads", *others)
    table = _table("block", *numbers, numbers=numbers)
    first = 0
    for sizes, run in groupby(block_sizes):
        last = first + len(list(run)) - 1
        cells = [sizes.mlp_channels, sizes.attention_heads, sizes.key_value_heads]
        cells += [*([sizes.experts] if routed else []), *([sizes.shared_channels] if shared else [])]
        table.add_row(*map(Text, (f"{first}" if first == last else f"{first} to {last}", *map(str, cells))))
        first = last + 1
    return table


def _by_block(info: CheckpointInfo, width: int) -> Iterator[tuple[str, Table]]:
    """A row for each block, a column for each module type; in several tables where a terminal is too narrow for one."""
    blocks = info.blocks
    lists = {block.rpartition(".")[0] for block in blocks}
    # The name of the list goes above the table, unless the blocks are in several lists.
    label = {block: block.rpartition(".")[2] if len(lists) == 1 else block for block in blocks}
    title = "sparsity by block" + (f" of {next(iter(lists))}" if len(lists) == 1 and any(lists) else "")
    first = max(len("block"), *map(len, label.values()))
    for types in _fitting([*info.types, "all"], width - first - 1):
        table = _table("block", *types, numbers=tuple(types))
        for block, found in blocks.items():
            row = found | {"all": [layer for layers in found.values() for layer in layers]}
            cells = [f"{summary(row[each])['sparsity']:.4f}" if each in row else "–" for each in types]
            table.add_row(*map(Text, (label[block], *cells)))
        yield title, table


def _fitting(columns: list[str], width: int) -> Iterator[list[str]]:
    part: list[str] = []
    used = 0
    for column in columns:
        needed = max(len(column), _NUMBER_WIDTH) + _GAP
        if part and used + needed > width:
            yield part
            part, used = [], 0
        part.append(column)
        used += needed
    yield part


def _not_pruned(layers: dict[str, LayerInfo]) -> Table:
    numbers = ("weights", "sparsity")
    table = _table("module", "", *numbers, numbers=numbers)
    for name, layer in list(layers.items())[:_MOST_NAMES]:
        kind = "" if layer.role == "outside" else layer.role
        table.add_row(*map(Text, (name, kind, f"{layer.count.weights:,}", f"{layer.count.sparsity:.4f}")))
    if len(layers) > _MOST_NAMES:
        table.add_row(Text(f"and {len(layers) - _MOST_NAMES} more (--json has all)"), "", "", "")
    return table


def _readers(info: CheckpointInfo) -> Table:
    table = _table("", "loads", "")
    for reader in info.readers:
        table.add_row(*map(Text, (reader.reader, reader.loads, reader.note)))
    return table

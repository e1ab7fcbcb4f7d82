"""Experts that a checkpoint stores as one 3-D tensor for all experts of a layer, in place of a module for each.

The published checkpoints of the mixtures here have a module for each expert. With E experts of I channels and hidden
states of width H, tools that fuse them write

- transformers 5: ``mlp.experts.gate_up_proj`` (E, 2 · I, H), each expert's rows of the gate before those of up, and
  ``mlp.experts.down_proj`` (E, H, I);
- inclusionAI/dFactory, for training (scripts/moe_convertor.py): ``mlp.experts.gate_proj`` and ``mlp.experts.up_proj``
  (E, I, H), and ``mlp.experts.down_proj``;
- inclusionAI/dInfer (tools/transfer.py): ``mlp.w1`` and ``mlp.w2``, with the shapes of the first.

Everything else is refused by name and shape. Models hold a module for each expert whatever the file has, and are saved
like that.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.models.catalogue import Experts
from sinkprune_plugin.models.sizes_in_config import BlockSizes, sizes_in_config

__all__ = [
    "FusedTensor",
    "find_fused",
    "fused_layouts",
    "refuse_unknown",
    "split_fused",
    "unknown_pattern",
    "with_experts_apart",
]


@dataclass(frozen=True)
class FusedTensor:
    """One 3-D tensor of a checkpoint.

    :param name: its full name
    :param prefix: the name before the number of its block
    :param block: number of its block
    :param projections: names of the Linears in an expert whose rows it holds, one after the other
    """

    name: str
    prefix: str
    block: int
    projections: tuple[str, ...]

    def check(self, shape: Sequence[int], names: Experts, sizes: BlockSizes, width: int) -> None:
        """Compare a shape with the configuration's.

        :param shape: of the tensor
        :param names: where the family's experts are
        :param sizes: of its block
        :param width: of the hidden states
        :raises UsageError: if they differ
        """
        rows, columns = sizes.mlp_channels * len(self.projections), width
        if self.projections == (names.down,):
            rows, columns = width, sizes.mlp_channels
        wanted = (sizes.experts, rows, columns)
        if tuple(shape) != wanted:
            raise UsageError(
                f"{short(self.name)} is {list(shape)} in its file, and config.json asks for {list(wanted)} (experts, "
                "rows, columns); correct config.json, or store each expert's weights in tensors of their own"
            )


def fused_layouts(names: Experts) -> Mapping[str, tuple[str, ...]]:
    """The fused tensors that are understood.

    :param names: where the family's experts are
    :return: name within a block → names of the Linears in an expert whose rows it holds
    """
    layer = names.experts.rpartition(".")[0]
    both = (names.gate, names.up)
    single = {f"{names.experts}.{each}": (each,) for each in (*both, names.down)}
    return single | {
        f"{names.experts}.gate_up_proj": both,
        f"{layer}.w1": both,
        f"{layer}.w2": (names.down,),
    }


def find_fused(name: str, names: Experts) -> FusedTensor | None:
    """What a tensor holds, by its name.

    :param name: its full name
    :param names: where the family's experts are
    :return: None unless it is fused experts in a layout that is understood
    """
    match = re.fullmatch(r"(?P<prefix>(?:.*?\.)?)(?P<block>\d+)\.(?P<rest>\D.*)", name)
    projections = None if match is None else fused_layouts(names).get(match["rest"])
    if match is None or projections is None:
        return None
    return FusedTensor(name, match["prefix"], int(match["block"]), projections)


def split_fused(tensor: torch.Tensor, projections: Sequence[str]) -> Iterator[tuple[int, str, torch.Tensor]]:
    """The weights in a fused tensor.

    :param tensor: (E, rows, columns), checked
    :param projections: see :class:`FusedTensor`
    :return: number of the expert, name of its Linear, and the Linear's weight, a view
    """
    for number, expert in enumerate(tensor.unbind()):
        for projection, weight in zip(projections, expert.chunk(len(projections)), strict=True):
            yield number, projection, weight


def unknown_pattern(names: Experts) -> str:
    """A pattern found in names of tensors that seem to be experts in a layout which isn't understood.

    :param names: where the family's experts are
    :return: regular expression
    """
    layer, _, experts = names.experts.rpartition(".")
    known = "|".join((experts, names.router.rpartition(".")[2], "shared_experts", names.gate, names.up, names.down))
    fused = "|".join(re.escape(each) for each in fused_layouts(names))
    return rf"(?<=\d\.)(?!(?:{fused})$)(?:{re.escape(names.experts)}\.(?!\d)|{re.escape(layer)}\.(?!(?:{known})\.)).+$"


def refuse_unknown(name: str, shape: Sequence[int], names: Experts) -> UsageError:
    """The error for a tensor that :func:`unknown_pattern` finds.

    :param name: its full name
    :param shape: its shape
    :param names: where the family's experts are
    """
    fused = ", ".join(sorted(fused_layouts(names)))
    return UsageError(
        f"{short(name)} {list(shape)} isn't a layout of experts that is understood; these are {names.experts}.N."
        f"{names.gate}.weight and so on for each expert N, or {fused}: store the weights in one of them"
    )


def with_experts_apart(
    config: Any, names: Experts, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass tensors on, those of fused experts as one for each Linear of each expert.

    :param config: configuration of the model
    :param names: where the family's experts are
    :param weights: name in the checkpoint → tensor
    :return: names as in a checkpoint with a module for each expert
    :raises UsageError: for a layout that isn't understood, or a shape that isn't the configuration's
    """
    sizes, unknown = sizes_in_config(config), re.compile(unknown_pattern(names))
    for name, tensor in weights:
        fused = find_fused(name, names)
        if fused is None:
            if unknown.search(name):
                raise refuse_unknown(name, tensor.shape, names)
            yield name, tensor
            continue
        if fused.block >= len(sizes):
            raise UsageError(
                f"{short(name)} is in the checkpoint, and config.json asks for {len(sizes)} decoder blocks; correct "
                "config.json, or fetch both again"
            )
        fused.check(tensor.shape, names, sizes[fused.block], config.hidden_size)
        for number, projection, weight in split_fused(tensor, fused.projections):
            yield f"{fused.prefix}{fused.block}.{names.experts}.{number}.{projection}.weight", weight

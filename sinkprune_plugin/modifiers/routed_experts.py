"""Routed experts in decoder blocks: found, so that they can be refused instead of being pruned wrongly."""

from collections.abc import Collection, Iterator

import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["refuse_routed_experts"]


def refuse_routed_experts(
    blocks_name: str, blocks: torch.nn.ModuleList, ignored: Collection[int], known: Collection[int] = ()
) -> None:
    """Refuse decoder blocks with experts that the user doesn't ignore and whose routing isn't known.

    An expert sees the tokens that are routed to it only, and how many those are differs from expert to expert. With
    all tokens sent to all experts, as llm-compressor does while it calibrates, their statistics would include tokens
    that they never see; experts fused into one tensor would silently stay dense.

    :param blocks_name: module name of the list of decoder blocks
    :param blocks: the decoder blocks
    :param ignored: ``id`` of each module that ``ignore`` matches
    :param known: ``id`` of each list of experts whose routing is known
    :raises UsageError: if a block has experts that are neither
    """
    for index, block in enumerate(blocks):
        for name, module, count in _experts(block):
            linears = list(_linears(module))
            if (
                id(module) in known
                or id(module) in ignored
                or (linears and all(id(child) in ignored for child in linears))
            ):
                continue
            parent = name.split(".")[0]
            raise UsageError(
                f"{blocks_name}.{index}.{name} holds {count} routed experts, which this modifier doesn't support; add "
                f'"re:.*\\.{parent}(\\..*)?$" to `ignore` to prune the rest of the model, or take a model without '
                "experts"
            )


def _experts(block: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, int]]:
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            # llm-compressor's list of experts has their activation function in it too.
            count = sum(any(True for _ in _linears(entry)) for entry in module)
            if count > 1:
                yield name, module, count
        # Experts fused into one parameter (experts, rows, columns), as transformers keeps them.
        fused = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
        if fused and name:
            yield name, module, len(fused[0])


def _linears(module: torch.nn.Module) -> Iterator[torch.nn.Linear]:
    return (child for child in module.modules() if isinstance(child, torch.nn.Linear))

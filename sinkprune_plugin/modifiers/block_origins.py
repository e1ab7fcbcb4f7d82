"""Which of a dense model's decoder blocks those of a pruned model were, where some were removed."""

from collections.abc import Mapping, Sequence

import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["find_origins"]

# Of a matrix so many rows are compared.
ROWS = 4
# The block that was found must be so many times closer than any other that could stand in its place.
CLEARLY = 2.0

_Tensors = Mapping[str, torch.Tensor]
# By name in the block: the shape of a tensor, and what of it is compared.
_Parts = Mapping[str, tuple[torch.Size, torch.Tensor]]


def find_origins(
    blocks_name: str, blocks: torch.nn.ModuleList, dense_weights: Mapping[str, torch.Tensor], dense_count: int
) -> list[int]:
    """Recognise the blocks by what pruning leaves alone, in rising order.

    Norms and biases are compared first, which structured pruning doesn't change; where blocks have the same ones, rows
    of the matrices that have kept their shape as well.

    :param blocks_name: full name of the list of decoder blocks
    :param blocks: the pruned model's
    :param dense_weights: full name → dense weight
    :param dense_count: decoder blocks of the dense model
    :return: number of each pruned block among the dense ones, rising
    :raises UsageError: if there are more pruned blocks than dense ones, or it isn't clear which is which
    """
    if len(blocks) > dense_count:
        raise UsageError(
            f"the pruned model has {len(blocks)} decoder blocks and the dense one {dense_count}; name the model that "
            "it was pruned from"
        )
    if len(blocks) == dense_count:
        return list(range(dense_count))
    names = [name for name, _ in blocks[0].named_parameters()]
    doubt = ""
    for rows in (0, ROWS):
        pruned = [_parts(dict(block.named_parameters()), rows) for block in blocks]
        dense = []
        for index in range(dense_count):
            full = {name: f"{blocks_name}.{index}.{name}" for name in names}
            known = {name: dense_weights[other] for name, other in full.items() if other in dense_weights}
            dense.append(_parts(known, rows))
        costs = [[_difference(one, other) for other in dense] for one in pruned]
        origins = _rising(costs)
        doubt = _doubt(costs, origins)
        if not doubt:
            return origins
    raise UsageError(
        f"the pruned model has {len(blocks)} of the dense model's {dense_count} decoder blocks, and {doubt}; use "
        "method distill, or BlockwiseRecoveryModifier behind the modifier that removes blocks"
    )


def _parts(tensors: _Tensors, rows: int) -> _Parts:
    return {
        name: (tensor.shape, (tensor if tensor.dim() == 1 else tensor[:rows]).detach().to("cpu", copy=True))
        for name, tensor in tensors.items()
        if tensor.dim() == 1 or rows
    }


def _difference(one: _Parts, other: _Parts) -> float:
    """Mean over the tensors of one shape of their squared difference, relative; infinite where there are none."""
    found = []
    for name, (shape, a) in one.items():
        if name in other and other[name][0] == shape:
            b = other[name][1]
            # In the pruned model's dtype, which the dense weights may have been rounded to.
            b = b.to(a.dtype).float()
            found.append(float((a.float() - b).square().sum() / b.square().sum().clamp_min(1e-30)))
    return sum(found) / len(found) if found else float("inf")


def _rising(costs: Sequence[Sequence[float]]) -> list[int]:
    """Columns of the rows, rising, with the least sum."""
    count = len(costs[0])
    # For each row and last column: the least sum, and the columns.
    best: list[tuple[float, list[int]]] = [(0.0, [])] * (count + 1)
    for row in costs:
        following: list[tuple[float, list[int]]] = [(float("inf"), [])]
        for column in range(count):
            total, before = best[column]
            taken = (total + row[column], [*before, column])
            following.append(min(following[-1], taken, key=lambda each: each[0]))
        best = following
    return best[-1][1]


def _doubt(costs: Sequence[Sequence[float]], origins: Sequence[int]) -> str:
    """What isn't clear; empty if all is."""
    if len(origins) < len(costs):
        return "none of their weights has kept its shape"
    around = [-1, *origins, len(costs[0])]
    for row, origin in enumerate(origins):
        for other in range(around[row] + 1, around[row + 2]):
            if other != origin and not CLEARLY * costs[row][origin] < costs[row][other]:
                return f"block {row} may be block {origin} or {other} of the dense one"
    return ""

"""Which Linears of a model are pruned, and in which decoder block each one sits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import match_named_modules
from loguru import logger

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.modifiers.routed_experts import refuse_routed_experts
from sinkprune_plugin.modifiers.routing import ExpertPlace, expert_places

__all__ = ["PruningTarget", "require_prunable_dtype", "resolve_targets", "solving_cost", "stage_of"]

PRUNABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PruningTarget:
    """One Linear to prune.

    :param name: full module name
    :param module: the Linear
    :param block: index of its decoder block, None for a Linear outside of them (named explicitly by the user)
    :param expert: the expert that it belongs to, None for a Linear that gets all tokens
    """

    name: str
    module: torch.nn.Linear
    block: int | None
    expert: ExpertPlace | None = None


def resolve_targets(
    model: torch.nn.Module, targets: list[str], ignore: list[str], *, routed: bool = False
) -> tuple[list[PruningTarget], torch.nn.ModuleList]:
    """Resolve ``targets`` and ``ignore`` once, on full names.

    A class name such as ``Linear`` selects Linears inside the decoder blocks only. Whatever lies outside (embedding,
    vocabulary projection) is pruned only where a target gives its module name or a ``re:`` pattern for it.

    :param model: model to prune
    :param targets: module class names, module names or ``re:`` patterns; also names of whole blocks or block classes,
        which select every Linear inside
    :param ignore: the same, for modules to leave alone
    :param routed: experts may be among them where their routing is known
    :return: targets in module order, and the decoder blocks
    :raises UsageError: if nothing matches, or the blocks hold routed experts that can't be targets
    """
    blocks_name, blocks = find_decoder_blocks(model)
    ignored = {id(module) for _, module in match_named_modules(model, ignore)}
    # Matching a container selects every Linear inside; ignoring one excludes them all.
    ignored |= {id(child) for _, module in match_named_modules(model, ignore) for child in module.modules()}
    places = expert_places(blocks_name, blocks)
    known = {id(place.layer.container) for place in places.values()} if routed else set()
    refuse_routed_experts(blocks_name, blocks, ignored, known)
    class_names = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}

    selected: dict[str, PruningTarget] = {}
    for target in targets:
        matched = 0
        for name, module in match_named_modules(model, [target]):
            for child_name, child in module.named_modules(prefix=name):
                if not isinstance(child, torch.nn.Linear):
                    continue
                block = _block_index(child_name, blocks_name)
                if block is None and target in class_names:
                    continue
                matched += 1
                if id(child) not in ignored:
                    selected[child_name] = PruningTarget(child_name, child, block, places.get(id(child)))
        if matched == 0:
            logger.warning(f'target "{target}" matches no Linear of {type(model).__name__}')
    if not selected:
        raise UsageError(
            f"targets {targets} with ignore {ignore} select no Linear of {type(model).__name__}; "
            f'`targets: ["Linear"]` selects every Linear in {blocks_name}'
        )
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return sorted(selected.values(), key=lambda target: order[target.name]), blocks


def _block_index(name: str, blocks_name: str) -> int | None:
    prefix = f"{blocks_name}."
    if not name.startswith(prefix):
        return None
    return int(name[len(prefix) :].split(".", 1)[0])


def require_prunable_dtype(target: PruningTarget) -> None:
    """Check that a weight is one that can be computed with.

    :param target: the Linear
    :raises UsageError: if it is quantized
    """
    with disable_onloading():
        dtype = target.module.weight.dtype
    if dtype not in PRUNABLE_DTYPES:
        raise UsageError(f"{target.name} has {dtype} weights; prune before quantizing, or add it to `ignore`")


def solving_cost(targets: Sequence[PruningTarget]) -> float:
    """Work of solving for targets with one input: a factorisation of its Hessian, and products with every weight.

    :param targets: targets that share an input
    :return: the work, up to a factor
    """
    columns = targets[0].module.in_features
    return columns**2 * (columns + sum(target.module.out_features for target in targets))


def stage_of(target: PruningTarget) -> str:
    """What a Linear counts as one of: itself, or the same Linear of all experts of a layer.

    :param target: the Linear
    :return: the Linear's name, or a name for all of them
    """
    return target.name if target.expert is None else f"{target.expert.layer.name}.*.{target.expert.path}"

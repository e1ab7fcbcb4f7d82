"""The experts of a model: where they are, and keeping some of them, so that the model gets smaller."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.block_sizes import record_dense
from sinkprune_plugin.models.catalogue import NATIVE_MODELS, Experts, native_model
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.models.sizes_in_config import KEPT_KEY, SIZES_KEY, sizes_in_config

__all__ = [
    "check_expert_modules",
    "expert_counts",
    "experts_of",
    "keep_experts",
    "note_kept_experts",
    "set_expert_counts",
]


def experts_of(config: Any) -> Experts:
    """Where a family's experts are.

    :param config: configuration of a native model
    :return: their names
    :raises UsageError: if the family has no experts, or isn't native
    """
    native = native_model(config)
    if native is None or native.experts is None:
        model_type = getattr(config, "model_type", None)
        known = ", ".join(native.model_type for native in NATIVE_MODELS if native.experts is not None)
        raise UsageError(
            f"models of model_type {model_type!r} have no experts in sinkprune_plugin/models/catalogue.py, only those "
            f"of {known}; take another modifier, or see docs/adding-a-family.md"
        )
    return native.experts


def expert_counts(config: Any) -> dict[int, int]:
    """Experts of each decoder block that has some.

    :param config: configuration of a native model
    :return: number of the block → experts, ascending
    :raises UsageError: if the family has no experts, or no block of this model has
    """
    experts_of(config)
    counts = {index: sizes.experts for index, sizes in enumerate(sizes_in_config(config)) if sizes.experts}
    if not counts:
        raise UsageError(f"no decoder block of this {config.model_type} model has experts; take another modifier")
    return counts


def check_expert_modules(model: nn.Module) -> None:
    """Check that a model's experts are those that its configuration says.

    :param model: a native model
    :raises UsageError: naming the block, or if the model is of another class than ours
    """
    config: Any = model.config
    names = experts_of(config)
    blocks_name, blocks = find_decoder_blocks(model)
    for index, count in expert_counts(config).items():
        where = f"{blocks_name}.{index}"
        try:
            found = blocks[index].get_submodule(names.experts)
        except AttributeError as error:
            raise UsageError(
                f"{where} of {type(model).__name__} has no {names.experts}, so it isn't this package's class for "
                f"{config.model_type}; load the model without remote code"
            ) from error
        if not isinstance(found, nn.ModuleList) or len(found) != count:
            number = f"{len(found)} experts" if isinstance(found, nn.ModuleList) else type(found).__name__
            raise UsageError(
                f"{where}.{names.experts} is a list of {number}, and the configuration asks for {count}; load the "
                "model without remote code"
            )


@torch.no_grad()
def keep_experts(model: nn.Module, block_index: int, kept: Sequence[int]) -> None:
    """Remove all other experts of one decoder block, in place; those that stay keep their order and move up.

    What the router has of them goes too. The configuration follows with :func:`set_expert_counts`.

    :param model: a native model, may be offloaded with compressed-tensors
    :param block_index: number of the block
    :param kept: numbers of the experts that stay, ascending
    """
    names = experts_of(model.config)
    block = find_decoder_blocks(model)[1][block_index]
    record_dense(model)
    experts = block.get_submodule(names.experts)
    assert isinstance(experts, nn.ModuleList)  # check_expert_modules
    # The list itself stays: forward and hooks hold on to it.
    for number in sorted(set(range(len(experts))) - set(kept), reverse=True):
        del experts[number]
    for name in names.rows:
        owner, _, attribute = name.rpartition(".")
        module = block.get_submodule(owner)
        tensor = getattr(module, attribute, None)
        if tensor is None:
            continue
        rows = tensor.detach()[torch.tensor(kept, device=tensor.device)].clone()
        # A tensor of another size can't be copied into the offloaded one; deleted and set, it is offloaded anew.
        is_parameter = attribute in module._parameters
        delattr(module, attribute)
        if is_parameter:
            module.register_parameter(attribute, nn.Parameter(rows, requires_grad=tensor.requires_grad))
        else:
            module.register_buffer(attribute, rows)


def set_expert_counts(config: Any, counts: Mapping[int, int]) -> None:
    """Make a configuration say how many experts each block has.

    Where all have as many, ``num_experts`` says it and official code loads the checkpoint. Otherwise that is the
    largest number, and ``sinkprune_block_sizes`` holds the sizes of each block.

    :param config: configuration of a native model
    :param counts: number of the block → experts, for each block that has some
    """
    sizes = [replace(size, experts=counts.get(index, 0)) for index, size in enumerate(sizes_in_config(config))]
    config.num_experts = max(counts.values())
    if hasattr(config, SIZES_KEY):
        delattr(config, SIZES_KEY)
    if sizes != sizes_in_config(config):
        setattr(config, SIZES_KEY, [size.to_json() for size in sizes])


def note_kept_experts(config: Any, kept: Mapping[int, Sequence[int]]) -> None:
    """Note in a configuration which experts stay, by their numbers in the model that had all of them.

    Informative: nothing that loads the model reads it. To be called before :func:`set_expert_counts`.

    :param config: configuration of a native model
    :param kept: number of the block → numbers of the experts that stay, among those that it has now
    """
    counts = expert_counts(config)
    before = getattr(config, KEPT_KEY, None) or [list(range(counts.get(i, 0))) for i in range(config.num_hidden_layers)]
    setattr(
        config,
        KEPT_KEY,
        [[numbers[place] for place in kept.get(index, range(len(numbers)))] for index, numbers in enumerate(before)],
    )

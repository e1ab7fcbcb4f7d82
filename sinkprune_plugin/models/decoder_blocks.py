"""Where the decoder blocks of a model are, and the Linears in them, which are what is pruned."""

import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["block_linears", "find_decoder_blocks"]


def block_linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The Linears inside the decoder blocks: what ``targets: ["Linear"]`` selects.

    :param model: any decoder-only transformer
    :return: full name → module, in the model's order
    :raises UsageError: as :func:`find_decoder_blocks`
    """
    name, blocks = find_decoder_blocks(model)
    return {
        child_name: child
        for child_name, child in blocks.named_modules(prefix=name)
        if isinstance(child, torch.nn.Linear)
    }


def find_decoder_blocks(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """Find the list of decoder blocks: the outermost ``ModuleList`` with as many entries as the config has layers.

    In a model with 16 layers of 64 experts the longest list would be the wrong one. Without a number in the config it
    is the longest of the outermost lists whose entries are all of one class.

    :param model: any decoder-only transformer
    :return: name of the list, and the list
    :raises UsageError: if the model has no such list
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and any(isinstance(child, torch.nn.Linear) for entry in module for child in entry.modules())
    ]
    inner = {id(child) for _, module in lists for entry in module for child in entry.modules()}
    outermost = [(name, module) for name, module in lists if id(module) not in inner]
    number = _number_of_layers(model)
    if number is not None:
        found = [entry for entry in outermost if len(entry[1]) == number]
        wanted = f"of {number} decoder blocks, as its config says"
    else:
        one_class = [entry for entry in outermost if len({type(child) for child in entry[1]}) == 1]
        found = sorted(one_class, key=lambda entry: len(entry[1]), reverse=True)
        wanted = "of decoder blocks (a ModuleList of one block class)"
    if not found:
        raise UsageError(
            f"{type(model).__name__} has no list {wanted}; sink-aware pruning needs a decoder-only transformer"
        )
    return found[0]


def _number_of_layers(model: torch.nn.Module) -> int | None:
    config = getattr(model, "config", None)
    # Official LLaDA code has the second name only.
    numbers = [getattr(config, key, None) for key in ("num_hidden_layers", "n_layers")]
    return next((number for number in numbers if isinstance(number, int)), None)

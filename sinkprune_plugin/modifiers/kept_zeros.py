"""Zeros that stay zeros while later modifiers of the recipe change the weights."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.utils import align_module_device
from loguru import logger

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.codecs import bits
from sinkprune_plugin.modifiers import distributed

__all__ = ["KeptZeros"]

# Their solvers move the error of one weight onto others, zeros included. A zero is a value of every scheme, symmetric
# or not, so putting it back leaves a quantized weight; what is lost is the share of the error that it had taken on.
_FILL_ZEROS = frozenset({"GPTQModifier", "AutoRoundModifier"})
# After a rotation the zeros are gone, and setting the same positions to zero would ruin the model.
_ROTATE = frozenset({"QuIPModifier", "SpinQuantModifier"})


@dataclass
class _Pruned:
    name: str
    module: torch.nn.Module
    alive: torch.Tensor
    columns: int
    # The weight that was looked at last, as long as it is there, and its version.
    seen: "weakref.ref[torch.Tensor] | None" = None
    version: int = 0


class KeptZeros:
    """Remembers which weights were pruned, one bit each, and puts the zeros back after a quantizer filled them.

    That happens in the first forward pass after the change, so that the layers that follow are calibrated on the
    weights that will be saved, and once more at the end.

    :param owner: name of the pruning modifier, for messages
    :param later: the modifiers that follow it in the recipe
    :raises UsageError: if one of them rotates the weights
    """

    def __init__(self, owner: str, later: Sequence[Any]) -> None:
        kinds = [{cls.__name__ for cls in type(modifier).__mro__} for modifier in later]
        for modifier, names in zip(later, kinds, strict=True):
            if names & _ROTATE:
                raise UsageError(
                    f"{type(modifier).__name__} after {owner} rotates the weights, which fills the zeros; put it "
                    "before the pruning modifier"
                )
        self._owner = owner
        self._wanted = bool(later)
        self._puts_back = any(names & _FILL_ZEROS for names in kinds)
        self._pruned: list[_Pruned] = []
        self._handles: list[Any] = []

    def remember(self, name: str, module: torch.nn.Module, weight: torch.Tensor) -> None:
        """Remember the zeros of a pruned weight, if anything follows that could fill them.

        :param name: module name for messages
        :param module: the Linear
        :param weight: (rows, columns) its pruned weight
        """
        if not self._wanted:
            return
        entry = _Pruned(name, module, bits.nonzero_bits(weight.contiguous()).cpu(), weight.shape[1])
        self._pruned.append(entry)
        if self._puts_back:
            self._handles.append(module.register_forward_pre_hook(lambda module, _args: self._check(module, entry)))

    def follow(self, model: torch.nn.Module) -> None:
        """Remember the zeros of weights that have become smaller, and forget those that are gone.

        :param model: the model, from which units or blocks have been removed
        """
        present = {id(module) for module in model.modules()}
        self._pruned = [entry for entry in self._pruned if id(entry.module) in present]
        for entry in self._pruned:
            with torch.no_grad(), align_module_device(entry.module):
                weight: Any = entry.module.weight
                entry.alive = bits.nonzero_bits(weight.contiguous()).cpu()
                entry.columns, entry.seen = weight.shape[1], None

    def finish(self) -> None:
        """Put back all zeros, or warn where a modifier that isn't known here filled them; remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for entry in self._pruned:
            filled = self._fill(entry)
            if filled and not self._puts_back:
                logger.warning(
                    f"{filled} weights of {entry.name} that {self._owner} pruned are not zero any more; a modifier "
                    "that follows it in the recipe changed them"
                )
        self._handles, self._pruned = [], []
        distributed.barrier()

    def _check(self, module: torch.nn.Module, entry: _Pruned) -> None:
        # Writing in place counts the version up, and an offloaded weight is another object each time: perhaps at the
        # address of the last one, so that its id says nothing.
        weight: Any = module.weight
        seen: Any = None if entry.seen is None else entry.seen()
        if seen is not weight or entry.version != weight._version:
            self._fill(entry)
            entry.seen, entry.version = weakref.ref(weight), weight._version

    def _fill(self, entry: _Pruned) -> int:
        with torch.no_grad(), align_module_device(entry.module):
            weight: Any = entry.module.weight
            pruned = ~bits.unpack(entry.alive.to(weight.device), entry.columns)
            filled = int(torch.count_nonzero(weight[pruned]))
            restored = weight.masked_fill(pruned, 0.0) if filled and self._puts_back else None
        if restored is not None:
            # Processes come here one by one, each with another number of samples: none of them waits for the others.
            distributed.store_weight(entry.module, restored)
        return filled

"""Zeros of a pruned model that training must not fill."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.codecs import bits
from sinkprune_plugin.models.decoder_blocks import block_linears

__all__ = ["FixedZeros"]


class FixedZeros:
    """Where the Linears of the decoder blocks are zero, one bit for each weight: 0.9 GB for 7 billion of them.

    Two measures keep them: their gradients are zeroed, so that no optimiser state ever points to them, and after each
    optimiser step they are set to zero again, whatever the optimiser did. (FSDP sets gradients without calling the hook
    that zeroes them; there the second measure does it alone.)

    :param model: pruned model; negative zeros become positive ones, which have the bits that all formats give back
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._packed: dict[str, tuple[torch.Tensor, torch.Size]] = {}
        self.zeros = self.weights = 0
        with torch.no_grad():
            for name, module in block_linears(model).items():
                zero = module.weight == 0
                count = int(zero.sum())
                self.weights += zero.numel()
                if count:
                    self.zeros += count
                    module.weight.masked_fill_(zero, 0.0)
                    self._packed[f"{name}.weight"] = bits.pack(zero.cpu()), zero.shape

    def __contains__(self, name: object) -> bool:
        return name in self._packed

    def of(self, name: str) -> torch.Tensor:
        """Where a weight is zero.

        :param name: full name of the weight
        :return: (rows, columns) bool on CPU
        """
        packed, shape = self._packed[name]
        return bits.unpack(packed, shape[1])

    def attach(self, model: torch.nn.Module) -> Callable[[], None]:
        """Keep the zeros of a model that is about to be trained.

        :param model: the model, perhaps with its parameters split over processes (FSDP)
        :return: function to be called after each optimiser step
        """
        held: list[tuple[torch.nn.Parameter, torch.Tensor, int]] = []
        for name, parameter in model.named_parameters():
            stored = self._packed.get(_plain_name(name))
            if stored is None or not parameter.requires_grad:
                continue
            local = _local(parameter)
            if not local.numel():
                # A process may hold no row of a small weight.
                held.append((parameter, local, 0))
                continue
            mask = self.of(_plain_name(name)) if local.shape == stored[1] else (local.detach() == 0).cpu()
            packed = bits.pack(mask.reshape(len(mask), -1)).to(local.device)
            columns = mask.numel() // max(1, len(mask))
            held.append((parameter, packed, columns))
            parameter.register_post_accumulate_grad_hook(_zero_gradients(packed, columns))
        found = len(held)
        if found != len(self._packed):
            raise UsageError(
                f"only {found} of {len(self._packed)} pruned weights are trained; train all or none of them"
            )

        def restore() -> None:
            with torch.no_grad():
                for parameter, packed, columns in held:
                    _fill(_local(parameter), packed, columns)

        return restore

    def require(self, weights: Mapping[str, torch.Tensor], where: str) -> None:
        """Check that no zero was filled.

        :param weights: name → weight; all that had zeros must be there
        :param where: what these weights are, for the message
        :raises UsageError: naming the first weight with a filled zero
        """
        for name in self._packed:
            filled = int((weights[name].cpu()[self.of(name)].view(torch.uint8) != 0).sum())
            if filled:
                raise UsageError(f"{where}: {name} has bits set at {filled} places that were pruned; don't use it")


def _zero_gradients(packed: torch.Tensor, columns: int) -> Callable[[torch.Tensor], None]:
    def hook(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            _fill(_local(parameter.grad), packed, columns)

    return hook


def _fill(tensor: torch.Tensor, packed: torch.Tensor, columns: int) -> None:
    if tensor.numel():
        tensor.detach().masked_fill_(bits.unpack(packed, columns).view(tensor.shape), 0.0)


def _local(tensor: Any) -> torch.Tensor:
    # FSDP gives DTensors, of which this process holds some rows.
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _plain_name(name: str) -> str:
    # DDP puts "module." in front, activation checkpointing a wrapper in between.
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")

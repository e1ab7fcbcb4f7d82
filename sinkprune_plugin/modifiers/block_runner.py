"""Feeding cached inputs through the decoder blocks one at a time, so that later blocks see pruned outputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.utils import get_execution_device

from sinkprune_plugin.errors import UsageError

__all__ = ["BlockInput", "BlockRunner"]


class _FirstBlockReachedError(Exception):
    """Ends a forward pass whose only purpose was the first block's input."""


@dataclass
class BlockInput:
    """What the next block is called with, for one calibration pass.

    :param hidden: (B, T, d) hidden states, on CPU while the pass waits for its turn
    :param args: further positional arguments of the blocks
    :param kwargs: keyword arguments of the blocks (attention mask, rotary tables, …)
    """

    hidden: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockRunner:
    """Records the first block's inputs, then runs block after block over all of them.

    :param blocks: decoder blocks, each mapping hidden states to hidden states (or a tuple that begins with them)
    """

    def __init__(self, blocks: torch.nn.ModuleList) -> None:
        self.blocks = blocks
        self.inputs: list[BlockInput] = []

    def record(self, run_model: Any, *, whole_model: bool) -> None:
        """Run the model once and keep what reaches its first block.

        :param run_model: function without arguments that runs the model on one batch
        :param whole_model: let the forward pass finish, for its attention masses; otherwise it ends at the first block
        :raises UsageError: if the first block was not called
        """
        count = len(self.inputs)

        def hook(_block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs.append(self._take(args, kwargs))
            if not whole_model:
                raise _FirstBlockReachedError

        handle = self.blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            run_model()
        except _FirstBlockReachedError:
            pass
        finally:
            handle.remove()
        if len(self.inputs) != count + 1:
            raise UsageError(
                f"one forward pass called the first decoder block {len(self.inputs) - count} times; block-by-block "
                "pruning needs exactly one call"
            )

    def run(self, index: int, *, keep: bool) -> Iterator[int]:
        """Run one block over all recorded passes.

        :param index: block index
        :param keep: make the outputs the inputs of the next block
        :return: iterator over the passes; pass i is being run when i is yielded, so announce it to hooks then
        """
        block = self.blocks[index]
        device = get_execution_device(block)
        for number, item in enumerate(self.inputs):
            yield number
            output = block(item.hidden.to(device), *item.args, **item.kwargs)
            if keep:
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.shape != item.hidden.shape:
                    raise UsageError(
                        f"decoder block {index} maps hidden states of shape {tuple(item.hidden.shape)} to "
                        f"{tuple(hidden.shape)}; block-by-block pruning needs blocks that keep the shape"
                    )
                # The passes that wait live in main memory: samples × timesteps × T × d would not fit beside the model.
                item.hidden = hidden.to("cpu")

    def _take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockInput:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        previous = self.inputs[-1] if self.inputs else None
        if previous is not None:
            # Rotary tables are the same for every pass of a length: keep one.
            kwargs = {key: _shared(value, previous.kwargs.get(key)) for key, value in kwargs.items()}
        return BlockInput(hidden.detach().to("cpu"), tuple(args[1:]), kwargs)


def _shared(value: Any, previous: Any) -> Any:
    if isinstance(value, tuple) and isinstance(previous, tuple) and len(value) == len(previous):
        return tuple(_shared(a, b) for a, b in zip(value, previous, strict=True))
    if (
        isinstance(value, torch.Tensor)
        and isinstance(previous, torch.Tensor)
        and value.shape == previous.shape
        and value.dtype == previous.dtype
        and torch.equal(value, previous)
    ):
        return previous
    return value

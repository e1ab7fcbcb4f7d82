"""What the sampler keeps of each request between steps, and what it returns of a step; tensors on the device."""

from dataclasses import dataclass

import torch

from sinkprune_plugin.sampling.batch_table import Column

__all__ = ["BatchResult", "BatchState", "DeviceBatch"]


class BatchState:
    """Canvas and progress of each slot.

    :param canvas: (slots, W) int64, each slot's canvas; shared with the engine
    :param mask_token_id: the mask token
    """

    def __init__(self, canvas: torch.Tensor, mask_token_id: int) -> None:
        slots, width = canvas.shape
        device = canvas.device
        self.canvas = canvas
        self.mask_token_id = mask_token_id
        # Columns of the masked positions of each open block, as many as there are; all columns for a new canvas.
        self.order = torch.arange(width, dtype=torch.int32, device=device).repeat(slots, 1)
        # Whether a block is finished and has to be run once more for its keys and values (cache commit).
        self.committing = torch.zeros(slots, dtype=torch.int8, device=device)
        # Masked positions that are left in the open block.
        self.left = torch.zeros(slots, dtype=torch.int32, device=device)
        # End-of-sequence tokens of each slot, filled up with -1, which no token is.
        self.stops = torch.full((slots, 0), -1, dtype=torch.int64, device=device)

    def reset(self, slots: torch.Tensor) -> None:
        """Give slots a canvas full of masks.

        :param slots: (n,) int64
        """
        self.canvas[slots] = self.mask_token_id
        self.order[slots] = torch.arange(self.order.shape[1], dtype=torch.int32, device=self.order.device)
        self.committing[slots] = 0

    def set_stops(self, slot: int, tokens: tuple[int, ...]) -> None:
        """Set the tokens that end a slot's text.

        :param slot: the slot
        :param tokens: their ids
        """
        missing = len(tokens) - self.stops.shape[1]
        if missing > 0:
            self.stops = torch.nn.functional.pad(self.stops, (0, missing), value=-1)
        if self.stops.shape[1]:
            row = [*tokens, *[-1] * (self.stops.shape[1] - len(tokens))]
            pinned = torch.tensor(row, dtype=torch.int64, pin_memory=self.stops.is_cuda)
            self.stops[slot].copy_(pinned, non_blocking=True)


@dataclass(frozen=True)
class DeviceBatch:
    """One step's table on the device.

    :param table: (R, columns) int64, see :class:`~sinkprune_plugin.sampling.batch_table.Column`
    :param row_request: (N,) int64, each row's request
    :param filtered: (F,) int64, the rows that are drawn from with a filter, ascending
    """

    table: torch.Tensor
    row_request: torch.Tensor
    filtered: torch.Tensor

    @property
    def floats(self) -> torch.Tensor:
        """The same memory as float64."""
        return self.table.view(torch.float64)

    def column(self, column: Column) -> torch.Tensor:
        """One column, (R,) int64.

        :param column: which
        """
        return self.table[:, column]


@dataclass(frozen=True)
class BatchResult:
    """What came of a step.

    :param sampled: (R, W) int32, the block of each request; meaningful where it is emitted
    :param num_sampled: (R,) int32, the block's width where it is emitted, else 0
    :param num_rejected: (R,) int32, query positions to compute again
    :param num_nans: (R,) int32, positions whose logits are broken
    """

    sampled: torch.Tensor
    num_sampled: torch.Tensor
    num_rejected: torch.Tensor
    num_nans: torch.Tensor

    @classmethod
    def empty(cls, requests: int, width: int, device: torch.device) -> "BatchResult":
        """Uninitialised.

        :param requests: R
        :param width: W
        :param device: where
        """
        numbers = torch.empty(3, requests, dtype=torch.int32, device=device)
        return cls(torch.empty(requests, width, dtype=torch.int32, device=device), *numbers.unbind(0))

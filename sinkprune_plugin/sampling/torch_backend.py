"""The sampler's steps in torch: for a CPU, and what the Triton kernels are tested against."""

import numpy as np
import torch

from sinkprune_plugin.sampling.batch_state import BatchResult, BatchState, DeviceBatch
from sinkprune_plugin.sampling.batch_table import Column
from sinkprune_plugin.sampling.row_statistics import RowOptions, propose_on_cpu
from sinkprune_plugin.sampling.select import select_unmask
from sinkprune_plugin.sampling.tokens import Needs

__all__ = ["gather", "propose", "unmask"]


def _places(batch: DeviceBatch, state: BatchState, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's line of the table and column in its block."""
    request = batch.row_request[rows]
    lines = batch.table[request]
    first = rows.start or 0
    number = torch.arange(first, first + len(request), device=request.device) - lines[:, Column.FIRST_ROW]
    return lines, state.order[lines[:, Column.SLOT], number].long()


def gather(hidden: torch.Tensor, before: torch.Tensor | None, batch: DeviceBatch, state: BatchState) -> torch.Tensor:
    """Pick the hidden states that predict the rows' positions.

    :param hidden: (canvas positions of the batch, d)
    :param before: (·, d), those before each canvas, for models with shifted logits; None for others
    :param batch: the step
    :param state: of the slots
    :return: (N, d)
    """
    lines, column = _places(batch, state, slice(None))
    source = lines[:, Column.FIRST_HIDDEN] + column
    if before is None:
        return hidden[source]
    picked = hidden[(source - 1).clamp_(min=0)]
    return torch.where(column[:, None] == 0, before[lines[:, Column.STATE_BEFORE]], picked)


def propose(
    logits: torch.Tensor,
    batch: DeviceBatch,
    state: BatchState,
    rows: slice,
    needs: Needs,  # noqa: ARG001 - on a CPU it costs nothing to look at the rows themselves
    cuts: tuple[torch.Tensor, torch.Tensor] | None,
    tokens: torch.Tensor,
    confidence: torch.Tensor,
) -> None:
    """Propose tokens for a chunk of the rows, on a CPU.

    :param logits: (n, V) of the chunk; the mask token's column is overwritten
    :param batch: the step
    :param state: of the slots
    :param rows: the chunk among all N rows
    :param needs: what at least one row asks for
    :param cuts: as in :func:`~sinkprune_plugin.sampling.row_statistics.propose_on_cpu`
    :param tokens: (N,) int64, filled in
    :param confidence: (N,) float64, filled in
    """
    lines, column = _places(batch, state, rows)
    numbers = lines.numpy()
    options = RowOptions(
        temperature=np.ascontiguousarray(numbers).view(np.float64)[:, Column.TEMPERATURE],
        remasking=numbers[:, Column.REMASKING],
        seed=numbers[:, Column.SEED],
        step=numbers[:, Column.NOISE_STEP],
        position=numbers[:, Column.START] + column.numpy(),
    )
    tokens[rows], confidence[rows] = propose_on_cpu(logits, state.mask_token_id, options, cuts)


def unmask(
    tokens: torch.Tensor,
    confidence: torch.Tensor,
    batch: DeviceBatch,
    state: BatchState,
    result: BatchResult,
    *,
    stops: bool,
) -> None:
    """Unmask some positions of each block, emit blocks that are finished.

    :param tokens: (N,) int64, proposals
    :param confidence: (N,) float64
    :param batch: the step
    :param state: of the slots, updated
    :param result: filled in
    :param stops: whether a request may stop early
    """
    table, floats, device = batch.table, batch.floats, batch.table.device
    slot, width = table[:, Column.SLOT], table[:, Column.WIDTH]
    widest = result.sampled.shape[1]
    lane = torch.arange(widest, device=device)
    inside = lane < width[:, None]
    old = state.canvas[slot, :widest]
    masked = inside & (old == state.mask_token_id)
    number = masked.cumsum(dim=1) - 1
    eligible = masked & (number < table[:, Column.ROWS, None])
    row = torch.where(eligible, table[:, Column.FIRST_ROW, None] + number, 0)
    proposed = torch.where(eligible, tokens[row], old) if len(tokens) else old
    sure = torch.where(eligible, confidence[row], -torch.inf) if len(tokens) else old.double().fill_(-torch.inf)
    chosen = select_unmask(sure, table[:, Column.COUNT], floats[:, Column.THRESHOLD], floats[:, Column.FACTOR])
    new = torch.where(chosen, proposed, old)
    still = masked & ~chosen
    finished = ~still.any(dim=1)
    settled = torch.zeros_like(finished)
    if stops:
        ends = inside & (new[:, :, None] == state.stops[slot][:, None, :]).any(dim=2)
        first_end = torch.where(ends, lane, widest).amin(dim=1)
        settled = first_end < torch.where(still, lane, widest).amin(dim=1)
        settled &= table[:, Column.EARLY_STOP] != 0
        # The rest of the block is cut off with whatever it holds; it must not hold masks.
        end = new.gather(1, first_end.clamp(max=widest - 1)[:, None])
        new = torch.where(still & settled[:, None], end, new)
        finished |= settled
    denoises = width > 0
    waits = finished & (table[:, Column.COMMITS] != 0) & (table[:, Column.IS_LAST] == 0)
    waits &= (state.committing[slot] == 0) & ~settled & denoises
    emits = finished & ~waits & denoises
    state.canvas[slot, :widest] = torch.where(emits[:, None] & inside, state.mask_token_id, new)
    # The masked columns in front, in their order; the next block is masked altogether.
    order = torch.where(still, lane, lane + widest).argsort(dim=1)
    kept = denoises[:, None]
    order = torch.where(emits[:, None], lane, order)
    state.order[slot, :widest] = torch.where(kept, order.int(), state.order[slot, :widest])
    state.committing[slot] = torch.where(denoises, waits.to(torch.int8), state.committing[slot])
    state.left[slot] = still.sum(dim=1, dtype=torch.int32)
    result.sampled.copy_(new)
    result.num_sampled.copy_(torch.where(emits, width, 0))
    result.num_rejected.copy_(torch.where(emits, table[:, Column.REJECTED_FINISHED], table[:, Column.REJECTED]))
    result.num_nans.copy_((eligible & sure.isnan()).sum(dim=1))

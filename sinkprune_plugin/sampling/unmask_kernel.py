"""Triton kernels around the proposals: which hidden states they are made from, and what becomes of them."""

import triton
import triton.language as tl

from sinkprune_plugin.sampling.batch_table import Column

__all__ = ["gather_kernel", "unmask_kernel"]

COLUMNS = tl.constexpr(len(Column))
SLOT = tl.constexpr(int(Column.SLOT))
WIDTH = tl.constexpr(int(Column.WIDTH))
FIRST_ROW = tl.constexpr(int(Column.FIRST_ROW))
ROWS = tl.constexpr(int(Column.ROWS))
FIRST_HIDDEN = tl.constexpr(int(Column.FIRST_HIDDEN))
COUNT = tl.constexpr(int(Column.COUNT))
REJECTED = tl.constexpr(int(Column.REJECTED))
REJECTED_FINISHED = tl.constexpr(int(Column.REJECTED_FINISHED))
IS_LAST = tl.constexpr(int(Column.IS_LAST))
STATE_BEFORE = tl.constexpr(int(Column.STATE_BEFORE))
COMMITS = tl.constexpr(int(Column.COMMITS))
EARLY_STOP = tl.constexpr(int(Column.EARLY_STOP))
THRESHOLD = tl.constexpr(int(Column.THRESHOLD))
FACTOR = tl.constexpr(int(Column.FACTOR))


@triton.jit
def gather_kernel(  # type: ignore[no-untyped-def]
    hidden_pointer,
    hidden_stride,
    state_pointer,
    state_stride,
    table_pointer,
    request_pointer,
    order_pointer,
    order_stride,
    result_pointer,
    width,
    SHIFTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copy the hidden state that predicts each row's position. One program for each row.

    :param hidden_pointer: (canvas positions of the batch, d)
    :param state_pointer: (·, d), the hidden states before each canvas; read only if SHIFTED
    :param result_pointer: (N, d)
    :param width: d
    """
    row = tl.program_id(0).to(tl.int64)
    table = table_pointer + tl.load(request_pointer + row) * COLUMNS
    place = order_pointer + tl.load(table + SLOT) * order_stride + row - tl.load(table + FIRST_ROW)
    source = tl.load(table + FIRST_HIDDEN) + tl.load(place).to(tl.int64)
    pointer = hidden_pointer + source * hidden_stride
    if SHIFTED:
        if tl.load(place) == 0:
            pointer = state_pointer + tl.load(table + STATE_BEFORE) * state_stride
        else:
            pointer = pointer - hidden_stride
    for begin in range(0, width, TILE):
        lane = begin + tl.arange(0, TILE)
        part = tl.load(pointer + lane, mask=lane < width)
        tl.store(result_pointer + row * width + lane, part, mask=lane < width)


@triton.jit
def unmask_kernel(  # type: ignore[no-untyped-def]
    table_pointer,
    float_pointer,
    token_pointer,
    confidence_pointer,
    canvas_pointer,
    canvas_stride,
    order_pointer,
    order_stride,
    committing_pointer,
    left_pointer,
    stop_pointer,
    stop_stride,
    sampled_pointer,
    sampled_stride,
    num_sampled_pointer,
    num_rejected_pointer,
    num_nans_pointer,
    mask_token,
    STOPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Unmask some positions of each request's block; emit the block when it is finished. One program per request.

    :param token_pointer: (N,) int64, proposals
    :param confidence_pointer: (N,) float64
    :param canvas_pointer: (slots, W) int64, updated
    :param order_pointer: (slots, W) int32, the columns of masked positions, updated
    :param committing_pointer: (slots,) int8, whether the block is finished and waits for its keys and values; updated
    :param left_pointer: (slots,) int32, masked positions that are left, result
    :param stop_pointer: (slots, STOPS) int64, end-of-sequence tokens; read if STOPS
    :param sampled_pointer: (R, ·) int32, result
    :param num_sampled_pointer: (R,) int32, result
    :param num_rejected_pointer: (R,) int32, result
    :param num_nans_pointer: (R,) int32, positions whose logits are broken, result
    """
    request = tl.program_id(0).to(tl.int64)
    table = table_pointer + request * COLUMNS
    width = tl.load(table + WIDTH)
    if width == 0:
        tl.store(num_sampled_pointer + request, 0)
        tl.store(num_rejected_pointer + request, tl.load(table + REJECTED).to(tl.int32))
        tl.store(num_nans_pointer + request, 0)
        return
    slot = tl.load(table + SLOT)
    lane = tl.arange(0, LANES)
    inside = lane < width
    canvas = canvas_pointer + slot * canvas_stride + lane
    old = tl.load(canvas, mask=inside, other=0)
    masked = inside & (old == mask_token)
    number = tl.cumsum(masked.to(tl.int32), axis=0) - 1
    count = tl.sum(masked.to(tl.int32), axis=0)
    rows = tl.minimum(tl.load(table + ROWS).to(tl.int32), count)
    eligible = masked & (number < rows)
    first = tl.load(table + FIRST_ROW)
    confidence = tl.load(confidence_pointer + first + number, mask=eligible, other=0.0)
    token = tl.load(token_pointer + first + number, mask=eligible, other=0)
    broken = eligible & (confidence != confidence)
    # Counts as the highest: a broken model's position would stay masked otherwise, and its request would never end.
    confidence = tl.where(broken, float("inf"), confidence)
    rank = tl.zeros((LANES,), tl.int32)
    for other in range(0, rows):
        rival = tl.load(confidence_pointer + first + other)
        rival = tl.where(rival != rival, float("inf"), rival)
        rank += ((rival > confidence) | ((rival == confidence) & (other < number))).to(tl.int32)
    numbers = float_pointer + request * COLUMNS
    threshold = tl.load(numbers + THRESHOLD)
    factor = tl.load(numbers + FACTOR)
    chosen = rank < tl.load(table + COUNT)
    if threshold < float("inf"):
        chosen = (rank == 0) | (confidence > threshold)
    if factor > 0:
        chosen = (rank == 0) | ((rank + 2).to(tl.float64) * (1.0 - confidence) < factor)
    chosen = chosen & eligible
    new = tl.where(chosen, token, old)
    still = masked & (chosen == 0)
    left = tl.sum(still.to(tl.int32), axis=0)
    finished = left == 0
    settled = left < 0
    if STOPS > 0:  # noqa: SIM102 - the first is decided when the kernel is compiled
        if tl.load(table + EARLY_STOP) != 0:
            ends = lane < 0
            for stop in tl.static_range(STOPS):
                ends = ends | (new == tl.load(stop_pointer + slot * stop_stride + stop))
            # The mask token is no stop token, so these are final.
            first_end = tl.min(tl.where(ends & inside, lane, LANES), axis=0)
            settled = first_end < tl.min(tl.where(still, lane, LANES), axis=0)
            # The rest of the block is cut off with whatever it holds; it must not hold masks.
            end = tl.sum(tl.where(lane == first_end, new, 0), axis=0)
            new = tl.where(still & settled, end, new)
            finished = finished | settled
    committing = tl.load(committing_pointer + slot) != 0
    waits = (
        finished
        & (tl.load(table + COMMITS) != 0)
        & (tl.load(table + IS_LAST) == 0)
        & (committing == 0)
        & (settled == 0)
    )
    emits = finished & (waits == 0)
    tl.store(canvas, tl.where(emits, mask_token, new), mask=inside)
    # The next block is masked altogether.
    place = tl.where(emits, lane, tl.cumsum(still.to(tl.int32), axis=0) - 1)
    tl.store(order_pointer + slot * order_stride + place, lane, mask=tl.where(emits, inside, still))
    tl.store(committing_pointer + slot, waits.to(tl.int8))
    tl.store(left_pointer + slot, left)
    tl.store(sampled_pointer + request * sampled_stride + lane, new.to(tl.int32), mask=inside)
    tl.store(num_sampled_pointer + request, tl.where(emits, width, 0).to(tl.int32))
    rejected = tl.where(emits, tl.load(table + REJECTED_FINISHED), tl.load(table + REJECTED))
    tl.store(num_rejected_pointer + request, rejected.to(tl.int32))
    tl.store(num_nans_pointer + request, tl.sum(broken.to(tl.int32), axis=0))

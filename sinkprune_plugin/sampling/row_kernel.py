"""Triton kernel: from one read of a row of logits to a proposed token and the confidence in it.

Each program walks over one row tile by tile and keeps running statistics, rescaled whenever a larger logit appears
("online softmax", Milakov and Gimelshein, arXiv 1805.02867): the largest logit and its index, Σ e^(x - max) over the
*others*, and as asked the second largest, Σ e^(x - max) (x - max), and the best noisy score. Leaving the largest term
out of the sum keeps probabilities near 1 apart: 1 / (1 + s) resolves s down to 2^-53, although the terms of s are
float32. Sums over tiles are float64.

Only rows with a temperature hash noise; only batches that ask for margin, entropy or filters compute these.
"""

import triton
import triton.language as tl

from sinkprune_plugin.sampling.batch_table import Column
from sinkprune_plugin.sampling.options import REMASKINGS

__all__ = ["row_kernel"]

COLUMNS = tl.constexpr(len(Column))
SLOT = tl.constexpr(int(Column.SLOT))
FIRST_ROW = tl.constexpr(int(Column.FIRST_ROW))
NOISE_STEP = tl.constexpr(int(Column.NOISE_STEP))
START = tl.constexpr(int(Column.START))
SEED = tl.constexpr(int(Column.SEED))
REMASKING = tl.constexpr(int(Column.REMASKING))
TEMPERATURE = tl.constexpr(int(Column.TEMPERATURE))
RANDOM = tl.constexpr(REMASKINGS.index("random"))
MARGIN = tl.constexpr(REMASKINGS.index("margin"))
ENTROPY = tl.constexpr(REMASKINGS.index("entropy"))
# The noise of sinkprune_plugin.sampling.noise, bit for bit; the same constants as signed integers.
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
MIX_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))
LOW_34 = tl.constexpr((1 << 34) - 1)
LOW_37 = tl.constexpr((1 << 37) - 1)
LOW_33 = tl.constexpr((1 << 33) - 1)
LOW_52 = tl.constexpr((1 << 52) - 1)
UNIT = tl.constexpr(2.0**-52)


@triton.jit
def _mix(value):  # type: ignore[no-untyped-def]
    # Shifts of signed integers copy the sign; the masks clear the copies.
    value = (value ^ ((value >> 30) & LOW_34)) * MIX_1
    value = (value ^ ((value >> 27) & LOW_37)) * MIX_2
    return value ^ ((value >> 31) & LOW_33)


@triton.jit
def _uniform(bits):  # type: ignore[no-untyped-def]
    return (((bits >> 12) & LOW_52).to(tl.float64) + 0.5) * UNIT


@triton.jit
def row_kernel(  # type: ignore[no-untyped-def]
    logits_pointer,
    logits_stride,
    vocabulary,
    mask_token,
    table_pointer,
    float_pointer,
    request_pointer,
    slot_order_pointer,
    slot_order_stride,
    first_row,
    cut_pointer,
    cut_index_pointer,
    token_pointer,
    confidence_pointer,
    NEEDS_NOISE: tl.constexpr,
    NEEDS_FILTER: tl.constexpr,
    NEEDS_RANDOM: tl.constexpr,
    NEEDS_MARGIN: tl.constexpr,
    NEEDS_ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program for each row of a chunk.

    :param logits_pointer: (n, V) floating point, the chunk
    :param vocabulary: V
    :param mask_token: never proposed
    :param table_pointer: :class:`~sinkprune_plugin.sampling.batch_table.Column` table, int64
    :param float_pointer: the same memory as float64
    :param request_pointer: (N,) int64, each row's request
    :param slot_order_pointer: (slots, W) int32, the columns of each slot's masked positions
    :param first_row: of the chunk among all N
    :param cut_pointer: (n,) float32, smallest logit that may be drawn
    :param cut_index_pointer: (n,) int64, last index that may be drawn with exactly this logit
    :param token_pointer: (N,) int64, result
    :param confidence_pointer: (N,) float64, result; NaN if a logit is NaN or +Inf
    """
    chunk_row = tl.program_id(0).to(tl.int64)
    row = first_row + chunk_row
    request = tl.load(request_pointer + row)
    table = table_pointer + request * COLUMNS
    logits = logits_pointer + chunk_row * logits_stride

    best = tl.full((), -float("inf"), tl.float32)
    index = tl.full((), 0, tl.int64)
    second = tl.full((), -float("inf"), tl.float32)
    others = tl.full((), 0.0, tl.float64)
    weighted = tl.full((), 0.0, tl.float64)
    drawn_score = tl.full((), -float("inf"), tl.float64)
    drawn = tl.full((), 0, tl.int64)
    drawn_logit = tl.full((), -float("inf"), tl.float32)
    temperature = tl.full((), 0.0, tl.float64)
    key = tl.full((), 0, tl.int64)
    position_key = tl.full((), 0, tl.int64)
    if NEEDS_NOISE or NEEDS_RANDOM:
        slot = tl.load(table + SLOT)
        column = tl.load(slot_order_pointer + slot * slot_order_stride + row - tl.load(table + FIRST_ROW)).to(tl.int64)
        position = tl.load(table + START) + column
        key = _mix(tl.load(table + SEED) + GOLDEN)
        key = _mix(key ^ ((tl.load(table + NOISE_STEP) + 1) * GOLDEN))
        position_key = _mix(key ^ ((position + 1) * GOLDEN))
        if NEEDS_NOISE:
            temperature = tl.load(float_pointer + request * COLUMNS + TEMPERATURE)
    if NEEDS_FILTER:
        cut = tl.load(cut_pointer + chunk_row)
        cut_index = tl.load(cut_index_pointer + chunk_row)

    lane = tl.arange(0, TILE)
    for begin in range(0, vocabulary, TILE):
        ids = begin + lane
        x = tl.load(logits + ids, mask=(ids < vocabulary) & (ids != mask_token), other=-float("inf")).to(tl.float32)
        tile_best = tl.max(x, axis=0)
        tile_index = tl.argmax(x, axis=0, tie_break_left=True)
        larger = tile_best > best
        new = tl.maximum(best, tile_best)
        # Before any finite logit has been seen, -inf - -inf would be NaN.
        base = tl.where(new == -float("inf"), 0.0, new)
        e = tl.exp(x - base)
        rest = tl.sum(tl.where(lane == tile_index, 0.0, e), axis=0).to(tl.float64)
        old_scale = tl.exp((best - base).to(tl.float64))
        if NEEDS_ENTROPY:
            # Of an excluded token 0 · 0, where 0 · -inf would be NaN.
            tile_weighted = tl.sum(e * tl.where(e > 0, x - base, 0.0), axis=0).to(tl.float64)
            moved = tl.where(best == -float("inf"), 0.0, (best - base).to(tl.float64))
            weighted = old_scale * (weighted + moved * (1.0 + others)) + tile_weighted
        if NEEDS_MARGIN:
            tile_second = tl.max(tl.where(lane == tile_index, -float("inf"), x), axis=0)
            second = tl.maximum(tl.minimum(best, tile_best), tl.maximum(second, tile_second))
        # What was the largest so far is one of the others from now on, or the tile's largest is.
        joining = tl.where(larger, old_scale, tl.exp((tile_best - base).to(tl.float64)))
        others = others * old_scale + joining + rest
        index = tl.where(larger, begin + tile_index, index)
        best = new
        if NEEDS_NOISE:  # noqa: SIM102 - decided when the kernel is compiled
            if temperature > 0:
                u = _uniform(_mix(position_key + (ids + 1).to(tl.int64) * GOLDEN))
                score = x.to(tl.float64) - temperature * tl.log(-tl.log(u))
                if NEEDS_FILTER:
                    allowed = (x > cut) | ((x == cut) & (ids <= cut_index))
                    score = tl.where(allowed, score, -float("inf"))
                tile_score = tl.max(score, axis=0)
                tile_drawn = tl.argmax(score, axis=0, tie_break_left=True)
                if tile_score > drawn_score:
                    drawn_score = tile_score
                    drawn = (begin + tile_drawn).to(tl.int64)
                    drawn_logit = tl.sum(tl.where(lane == tile_drawn, x, 0.0), axis=0)

    total = 1.0 + others
    token = index
    confidence = 1.0 / total
    if NEEDS_NOISE:  # noqa: SIM102
        if temperature > 0:
            token = drawn
            confidence = tl.exp((drawn_logit - best).to(tl.float64)) / total
    kind = tl.load(table + REMASKING)
    if NEEDS_MARGIN:
        margin = (1.0 - tl.exp((second - best).to(tl.float64))) / total
        confidence = tl.where(kind == MARGIN, margin, confidence)
    if NEEDS_ENTROPY:
        confidence = tl.where(kind == ENTROPY, weighted / total - tl.log(total), confidence)
    if NEEDS_RANDOM:
        # As in sinkprune_plugin.sampling.tokens: a negative position, and column 1.
        random_key = _mix(key ^ (-position * GOLDEN))
        confidence = tl.where(kind == RANDOM, _uniform(_mix(random_key + GOLDEN)), confidence)
    broken = (total != total) | (best == -float("inf")) | (best == float("inf"))
    confidence = tl.where(broken, float("nan"), confidence)
    tl.store(token_pointer + row, tl.minimum(token, vocabulary - 1))
    tl.store(confidence_pointer + row, confidence)

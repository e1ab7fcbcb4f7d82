"""The sampler's steps as Triton kernels. Imports triton; see :mod:`~sinkprune_plugin.sampling.batched` for the choice.

Arguments and results are those of :mod:`~sinkprune_plugin.sampling.torch_backend`. Greedy decoding takes one launch for
the proposals and one for the unmasking, whatever the batch.
"""

import torch
import triton

from sinkprune_plugin.sampling.batch_state import BatchResult, BatchState, DeviceBatch
from sinkprune_plugin.sampling.row_kernel import row_kernel
from sinkprune_plugin.sampling.tokens import ENTROPY, MARGIN, RANDOM, Needs
from sinkprune_plugin.sampling.unmask_kernel import gather_kernel, unmask_kernel

__all__ = ["gather", "propose", "unmask"]

# Logits of a row in registers at once: 16 for each of 256 threads.
TILE = 4096
WARPS = 8
HIDDEN_TILE = 1024


def gather(hidden: torch.Tensor, before: torch.Tensor | None, batch: DeviceBatch, state: BatchState) -> torch.Tensor:
    """As in the torch backend; one launch."""
    rows, width = len(batch.row_request), hidden.shape[1]
    result = hidden.new_empty(rows, width)
    states = hidden if before is None else before
    gather_kernel[(rows,)](
        hidden,
        hidden.stride(0),
        states,
        states.stride(0),
        batch.table,
        batch.row_request,
        state.order,
        state.order.stride(0),
        result,
        width,
        SHIFTED=before is not None,
        TILE=HIDDEN_TILE,
    )
    return result


def propose(
    logits: torch.Tensor,
    batch: DeviceBatch,
    state: BatchState,
    rows: slice,
    needs: Needs,
    cuts: tuple[torch.Tensor, torch.Tensor] | None,
    tokens: torch.Tensor,
    confidence: torch.Tensor,
) -> None:
    """As in the torch backend; one launch, one read of the logits."""
    count, vocabulary = logits.shape
    value, index = (tokens, tokens) if cuts is None else cuts
    row_kernel[(count,)](
        logits,
        logits.stride(0),
        vocabulary,
        state.mask_token_id,
        batch.table,
        batch.floats,
        batch.row_request,
        state.order,
        state.order.stride(0),
        rows.start,
        value,
        index,
        tokens,
        confidence,
        NEEDS_NOISE=needs.noise,
        NEEDS_FILTER=cuts is not None,
        NEEDS_RANDOM=RANDOM in needs.remaskings,
        NEEDS_MARGIN=MARGIN in needs.remaskings,
        NEEDS_ENTROPY=ENTROPY in needs.remaskings,
        TILE=TILE,
        num_warps=WARPS,
    )


def unmask(
    tokens: torch.Tensor,
    confidence: torch.Tensor,
    batch: DeviceBatch,
    state: BatchState,
    result: BatchResult,
    *,
    stops: bool,
) -> None:
    """As in the torch backend; one launch."""
    requests, widest = result.sampled.shape
    unmask_kernel[(requests,)](
        batch.table,
        batch.floats,
        tokens,
        confidence,
        state.canvas,
        state.canvas.stride(0),
        state.order,
        state.order.stride(0),
        state.committing,
        state.left,
        state.stops,
        state.stops.stride(0),
        result.sampled,
        result.sampled.stride(0),
        result.num_sampled,
        result.num_rejected,
        result.num_nans,
        state.mask_token_id,
        STOPS=state.stops.shape[1] if stops else 0,
        LANES=triton.next_power_of_2(widest),
    )

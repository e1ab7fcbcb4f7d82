"""One denoising step of a batch of blocks: hidden states in, emitted blocks out, without waiting for the device.

The vocabulary projection and the proposals run over chunks of rows with a fixed budget, so that memory doesn't grow
with the batch. On a CPU the steps are torch's and numpy's, elsewhere Triton kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from sinkprune_plugin.sampling import torch_backend
from sinkprune_plugin.sampling.batch_state import BatchResult, BatchState, DeviceBatch
from sinkprune_plugin.sampling.batch_table import Column
from sinkprune_plugin.sampling.noise import CHUNK
from sinkprune_plugin.sampling.tokens import Needs, filter_cuts

__all__ = ["LOGITS_BYTES", "BatchSampler", "StepNeeds"]

# Logits held at once, as float32. On a GPU 1061 rows of LLaDA's 126464: more than a batch of 64 blocks of 32 has masked
# positions on average. A CPU reads them back from its caches or memory, so less is better.
LOGITS_BYTES = {"cpu": 64 << 20}
DEFAULT_LOGITS_BYTES = 512 << 20


@dataclass(frozen=True)
class StepNeeds:
    """What the host knows of a step.

    :param widest: width of the widest block
    :param proposals: what at least one row asks for
    :param filtered: (F,) int64, the rows that are drawn from with a filter, ascending
    :param stops: whether a request may stop early
    """

    widest: int
    proposals: Needs
    filtered: np.ndarray
    stops: bool


def backend_for(device: torch.device) -> ModuleType:
    """The module that runs a step's parts on a device.

    :param device: of the canvases
    """
    if device.type == "cpu":
        return torch_backend
    from sinkprune_plugin.sampling import triton_backend

    return triton_backend


class BatchSampler:
    """Denoises the open blocks of many slots.

    :param state: of the slots
    :param head: (n, d) hidden states to (n, V) logits, which may be overwritten
    :param vocabulary: V
    :param logits_bytes: budget of a chunk; default by device
    :param backend: in place of :func:`backend_for`
    """

    def __init__(
        self,
        state: BatchState,
        head: Callable[[torch.Tensor], torch.Tensor],
        vocabulary: int,
        *,
        logits_bytes: int | None = None,
        backend: ModuleType | None = None,
    ) -> None:
        self.state = state
        self._head = head
        device = state.canvas.device
        self._backend = backend_for(device) if backend is None else backend
        budget = LOGITS_BYTES.get(device.type, DEFAULT_LOGITS_BYTES) if logits_bytes is None else logits_bytes
        self.chunk_rows = max(1, budget // (4 * vocabulary))

    def gather(self, hidden: torch.Tensor, before: torch.Tensor | None, batch: DeviceBatch) -> torch.Tensor:
        """Pick the hidden states of the positions that are still masked.

        :param hidden: (canvas positions of the batch, d)
        :param before: (·, d), those before each canvas, for models with shifted logits; None for others
        :param batch: the step
        :return: (N, d)
        """
        if not len(batch.row_request):
            return hidden[:0]
        return self._backend.gather(hidden, before, batch, self.state)

    def __call__(self, hidden: torch.Tensor, batch: DeviceBatch, needs: StepNeeds) -> BatchResult:
        """One step.

        :param hidden: (N, d) from :meth:`gather`
        :param batch: the step
        :param needs: what the host knows of it
        :return: what came of it
        """
        device, rows = batch.table.device, len(batch.row_request)
        tokens = torch.empty(rows, dtype=torch.int64, device=device)
        confidence = torch.empty(rows, dtype=torch.float64, device=device)
        for begin in range(0, rows, self.chunk_rows):
            part = slice(begin, min(begin + self.chunk_rows, rows))
            logits = self._head(hidden[part])
            cuts = self._cuts(logits, batch, needs.filtered, part)
            self._backend.propose(logits, batch, self.state, part, needs.proposals, cuts, tokens, confidence)
        result = BatchResult.empty(len(batch.table), max(needs.widest, 1), device)
        self._backend.unmask(tokens, confidence, batch, self.state, result, stops=needs.stops)
        return result

    def profile(self, hidden: torch.Tensor, most_rows: int) -> None:
        """Take as much memory as a step can, for an engine that measures its peak.

        :param hidden: (·, d), for its width and dtype
        :param most_rows: rows that a step can have
        """
        logits = self._head(hidden.new_zeros(min(self.chunk_rows, most_rows), hidden.shape[1]))
        few = max(1, CHUNK // logits.shape[1])
        own = logits[:few].float()
        zeros = torch.zeros(len(own), dtype=torch.int64, device=own.device)
        filter_cuts(own, zeros, zeros.double() + 0.5)

    def _cuts(
        self, logits: torch.Tensor, batch: DeviceBatch, filtered: np.ndarray, part: slice
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        first, last = np.searchsorted(filtered, (part.start, part.stop)).tolist()
        if first == last:
            return None
        count, vocabulary = logits.shape
        value = torch.full((count,), -torch.inf, dtype=torch.float32, device=logits.device)
        index = torch.full((count,), vocabulary, dtype=torch.int64, device=logits.device)
        few = max(1, CHUNK // vocabulary)
        for begin in range(first, last, few):
            rows = batch.filtered[begin : min(begin + few, last)]
            own = logits[rows - part.start].float()
            own[:, self.state.mask_token_id] = -torch.inf
            lines = batch.row_request[rows]
            top_k = batch.table[lines, Column.TOP_K]
            top_p = batch.floats[lines, Column.TOP_P]
            value[rows - part.start], index[rows - part.start] = filter_cuts(own, top_k, top_p)
        return value, index

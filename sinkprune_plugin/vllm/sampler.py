"""vLLM's interface to the sampler of denoising models; the mathematics is in :mod:`sinkprune_plugin.sampling`."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from sinkprune_plugin.sampling.batch_state import BatchState, DeviceBatch
from sinkprune_plugin.sampling.batched import BatchSampler, StepNeeds
from sinkprune_plugin.vllm.request_plan import stops_of

__all__ = ["DenoisingSampler"]


class DenoisingSampler:
    """Callable in place of vLLM's sampler. It is given hidden states, not logits: it projects them itself, in chunks.

    :param req_states: the worker's request states; ``draft_tokens`` (slots, canvas) int64 holds each slot's canvas
    :param mask_token_id: the mask token
    :param model: a :class:`~sinkprune_plugin.vllm.architectures.decoder.DenoisingLM`
    :param vocabulary: logits of a row
    """

    # The runner reads this; None means that nothing counts tokens for penalties, which are refused in the front end.
    penalties_state = SimpleNamespace(output_bin_counts=None)
    compute_nans = True

    def __init__(self, req_states: Any, mask_token_id: int, model: Any, vocabulary: int) -> None:
        self.state = BatchState(req_states.draft_tokens, mask_token_id)
        # Looked up in each call, so that a benchmark can time it.
        self.batched = BatchSampler(self.state, lambda hidden: model.project(hidden), vocabulary)
        self._step: tuple[DeviceBatch, StepNeeds] | None = None
        self._new: list[int] = []
        cuda = self.state.canvas.is_cuda
        self._left = torch.zeros_like(self.state.left, device="cpu", pin_memory=cuda)
        self._left_copied = torch.cuda.Event() if cuda else None

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """Give a request a canvas full of masks before its first step.

        :param req_idx: slot
        :param sampling_params: of the request
        """
        self._new.append(req_idx)
        self.state.set_stops(req_idx, stops_of(sampling_params))

    def apply_staged_writes(self) -> None:
        """Carry out what :meth:`add_request` asked for; the runner calls this before it reads the canvases."""
        if self._new:
            slots = async_tensor_h2d(np.array(self._new, np.int64), device=self.state.canvas.device)
            self.state.reset(slots)
            self._new.clear()

    def begin(self, batch: DeviceBatch, needs: StepNeeds) -> None:
        """Set the step that the next call is for.

        :param batch: the step
        :param needs: what the host knows of it
        """
        self._step = batch, needs

    def known_left(self) -> np.ndarray[Any, Any] | None:
        """How many positions of each slot's block are masked.

        :return: (slots,) int32; None if the device hasn't told yet
        """
        if self._left_copied is not None and not self._left_copied.query():
            return None
        return self._left.numpy()

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: Any,
        draft_logits: torch.Tensor | None = None,  # noqa: ARG002
    ) -> SamplerOutput:
        """One denoising step of the batch.

        :param logits: (N, d) hidden states that :meth:`BatchSampler.gather` picked
        :param input_batch: the batch
        :param draft_logits: not used
        :return: int32 ``sampled_token_ids`` (num_reqs, W), and ``num_sampled``, ``num_rejected`` and ``num_nans``,
            (num_reqs,) each
        """
        step, self._step = self._step, None
        if step is None:
            return self._dummy(logits, input_batch.num_reqs)
        result = self.batched(logits, *step)
        self._left.copy_(self.state.left, non_blocking=True)
        if self._left_copied is not None:
            self._left_copied.record()
        return SamplerOutput(
            sampled_token_ids=result.sampled,
            logprobs_tensors=None,
            num_nans=result.num_nans,
            num_sampled=result.num_sampled,
            num_rejected=result.num_rejected,
        )

    def _dummy(self, hidden: torch.Tensor, num_reqs: int) -> SamplerOutput:
        """vLLM measures its memory with runs that plan nothing."""
        self.batched.profile(hidden, self.state.canvas.numel())
        nothing = torch.zeros(num_reqs, 1, dtype=torch.int32, device=hidden.device)
        numbers = nothing[:, 0].contiguous()
        return SamplerOutput(nothing, None, numbers, numbers.clone(), numbers.clone())

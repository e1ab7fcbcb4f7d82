"""The sampler of denoising models: proposes tokens for a batch of blocks, unmasks some, emits finished blocks.

The mathematics is that of :mod:`sinkprune_plugin.sampling`, function for function; this module adds only the batch's
layout and vLLM's interface. Nothing waits for the device.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from sinkprune_plugin.sampling.select import select_unmask
from sinkprune_plugin.sampling.tokens import propose
from sinkprune_plugin.vllm.step_plan import RequestFloats, RequestNumbers, StepPlan

__all__ = ["DenoisingSampler"]


class DenoisingSampler:
    """Callable in place of vLLM's sampler.

    :param req_states: the worker's request states; ``draft_tokens`` (slots, canvas) int64 holds each slot's canvas
    :param mask_token_id: the mask token
    """

    # The runner reads this; None means that nothing counts tokens for penalties, which are refused in the front end.
    penalties_state = SimpleNamespace(output_bin_counts=None)
    compute_nans = False

    def __init__(self, req_states: Any, mask_token_id: int) -> None:
        self._canvas: torch.Tensor = req_states.draft_tokens
        self._mask = mask_token_id
        # Finished blocks whose keys and values are still to be computed from their final tokens (cache commit).
        self._committing = torch.zeros(self._canvas.shape[0], dtype=torch.bool, device=self._canvas.device)
        self.plan: StepPlan | None = None
        self._new: list[int] = []

    def add_request(self, req_idx: int, sampling_params: Any) -> None:  # noqa: ARG002
        """Give a request a canvas full of masks before its first step, which may already run it.

        :param req_idx: slot
        :param sampling_params: not used, the model state keeps what the sampler needs
        """
        self._new.append(req_idx)

    def apply_staged_writes(self) -> None:
        """Carry out what :meth:`add_request` asked for; the runner calls this before it reads the canvases."""
        if self._new:
            slots = _to_device(np.array(self._new, np.int64), self._canvas.device)
            self._canvas[slots] = self._mask
            self._committing[slots] = False
            self._new.clear()

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: Any,
        draft_logits: torch.Tensor | None = None,  # noqa: ARG002
    ) -> SamplerOutput:
        """One denoising step of the batch.

        :param logits: (N, V), the rows that the plan named
        :param input_batch: the batch
        :param draft_logits: not used
        :return: int32 ``sampled_token_ids`` (num_reqs, W), ``num_sampled`` and ``num_rejected`` (num_reqs,)
        """
        plan, self.plan = self.plan, None
        device = self._canvas.device
        num_reqs = input_batch.num_reqs
        width = 1 if plan is None else max(plan.widest, 1)
        sampled = torch.zeros(num_reqs, width, dtype=torch.int32, device=device)
        num_sampled = torch.zeros(num_reqs, dtype=torch.int32, device=device)
        num_rejected = torch.zeros(num_reqs, dtype=torch.int32, device=device)
        num_nans = torch.zeros(num_reqs, dtype=torch.int32, device=device)
        if plan is not None:
            if len(plan.idle):
                self._begin(plan, num_rejected)
            if len(plan.numbers.slot):
                self._denoise(plan, logits, sampled, num_sampled, num_rejected, num_nans)
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=None,
            num_nans=num_nans,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _begin(self, plan: StepPlan, num_rejected: torch.Tensor) -> None:
        """Give requests whose prompt has been run a canvas full of masks."""
        staged = _to_device(np.stack([plan.idle, plan.idle_slots, plan.idle_rejected]), self._canvas.device)
        self._canvas[staged[1]] = self._mask
        self._committing[staged[1]] = False
        num_rejected[staged[0]] = staged[2].to(torch.int32)

    def _denoise(
        self,
        plan: StepPlan,
        logits: torch.Tensor,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        num_nans: torch.Tensor,
    ) -> None:
        device, widest = logits.device, plan.widest
        numbers = RequestNumbers(*_to_device(np.stack(plan.numbers, axis=1), device).unbind(1))
        floats = RequestFloats(*_to_device(np.stack(plan.floats, axis=1), device).unbind(1))
        row_request, row_column = _to_device(np.stack([plan.row_request, plan.row_column]), device)

        broken = logits.isnan().any(dim=1)
        num_nans.index_add_(0, numbers.number[row_request], broken.to(torch.int32))
        tokens, confidence = propose(
            logits,
            temperature=floats.temperature[row_request],
            top_k=numbers.top_k[row_request],
            top_p=floats.top_p[row_request],
            remasking=numbers.remasking[row_request],
            seed=numbers.seed[row_request],
            step=numbers.noise_step[row_request],
            position=numbers.start[row_request] + row_column,
            mask_token_id=self._mask,
            needs=plan.needs,
        )
        canvas = self._canvas[numbers.slot, :widest]
        masked = (canvas == self._mask) & (torch.arange(widest, device=device) < numbers.width[:, None])
        grid = torch.full(canvas.shape, -torch.inf, dtype=confidence.dtype, device=device)
        grid[row_request, row_column] = confidence
        proposed = canvas.clone()
        proposed[row_request, row_column] = tokens.to(canvas.dtype)
        chosen = select_unmask(torch.where(masked, grid, -torch.inf), numbers.to_unmask, floats.threshold)
        canvas = torch.where(chosen, proposed, canvas)

        finished = ~(masked & ~chosen).any(dim=1)
        committing = self._committing[numbers.slot]
        waits = finished & (numbers.commits != 0) & (numbers.is_last == 0) & ~committing
        emits = finished & ~waits
        self._committing[numbers.slot] = waits
        self._canvas[numbers.slot, :widest] = torch.where(emits[:, None], self._mask, canvas)
        sampled[numbers.number] = canvas.to(torch.int32)
        num_sampled[numbers.number] = torch.where(emits, numbers.width, 0).to(torch.int32)
        num_rejected[numbers.number] = torch.where(emits, numbers.rejected_finished, numbers.rejected).to(torch.int32)


def _to_device(array: Any, device: torch.device) -> torch.Tensor:
    return async_tensor_h2d(np.ascontiguousarray(array), device=device)

"""vLLM's scheduler for models that denoise: how far back a request rolls, and how wide its next canvas is.

Contract with vLLM 0.32, checked by integration_tests/test_vllm_contract.py:

1. A step schedules ``num_tokens + len(spec_token_ids) - num_computed_tokens`` tokens of a request. Here
   ``spec_token_ids`` are placeholders for the canvas; the worker has its content.
2. ``Scheduler.update_from_output`` takes tokens that were emitted for accepted placeholders and rolls
   ``num_computed_tokens`` back by the others, also where nothing was emitted.
3. After a step the engine calls ``update_draft_token_ids`` for every request of it; what this sets is the canvas of the
   next step.
4. A running request whose ``next_decode_eligible_step`` is beyond ``current_step`` is skipped; ``schedule`` has
   advanced ``current_step`` by one before it looks.
5. The worker keeps its own count: it adds the query's length minus ``num_rejected``, which the sampler sets so that
   both counts agree (see :mod:`sinkprune_plugin.vllm.step_plan`).

Only synchronous scheduling: each step must know whether the last one finished a block.
"""

from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from sinkprune_plugin.sampling.options import SamplingOptions
from sinkprune_plugin.vllm.request_plan import plan_of

__all__ = ["DenoisingScheduler"]


class DenoisingScheduler(Scheduler):
    """Scheduler whose requests denoise a canvas, see the module's contract."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._plans: WeakKeyDictionary[Request, SamplingOptions] = WeakKeyDictionary()
        self._placeholders = [-1] * self.num_spec_tokens
        self._budget = min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)

    def add_request(self, request: Request) -> None:
        """Add a request.

        :param request: a request that the front end has validated
        """
        self._plans[request] = plan_of(request.sampling_params, self.num_spec_tokens)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule one step; a request whose whole query doesn't fit waits for the next one.

        :param throttle_prefills: as in vLLM
        :return: the step
        """
        left = self._budget
        for request in self.running:
            needed = request.num_tokens_with_spec - request.num_computed_tokens
            if needed > left:
                # Half of a bidirectional query would be a different computation, not a part of this one.
                request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)
            else:
                left -= needed
        return super().schedule(throttle_prefills)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        """Account for a step, then roll back the requests whose next step computes everything again.

        :param scheduler_output: the step
        :param model_runner_output: what came of it
        :return: as in vLLM
        """
        requests = [self.requests.get(name) for name in scheduler_output.num_scheduled_tokens]
        emitted_before = [0 if request is None else request.num_output_tokens for request in requests]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request, before in zip(requests, emitted_before, strict=True):
            if request is None or request.is_finished():
                continue
            cache = self._plans[request].cache
            at_block_start = (
                request.num_output_tokens > before
                or request.request_id not in scheduler_output.scheduled_spec_decode_tokens
            )
            if cache == "none" or (cache in ("prefix", "dual") and at_block_start):
                request.num_computed_tokens = 0
        return outputs

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Set the canvas of the next step.

        :param draft_token_ids: the requests of the last step; the ids are placeholders and ignored
        """
        for name in draft_token_ids.req_ids:
            request = self.requests.get(name)
            if request is not None and not request.is_finished():
                request.spec_token_ids = self._placeholders[: self._canvas_width(request)]

    def _canvas_width(self, request: Request) -> int:
        options = self._plans[request]
        remaining = options.gen_length - request.num_output_tokens
        refreshing = request.num_computed_tokens == 0
        if options.cache in ("none", "prefix") or (options.cache == "dual" and refreshing):
            return remaining
        return min(options.block_length, remaining)

"""vLLM's scheduler for models that denoise: what each request runs in a step, and where it stands afterwards.

Contract with vLLM 0.32, checked on a live scheduler by integration_tests/test_vllm_scheduler.py:

1. ``Scheduler.schedule`` offers the tokens of a request that aren't computed to ``_reserve_prefill_lookahead`` and runs
   as many as this returns; with 0 the request waits, and so do those that were to be admitted after it.
2. It calls ``KVCacheManager.allocate_slots`` with that number, and ``_update_after_schedule`` last, before the step is
   sent to the workers.
3. ``scheduled_spec_decode_tokens`` says how many tokens at the end of a query are canvas. Only their number is read, so
   a ``range`` is sent in place of a list: the same few bytes for any width.
4. ``update_from_output`` rolls ``num_computed_tokens`` back by scheduled placeholders that emitted nothing. Here they
   are taken out before it looks, since the scheduler knows where each request stands.
5. It ends requests in ``grammar_compile_error_reqs`` with an error.
6. The worker keeps its own count: it adds the query's length minus ``num_rejected``, which the sampler sets so that
   both counts agree (see :mod:`sinkprune_plugin.vllm.step_plan`).

Scheduling is synchronous or asynchronous, as vLLM is configured. A request with a fixed number of steps per block is
accounted for when its step is scheduled, so that with asynchronous scheduling the next one follows before the first has
run. Other requests wait for each step's result.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from sinkprune_plugin.vllm.request_plan import plan_of
from sinkprune_plugin.vllm.request_progress import Query, RequestProgress

__all__ = ["BLOCK_ROWS", "DenoisingScheduler"]

logger = init_logger("vllm.sinkprune")

# Rows of blocks in a step, over all requests; one request's block is always run. Σ of the widths bounds what the
# sampler keeps for each row besides its logits, which it computes in chunks.
BLOCK_ROWS = 4096


class _Step(NamedTuple):
    """A request's share of a step that is on its way.

    :param request: the request
    :param query: what it runs
    :param computed: positions that were computed before
    :param predicted: tokens that it will emit; None if that isn't known
    """

    request: Request
    query: Query
    computed: int
    predicted: int | None


class DenoisingScheduler(Scheduler):
    """Scheduler whose requests denoise a canvas, see the module's contract."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._progress: WeakKeyDictionary[Request, RequestProgress] = WeakKeyDictionary()
        # Steps on their way, by the identity of vLLM's description of them.
        self._steps: dict[int, dict[str, _Step]] = {}
        self._tokens_left = self._rows_left = 0
        self._block_rows = max(BLOCK_ROWS, self.num_spec_tokens)
        self._allocate = self.kv_cache_manager.allocate_slots
        # Narrower than vLLM's signature: all but the first two are passed by name.
        self.kv_cache_manager.allocate_slots = self._allocate_whole  # type: ignore[method-assign,assignment]

    def add_request(self, request: Request) -> None:
        """Add a request.

        :param request: a request that the front end has validated
        """
        options = plan_of(request.sampling_params, self.num_spec_tokens)
        self._progress[request] = RequestProgress(options, request.num_prompt_tokens)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule one step; a request whose query doesn't fit and can't be split waits for the next one.

        :param throttle_prefills: as in vLLM
        :return: the step
        """
        self._tokens_left = min(self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)
        self._rows_left = self._block_rows
        return super().schedule(throttle_prefills)

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:  # noqa: ARG002
        """How many tokens of a request are run: a whole step's, whole blocks of a context, or none."""
        progress = self._progress[request]
        if request.status != RequestStatus.RUNNING:
            progress.restart(request.num_output_tokens)
        elif request.num_in_flight_tokens and not progress.fixed:
            return 0
        elif progress.emitted >= request.max_tokens:
            # Its last tokens are on their way.
            return 0
        tokens, _, rows = progress.query(num_computed_tokens, self._tokens_left)
        # Half of a bidirectional query would be a different computation, not a part of this one.
        if tokens > self._tokens_left or rows > self._rows_left:
            return 0
        self._tokens_left -= tokens
        self._rows_left -= rows
        return tokens

    def _allocate_whole(self, request: Request, num_new_tokens: int, **options: Any) -> KVCacheBlocks | None:
        """Reserve pages for prompt and generation with the first step, so that nobody is admitted to be preempted."""
        found = options.get("num_new_computed_tokens", 0)
        ahead = self._progress[request].length - request.num_computed_tokens - found - num_new_tokens
        return self._allocate(request, num_new_tokens, **{**options, "num_lookahead_tokens": max(ahead, 0)})

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # Nothing reads the canvas back: the worker has it.
        scheduler_output.num_spec_tokens_to_schedule = 0
        steps = {}
        for name in scheduler_output.num_scheduled_tokens:
            request = self.requests[name]
            progress, computed = self._progress[request], request.num_computed_tokens
            query = progress.query(computed, scheduler_output.num_scheduled_tokens[name])
            if query.canvas:
                # Typed as lists; see the contract.
                canvas: Any = range(query.canvas)
                scheduler_output.scheduled_spec_decode_tokens[name] = canvas
            predicted = progress.predict(query) if progress.fixed else None
            steps[name] = _Step(request, query, computed, predicted)
        super()._update_after_schedule(scheduler_output)
        for step in steps.values():
            if step.predicted is not None:
                self._settle(step, step.predicted)
        self._steps[id(scheduler_output)] = steps

    def _settle(self, step: _Step, emitted: int) -> None:
        progress = self._progress[step.request]
        step.request.num_computed_tokens = progress.settle(step.query, step.computed, emitted)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        """Account for a step: emit finished blocks, and end the requests whose logits aren't numbers.

        :param scheduler_output: the step
        :param model_runner_output: what came of it
        :return: as in vLLM
        """
        # A request may have ended, or have been preempted and begun anew, while its step was on its way.
        steps = {
            name: step
            for name, step in self._steps.pop(id(scheduler_output), {}).items()
            if self.requests.get(name) is step.request
            and not step.request.is_finished()
            and not step.request.num_stale_output_tokens
        }
        scheduler_output.scheduled_spec_decode_tokens = {}
        for name, step in steps.items():
            tokens = model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[name]]
            reason = self._failure(step, len(tokens), (model_runner_output.num_nans_in_logits or {}).get(name, 0))
            if reason:
                logger.error("request %s ends with an error: %s", name, reason)
                tokens.clear()
                self.grammar_compile_error_reqs.add(name)
        before = {name: step.request.num_output_tokens for name, step in steps.items()}
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for name, step in steps.items():
            if step.predicted is None and not step.request.is_finished():
                self._settle(step, step.request.num_output_tokens - before[name])
        return outputs

    @staticmethod
    def _failure(step: _Step, emitted: int, nans: int) -> str | None:
        if nans:
            return f"{nans} of its logits' rows hold NaN; the weights are damaged, or overflow in this --dtype"
        if step.predicted is not None and emitted != step.predicted:
            return f"its step gave {emitted} tokens where {step.predicted} were due, so its block isn't finished"
        return None

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Does nothing: the canvas of a step is known when it is scheduled.

        :param draft_token_ids: ignored
        """

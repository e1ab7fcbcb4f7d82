"""The scheduler's contract with vLLM, on a live scheduler whose worker is a list of numbers."""

import pickle
from dataclasses import replace

import pytest
import torch
from vllm_engine import prepare_vllm

prepare_vllm()

from vllm import SamplingParams  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: E402
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

from sinkprune_plugin.loading import EMBEDDED_MODEL  # noqa: E402
from sinkprune_plugin.sampling.options import SamplingOptions  # noqa: E402
from sinkprune_plugin.vllm import scheduler as scheduler_module  # noqa: E402
from sinkprune_plugin.vllm.request_plan import attach_plan, plan_of  # noqa: E402
from sinkprune_plugin.vllm.request_progress import RequestProgress  # noqa: E402

CACHES = ("none", "prefix", "dual", "commit")
PAGE = 16


@pytest.fixture(scope="module")
def config():
    arguments = EngineArgs(model=str(EMBEDDED_MODEL), dtype="float32", enforce_eager=True, max_model_len=256,
                           max_num_seqs=16, max_num_batched_tokens=512, diffusion_config={"canvas_length": 128},
                           num_gpu_blocks_override=1000)  # fmt: skip
    return arguments.create_engine_config()


@pytest.fixture
def make(config):
    def make(pages=1000):
        config.cache_config.num_gpu_blocks = pages
        spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=8, dtype=torch.float32)
        cache = KVCacheConfig(
            num_blocks=pages, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        return config.scheduler_config.get_scheduler_cls()(
            vllm_config=config, kv_cache_config=cache, structured_output_manager=StructuredOutputManager(config),
            block_size=PAGE,
        )  # fmt: skip

    return make


def request(name, prompt=20, max_tokens=None, **options):
    grid = {key: options.pop(key) for key in ("on_grid", "offset") if key in options}
    resolved = replace(SamplingOptions.resolve(**{"gen_length": 32, "block_length": 16, "steps": 8, **options}), **grid)
    settings = SamplingParams(max_tokens=max_tokens or resolved.gen_length, ignore_eos=True)
    attach_plan(settings, resolved)
    return Request(name, list(range(5, 5 + prompt)), settings, None)


class Worker:
    """What a worker counts of each request, and what it returns.

    :param scheduler: the scheduler that it serves
    :param ahead: steps that are scheduled before the first of them has come back
    """

    def __init__(self, scheduler, ahead=0):
        self.scheduler, self.ahead = scheduler, ahead
        self.requests, self.computed, self.on_their_way = {}, {}, []
        self.finished = {}

    def add(self, *requests):
        for made in requests:
            self.scheduler.add_request(made)

    def step(self, emit=None, nans=None):
        """Schedule a step, and hand the result of an earlier one back.

        :param emit: request → tokens that it emits, where that isn't known in advance
        :param nans: request → broken rows
        :return: the step, as vLLM sends it to workers
        """
        output = self.scheduler.schedule()
        for new in output.scheduled_new_reqs:
            options = plan_of(new.sampling_params, 128)
            self.requests[new.req_id] = RequestProgress(options, new.prompt_len)
            self.requests[new.req_id].restart(len(new.prefill_token_ids) - new.prompt_len)
            self.computed[new.req_id] = 0
        tokens = []
        for name, scheduled in output.num_scheduled_tokens.items():
            request, computed = self.requests[name], self.computed[name]
            query = request.query(computed, scheduled)
            assert scheduled == query.tokens
            assert len(output.scheduled_spec_decode_tokens.get(name, ())) == query.canvas
            emitted = request.predict(query) if request.fixed else (emit or {}).get(name, 0)
            self.computed[name] = request.settle(query, computed, emitted)
            tokens.append([7] * emitted)
        names = list(output.num_scheduled_tokens)
        places = {name: place for place, name in enumerate(names)}
        result = ModelRunnerOutput(names, places, sampled_token_ids=tokens, num_nans_in_logits=nans)
        self.on_their_way.append((output, result))
        # What a worker in another process gets: the scheduler changes its own afterwards.
        sent = pickle.loads(pickle.dumps(output))  # noqa: S301 - its own
        while len(self.on_their_way) > (self.ahead if names else 0):
            self.receive()
        return sent

    def receive(self):
        for outputs in self.scheduler.update_from_output(*self.on_their_way.pop(0)).values():
            self.finished |= {
                each.request_id: str(each.finish_reason) for each in outputs.outputs if each.finish_reason
            }

    def run(self):
        """All that is left; returns the number of steps that ran something."""
        steps = 0
        while self.scheduler.has_unfinished_requests():
            steps += bool(self.step().num_scheduled_tokens)
            assert steps < 500
        return steps


BOTH = pytest.mark.parametrize("ahead", [0, 1], ids=["synchronous", "asynchronous"])


@BOTH
def test_every_step_is_what_the_worker_counts(ahead, make):
    """All caches at once; asynchronously, the next step is scheduled before the one before has come back."""
    worker = Worker(make(), ahead)
    requests = [request(cache, cache=cache, block_length=(16, 8, 16, 8)[number]) for number, cache in enumerate(CACHES)]
    worker.add(*requests)
    # The prompt, 8 steps, and the first three blocks of four once more; without waiting for a result in between.
    assert worker.run() == 1 + 8 + 3
    assert worker.finished == dict.fromkeys(CACHES, "length")
    assert [made.num_output_tokens for made in requests] == [32] * 4


@BOTH
@pytest.mark.parametrize(("budget", "passes"), [(512, 0), (64, 3), (40, 6)])
def test_a_block_causal_prompt_in_chunks(ahead, budget, passes, make, config, monkeypatch):
    """220 tokens, of which 12 are in the first block of 16; each chunk is whole blocks."""
    # As for a model with such a context; this one's configuration has it off.
    monkeypatch.setattr(config.scheduler_config, "enable_chunked_prefill", True)
    worker = Worker(make(), ahead)
    worker.scheduler.max_num_scheduled_tokens = budget
    made = request("grid", prompt=220, cache="commit", on_grid=True, offset=12)
    worker.add(made)
    # Blocks of 4, 16 and 12 tokens have 1, 4 and 3 of the 8 steps, and the first two one more.
    assert worker.run() == passes + 8 + 2
    assert worker.finished == {"grid": "length"}
    assert made.num_output_tokens == 32


@BOTH
def test_an_answer_is_cut_and_nothing_runs_beyond_it(ahead, make):
    worker = Worker(make(), ahead)
    worker.add(request("cut", max_tokens=10, steps=32))
    assert worker.run() == 16
    assert worker.finished == {"cut": "length"}


def test_a_threshold_waits_for_each_result_and_the_others_go_on(make):
    worker = Worker(make(), ahead=1)
    worker.add(request("free", threshold=0.5), request("fixed"))
    ran = [set(worker.step(emit={"free": 16}).num_scheduled_tokens) for _ in range(6)]
    assert ran == [{"free", "fixed"}, {"fixed"}, {"free", "fixed"}, {"fixed"}, {"fixed"}, {"fixed"}]
    worker.run()
    assert worker.finished == {"free": "length", "fixed": "length"}


def test_the_canvas_is_sent_as_its_width(make):
    worker = Worker(make())
    worker.add(request("wide", gen_length=128))
    sent = worker.step()
    assert sent.scheduled_spec_decode_tokens == {"wide": range(128)}
    assert len(pickle.dumps(sent.scheduled_spec_decode_tokens["wide"])) < 60
    # Nor are placeholders sent back.
    assert sent.num_spec_tokens_to_schedule == 0
    worker.scheduler.update_draft_token_ids(DraftTokenIds(["wide"], [[]]))
    worker.run()


def test_a_query_that_does_not_fit_waits_whole(make):
    """512 tokens in a batch: two of three requests of 200."""
    worker = Worker(make())
    worker.add(*(request(name, prompt=168, steps=2) for name in "abc"))
    assert worker.step().num_scheduled_tokens == {"a": 200, "b": 200}
    assert worker.step().num_scheduled_tokens == {"a": 200, "b": 200}
    assert worker.step().num_scheduled_tokens == {"c": 200}


def test_a_running_query_that_does_not_fit_is_skipped_whole(make):
    """Blocks of 100 tokens, of which five fit; then the first tokens of all blocks again."""
    worker = Worker(make())
    worker.add(*(request(str(i), prompt=4, gen_length=100, block_length=50, steps=4, cache="dual") for i in range(6)))
    assert list(worker.step().num_scheduled_tokens.values()) == [104] * 4
    assert worker.step().num_scheduled_tokens == {"0": 50, "1": 50, "2": 50, "3": 50, "4": 104, "5": 104}
    # All but the last two begin their second block: 104 of each, and room for two blocks of 50.
    assert worker.step().num_scheduled_tokens == {"0": 104, "1": 104, "2": 104, "3": 104, "4": 50}
    assert worker.run() > 0


def test_the_widths_of_all_blocks_are_bounded(make, monkeypatch):
    monkeypatch.setattr(scheduler_module, "BLOCK_ROWS", 40)
    # At least the widest block.
    assert make()._block_rows == 128
    scheduler = make()
    scheduler._block_rows = 40
    worker = Worker(scheduler)
    worker.add(*(request(name, steps=2) for name in "abc"))
    assert list(worker.step().num_scheduled_tokens) == ["a", "b"]
    worker.run()
    assert len(worker.finished) == 3


@BOTH
@pytest.mark.parametrize("cache", CACHES)
def test_nobody_is_admitted_to_be_preempted(cache, ahead, make):
    """Pages for two of five requests, with 52 tokens each; only the prompt of a third would fit."""
    worker = Worker(make(pages=1 + 2 * 4 + 2), ahead)
    worker.add(*(request(name, cache=cache) for name in "abcde"))
    worker.step()
    assert [made.request_id for made in worker.scheduler.running] == ["a", "b"]
    held = [len(worker.scheduler.kv_cache_manager.get_block_ids(name)[0]) for name in "ab"]
    assert held == [4, 4]
    worker.run()
    assert worker.finished == dict.fromkeys("abcde", "length")
    assert sum(made.num_preemptions for made in worker.scheduler.requests.values()) == 0


@BOTH
@pytest.mark.parametrize("cache", CACHES)
def test_a_preempted_request_begins_its_block_anew(cache, ahead, make):
    """As vLLM preempts where it takes new weights; commit computes what it had kept block by block."""
    worker = Worker(make(), ahead)
    made = request("again", cache=cache, gen_length=48, steps=12)
    worker.add(made)
    while made.num_output_tokens < 32:
        worker.step()
    worker.step()
    while worker.on_their_way:
        worker.receive()
    assert worker.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert made.num_preemptions == 1
    first = worker.step().num_scheduled_tokens["again"]
    assert first == (20 if cache == "commit" else 68)
    if cache == "commit":
        assert [worker.step().num_scheduled_tokens["again"] for _ in range(3)] == [16, 16, 16]
    worker.run()
    assert worker.finished == {"again": "length"}
    assert made.num_output_tokens == 48


def test_preempted_with_a_step_on_its_way(make):
    worker = Worker(make(), ahead=1)
    made = request("again", threshold=0.5)
    fixed = request("fixed")
    worker.add(made, fixed)
    worker.step()
    assert worker.scheduler.reset_prefix_cache(reset_running_requests=True)
    # The step that is lost emitted a block, which must not count.
    worker.on_their_way[0][1].sampled_token_ids[0].extend([7] * 16)
    worker.step()
    assert made.num_output_tokens == 0
    for _ in range(20):
        worker.step(emit={"again": 16})
    assert worker.finished == {"again": "length", "fixed": "length"}


@BOTH
def test_broken_logits_end_that_request_with_an_error(ahead, make):
    worker = Worker(make(), ahead)
    broken, good = request("broken", steps=2), request("good", steps=2)
    worker.add(broken, good)
    worker.step(nans={"broken": 3, "good": 0})
    worker.run()
    assert worker.finished == {"broken": "error", "good": "length"}
    # Not even the block that its step would have emitted.
    assert broken.num_output_tokens == 0


def test_a_block_that_is_not_finished_in_time_is_an_error(make):
    """The scheduler goes by the number of steps; should the worker differ, no wrong token leaves."""
    worker = Worker(make())
    made = request("late", steps=2)
    worker.add(made)
    output = worker.scheduler.schedule()
    late = ModelRunnerOutput(["late"], {"late": 0}, sampled_token_ids=[[]])
    (outputs,) = worker.scheduler.update_from_output(output, late).values()
    assert str(outputs.outputs[0].finish_reason) == "error"


def test_an_aborted_request_is_forgotten_while_its_step_is_on_its_way(make):
    worker = Worker(make(), ahead=1)
    worker.add(request("gone"), request("stays"))
    worker.step()
    worker.scheduler.finish_requests("gone", RequestStatus.FINISHED_ABORTED)
    worker.run()
    assert worker.finished == {"stays": "length"}
    assert not worker.scheduler._steps

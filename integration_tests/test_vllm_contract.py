"""What the adapter relies on in vLLM: an incompatible version fails here with a clear cause, not in an engine."""

import inspect

import pytest
from vllm_engine import prepare_vllm

prepare_vllm()

from vllm.config import SchedulerConfig, VllmConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.engine.input_processor import InputProcessor  # noqa: E402
from vllm.v1.worker.gpu.model_states.interface import ModelState  # noqa: E402
from vllm.v1.worker.gpu.sample.output import SamplerOutput  # noqa: E402
from vllm.v1.worker.gpu.states import RequestState  # noqa: E402

from sinkprune_plugin.loading import EMBEDDED_MODEL  # noqa: E402
from sinkprune_plugin.vllm.cpu import is_cpu_build  # noqa: E402
from sinkprune_plugin.vllm.model_state import DenoisingModelState  # noqa: E402
from sinkprune_plugin.vllm.scheduler import DenoisingScheduler  # noqa: E402


def parameters(function):
    return list(inspect.signature(function).parameters)


def source(thing):
    return inspect.getsource(thing)


OVERRIDDEN = (
    "schedule",
    "update_from_output",
    "update_draft_token_ids",
    "add_request",
    "_reserve_prefill_lookahead",
    "_update_after_schedule",
)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_scheduler_methods_have_the_parameters_that_we_override(name):
    """What they do is tested on a live scheduler: test_vllm_scheduler.py."""
    assert parameters(getattr(Scheduler, name)) == parameters(getattr(DenoisingScheduler, name))


def test_request_states_hold_the_canvas():
    text = source(RequestState.__init__)
    assert "self.draft_tokens = torch.zeros(" in text


@pytest.mark.parametrize(
    "name",
    [
        "add_request",
        "get_additional_cg_support",
        "custom_sampler",
        "preprocess_state",
        "prepare_inputs",
        "prepare_dummy_inputs",
        "prepare_inputs_embeds",
        "prepare_attn",
    ],
)
def test_model_state_hooks_have_the_parameters_that_we_override(name):
    theirs, ours = parameters(getattr(ModelState, name)), parameters(getattr(DenoisingModelState, name))
    assert ours == theirs


def test_real_batches_are_announced_before_attention_is_prepared():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    text = source(GPUModelRunner.execute_model)
    assert text.index("self.model_state.preprocess_state(") < text.index("self.model_state.prepare_attn(")
    assert text.index("self.model_state.prepare_attn(") < text.index("self.model_state.prepare_inputs(")


def test_logits_are_computed_for_canvas_rows_and_handed_to_our_sampler():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    text = source(GPUModelRunner.sample)
    assert "hidden_states[input_batch.logits_indices]" in text
    assert "self.sampler(logits, input_batch)" in text
    assert parameters(SamplerOutput)[:5] == [
        "sampled_token_ids",
        "logprobs_tensors",
        "num_nans",
        "num_sampled",
        "num_rejected",
    ]


def test_every_request_passes_the_function_that_we_wrap():
    first = ["self", "request_id", "prompt", "params", "supported_tasks"]
    assert parameters(InputProcessor.process_inputs)[:5] == first
    text = source(inspect.unwrap(InputProcessor.process_inputs))
    assert "sampling_params = params.clone()" in text


def test_configuration_that_the_hook_sets_exists():
    fields = VllmConfig.__dataclass_fields__
    assert {"diffusion_config", "attention_config", "scheduler_config", "kernel_config"} <= fields.keys()
    names = SchedulerConfig.__dataclass_fields__
    assert {"scheduler_cls", "async_scheduling", "enable_chunked_prefill", "max_num_batched_tokens"} <= names.keys()


@pytest.mark.skipif(not is_cpu_build(), reason="a GPU's memory is vLLM's to share out")
def test_the_cache_on_a_cpu_holds_the_requests_and_no_more_unless_a_size_is_given():
    arguments = {"model": str(EMBEDDED_MODEL), "dtype": "float32", "enforce_eager": True, "max_num_seqs": 3}
    cache = EngineArgs(**arguments).create_engine_config().cache_config
    # Keys and values of 6 blocks of width 192, in float32, for 256 tokens and two blocks of the cache.
    assert cache.kv_cache_memory_bytes == 3 * (2 * 6 * 192 * 4) * (256 + 2 * 128)
    cache = EngineArgs(**arguments, kv_cache_memory_bytes=2**26).create_engine_config().cache_config
    assert cache.kv_cache_memory_bytes == 2**26

"""The final configuration that a GPU would start with: graphs, memory and what is overridden. Nothing runs."""

import json
import logging

import pytest
from nemotron_labs_checkpoints import write_nemotron_labs
from vllm_engine import prepare_vllm
from vllm_gpu_platform import simulated_gpu

prepare_vllm()

from sinkprune_plugin.vllm.memory_defaults import bitmask_bytes  # noqa: E402

# The published configurations, as far as they matter here.
LLADA = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "activation_type": "silu", "alibi": False,
    "block_type": "llama", "d_model": 4096, "embedding_size": 126464, "include_bias": False, "include_qkv_bias": False,
    "layer_norm_type": "rms", "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288,
    "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "rms_norm_eps": 1e-5, "rope": True, "rope_theta": 500000.0,
    "torch_dtype": "bfloat16", "vocab_size": 126464, "weight_tying": False,
}  # fmt: skip
DREAM = {
    "architectures": ["DreamModel"], "model_type": "Dream", "hidden_act": "silu", "hidden_size": 3584,
    "intermediate_size": 18944, "mask_token_id": 151666, "max_position_embeddings": 131072, "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16", "vocab_size": 152064,
}  # fmt: skip
PUBLISHED = {"llada": LLADA, "dream": DREAM}
# LLaDA2.0-mini's keys.
LLADA2 = {
    "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "first_k_dense_replace": 1, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5120, "max_position_embeddings": 32768,
    "moe_intermediate_size": 512, "n_group": 8, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 256,
    "num_experts_per_tok": 8, "num_hidden_layers": 20, "num_key_value_heads": 4, "num_shared_experts": 1,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 600000,
    "routed_scaling_factor": 2.5, "score_function": "sigmoid", "sliding_window": 4096, "topk_group": 4,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 157184,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for name, config in {**PUBLISHED, "llada2": LLADA2}.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _on_a_gpu(folders):
    with simulated_gpu(), pytest.MonkeyPatch.context() as patch:
        # As in a user's shell.
        patch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
        from vllm.engine.arg_utils import EngineArgs

        # The first one configures vLLM's loggers anew.
        EngineArgs(model=str(folders / "llada"), skip_tokenizer_init=True).create_engine_config()
        yield


@pytest.fixture
def make(folders):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    def make(name="llada", context="LLM_CLASS", **options):
        arguments = EngineArgs(model=str(folders / name), skip_tokenizer_init=True, **options)
        return arguments.create_engine_config(UsageContext[context])

    return make


@pytest.fixture
def log():
    """Messages of the adapter; vLLM's loggers don't pass theirs on."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("vllm.sinkprune")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("context", ["LLM_CLASS", "OPENAI_API_SERVER"])
def test_defaults(name, context, make, log):
    config = make(name, context)
    scheduler, canvas = config.scheduler_config, config.diffusion_config.canvas_length
    # What the runner allocates, by the same product: vllm/v1/worker/gpu/model_runner.py, StructuredOutputsWorker.
    rows = scheduler.max_num_seqs * config.num_speculative_tokens
    assert config.num_speculative_tokens == canvas
    size = rows * -(-config.model_config.get_vocab_size() // 32) * 4
    assert size == bitmask_bytes(scheduler.max_num_seqs, canvas, config.model_config.get_vocab_size())
    assert size < 2**29
    # At vLLM's own default of 1024 requests on this GPU.
    assert bitmask_bytes(1024, canvas, config.model_config.get_vocab_size()) > 15 * 2**30
    assert scheduler.max_num_seqs >= 24
    assert any(f"{size} bytes instead of" in line for line in log), log
    assert (canvas, config.model_config.max_model_len) == (1023, {"llada": 4096, "dream": 8192}[name])
    assert config.kernel_config.enable_jit_warmup
    # Neither the whole context of Dream nor less than a request.
    assert scheduler.max_num_batched_tokens == (16384 if context == "LLM_CLASS" else 8192)
    assert config.use_v2_model_runner
    assert scheduler.async_scheduling
    assert config.compilation_config.cudagraph_mode.name == "PIECEWISE"
    assert not config.cache_config.enable_prefix_caching
    for words in ("prefix caching is off", "chunked prefill is off", "asynchronous scheduling is for requests"):
        assert any(words in line for line in log), words


def test_registering_again_wraps_nothing_twice():
    from vllm.engine.arg_utils import EngineArgs

    from sinkprune_plugin.vllm.register import register

    made = EngineArgs.create_engine_config
    register()
    assert EngineArgs.create_engine_config is made
    assert not hasattr(made.__wrapped__, "__wrapped__")


def test_given_numbers_are_kept(make, log):
    config = make(max_num_seqs=1024, max_model_len=2048, diffusion_config={"canvas_length": 128})
    assert config.scheduler_config.max_num_seqs == 1024
    assert config.diffusion_config.canvas_length == 128
    assert any(f"reserve {1024 * 128 * 3952 * 4} bytes" in line for line in log), log
    config = make("dream", max_model_len=32768)
    assert config.model_config.max_model_len == 32768
    assert config.scheduler_config.max_num_batched_tokens == 32768


def test_a_short_context_has_a_shorter_canvas_and_still_warms_up(make):
    for length, canvas, warm in ((2048, 511, True), (1024, 255, True), (512, 255, False), (100, 99, False)):
        config = make(max_model_len=length)
        assert config.diffusion_config.canvas_length == canvas
        assert config.kernel_config.enable_jit_warmup is warm


GRAPHS = {
    "default": ({}, "PIECEWISE"),
    "canvas = max_tokens": ({"diffusion_config": {"canvas_length": 64}}, "PIECEWISE"),
    "full": ({"compilation_config": {"cudagraph_mode": "FULL"}}, "PIECEWISE"),
    "full decode": ({"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}, "PIECEWISE"),
    "none": ({"compilation_config": {"cudagraph_mode": "NONE"}}, "NONE"),
    "eager": ({"enforce_eager": True}, "NONE"),
    "-O0": ({"optimization_level": 0}, "NONE"),
    "-O1": ({"optimization_level": 1}, "PIECEWISE"),
    "-O3": ({"optimization_level": 3}, "PIECEWISE"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_are_never_full(name, make):
    options, mode = GRAPHS[name]
    assert make(**options).compilation_config.cudagraph_mode.name == mode


def dispatcher(config, monkeypatch, mode=None):
    """vLLM's dispatcher of CUDA graphs, as the runner makes it after asking model state and attention backend."""
    import torch
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.gpu.attn_utils import AttentionCGSupportInfo

    from sinkprune_plugin.vllm.model_state import DenoisingModelState

    canvas = config.diffusion_config.canvas_length
    # FlashAttention's, which supports everything; its own class needs CUDA's extension.
    support = AttentionCGSupportInfo(AttentionCGSupport.ALWAYS, None)
    support = support.narrow(*DenoisingModelState.get_additional_cg_support(object()))
    if mode is None:
        mode = config.compilation_config.resolve_cudagraph_mode_and_sizes(
            support.min_cg_support, support.min_cg_attn_backend, canvas, use_v2_model_runner=True,
            max_num_reqs=config.scheduler_config.max_num_seqs, piecewise_capture_available=True,
        )  # fmt: skip
    monkeypatch.setattr(
        cudagraph_utils, "get_pp_group", lambda: type("Group", (), {"is_first_rank": True, "is_last_rank": True})
    )
    manager = cudagraph_utils.CudaGraphManager(config, torch.device("cpu"), mode, decode_query_len=canvas)
    manager._graphs_captured = True
    return manager


def dispatched(manager, queries):
    """The mode of a batch of queries that all have left their prompts, by the runner's own reckoning."""
    from vllm.v1.worker.utils import get_uniform_decode_token_count

    total = sum(queries)
    uniform = get_uniform_decode_token_count(len(queries), total, max(queries), True)
    return manager.dispatch(len(queries), total, uniform, 0, max_query_len=max(queries)).cg_mode.name


def test_the_dispatcher_never_finds_a_full_graph(make, monkeypatch):
    from vllm.config.compilation import CUDAGraphMode

    config = make(diffusion_config={"canvas_length": 64}, max_num_seqs=8)
    canvas = config.diffusion_config.canvas_length
    manager = dispatcher(config, monkeypatch)
    batches = {
        "prefix: all that remains of canvas = max_tokens": [canvas] * 4,
        "dual and commit: block = canvas": [canvas] * 8,
        "one request": [canvas],
        "blocks": [32] * 8,
        "mixed": [canvas, 32, 7],
    }
    assert {name: dispatched(manager, queries) for name, queries in batches.items()} == dict.fromkeys(
        batches, "PIECEWISE"
    )
    # What vLLM's default would have done with the first three: an assertion in prepare_attn.
    full = dispatcher(config, monkeypatch, CUDAGraphMode.FULL_AND_PIECEWISE)
    assert [dispatched(full, queries) for queries in batches.values()] == ["FULL"] * 3 + ["PIECEWISE"] * 2


def test_a_mode_set_after_the_hook_is_resolved_by_the_model_state(make, monkeypatch):
    from vllm.config.compilation import CUDAGraphMode

    config = make(diffusion_config={"canvas_length": 64})
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    assert dispatcher(config, monkeypatch).cudagraph_mode == CUDAGraphMode.PIECEWISE


REFUSED = {
    "dual batch overlap": {"enable_dbo": True},
    "custom logits processors": {"logits_processors": ["vllm.v1.sample.logits_processor:LogitsProcessor"]},
    "pipeline parallelism": {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, make, monkeypatch):
    # Several GPUs, as far as the configuration asks.
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "device_count", classmethod(lambda cls: 8))
    with pytest.raises(ValueError, match=f"denoises a canvas and doesn't support {name}"):
        make(**REFUSED[name])


def test_a_scheduler_of_the_users_is_replaced_with_a_word(make, log):
    config = make(scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler")
    assert config.scheduler_config.scheduler_cls == "sinkprune_plugin.vllm.scheduler.DenoisingScheduler"
    assert any(line.startswith("--scheduler-cls vllm.v1.core.sched.scheduler.Scheduler is replaced by") for line in log)


def test_synchronous_scheduling_can_be_chosen(make, log):
    assert make(async_scheduling=False).scheduler_config.async_scheduling is False
    assert not any("asynchronous scheduling" in line for line in log)


def test_a_model_whose_blocks_and_context_differ_in_causality_gets_a_backend_that_can(tmp_path, monkeypatch):
    """FlashAttention 4, vLLM's choice on an H100, takes it request by request; earlier ones and FlashInfer don't."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    write_nemotron_labs(tmp_path, head_dim=32)

    def backend(**options):
        made = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, **options).create_engine_config()
        return made.attention_config.backend

    assert backend() is None
    with pytest.raises(ValueError, match="NemotronLabsDiffusionModel mixes causal and bidirectional attention"):
        backend(attention_backend="FLASHINFER")
    older = classmethod(lambda cls, device_id=0: DeviceCapability(8, 0))
    monkeypatch.setattr(type(current_platform), "get_device_capability", older)
    assert backend().name == "TRITON_ATTN"


def test_defaults_of_a_checkpoint_that_every_request_would_be_refused_for_are_replaced(folders, make, log):
    """vLLM fills them in for clients that send none, so that nobody could leave them out."""
    file = folders / "llada2" / "generation_config.json"
    file.write_text(json.dumps({"max_new_tokens": 2048, "repetition_penalty": 1.1, "temperature": 0.5, "top_k": 20}))
    try:
        config = make("llada2", diffusion_config={"canvas_length": 1000})
        assert config.model_config.get_diff_sampling_param() == {
            **{"max_tokens": 1000, "repetition_penalty": 1.0},
            **{"temperature": 0.5, "top_k": 20},
        }
        assert sum("where generation_config.json has" in line for line in log) == 1
        log.clear()
        file.write_text(json.dumps({"max_new_tokens": 64, "temperature": 0.5}))
        config = make("llada2", diffusion_config={"canvas_length": 1000})
        assert config.model_config.get_diff_sampling_param() == {"max_tokens": 64, "temperature": 0.5}
        assert not any("generation_config.json" in line for line in log)
    finally:
        file.unlink()


@pytest.mark.parametrize(("context", "budget"), [("LLM_CLASS", 16384), ("OPENAI_API_SERVER", 8192)])
def test_a_block_causal_model_keeps_what_others_lose(context, budget, make, log):
    """Chunks, the prefix cache with pages of whole blocks, and the whole length of the model's configuration."""
    config = make("llada2", context)
    scheduler, cache = config.scheduler_config, config.cache_config
    assert (scheduler.enable_chunked_prefill, scheduler.max_num_batched_tokens) == (True, budget)
    assert (cache.enable_prefix_caching, cache.block_size) == (True, 32)
    assert (config.model_config.max_model_len, cache.sliding_window) == (32768, None)
    assert config.attention_config.backend.name == "FLASH_ATTN"
    assert any(line.startswith("block_size 32: a page of the prefix cache holds whole blocks of 32") for line in log)


def test_pages_that_end_within_a_block_switch_the_prefix_cache_off(make, log):
    assert not make("llada2", block_size=16).cache_config.enable_prefix_caching
    assert any("a page of 16 positions doesn't hold whole blocks of 32" in line for line in log), log
    log.clear()
    kept = make("llada2", block_size=64).cache_config
    assert (kept.enable_prefix_caching, kept.block_size) == (True, 64)
    assert not make("llada2", enable_prefix_caching=False).cache_config.enable_prefix_caching
    assert not any("prefix" in line for line in log), log


def test_a_budget_of_a_block_causal_model_is_raised_to_what_is_not_split(make, log):
    canvas = {"canvas_length": 64}
    given = {"max_num_batched_tokens": 48, "max_num_seqs": 4, "diffusion_config": canvas}
    assert make("llada2", **given).scheduler_config.max_num_batched_tokens == 65
    assert any("raised from 48 to 65, one more than canvas_length, or a block of 32" in line for line in log), log
    given["max_num_batched_tokens"] = 100
    assert make("llada2", **given).scheduler_config.max_num_batched_tokens == 100


@pytest.mark.parametrize(
    ("options", "backend"),
    [({"dtype": "float32"}, "TRITON_ATTN"), ({"attention_backend": "TRITON_ATTN"}, "TRITON_ATTN")],
)
def test_backends_with_room_for_the_blocks_of_a_prompt(options, backend, make):
    assert make("llada2", **options).attention_config.backend.name == backend


@pytest.mark.parametrize("backend", ["FLASHINFER", "FLEX_ATTENTION"])
def test_backends_without_room_for_the_blocks_of_a_prompt(backend, make):
    with pytest.raises(ValueError, match=f"reads the blocks of a prompt as .* more than {backend} has room for; use"):
        make("llada2", attention_backend=backend)

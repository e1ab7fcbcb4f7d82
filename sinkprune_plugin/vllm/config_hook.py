"""vLLM's configuration for a model that denoises, set before the engine is built."""

import functools
from contextvars import ContextVar
from typing import Any

import torch

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.models.catalogue import ARCHITECTURES
from sinkprune_plugin.vllm.block_causal import block_of, set_pages
from sinkprune_plugin.vllm.checked_config import check_config
from sinkprune_plugin.vllm.memory_defaults import (
    LONGEST_CANVAS,
    LONGEST_CONTEXT,
    bitmask_bytes,
    default_canvas,
    default_requests,
    warms_up,
)

__all__ = ["DEFAULT_CANVAS", "SCHEDULER", "register_config_hooks"]

# How vLLM recognises diffusion models: on the class of their configuration. What is served is decided in the hook.
DEFAULT_CANVAS = LONGEST_CANVAS
SCHEDULER = "sinkprune_plugin.vllm.scheduler.DenoisingScheduler"

# Whether --max-num-seqs was given: vLLM has filled in its default by the time it calls the hook. None outside of
# EngineArgs.create_engine_config.
_requests_given: ContextVar[bool | None] = ContextVar("requests_given", default=None)


def register_config_hooks() -> None:
    """Make vLLM configure our models, and validate their requests in the front end. Idempotent."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from sinkprune_plugin.vllm.request_validation import install_validation

    class DenoisingConfigHook(VerifyAndUpdateConfig):
        """An entry of vLLM's map from architectures to hooks."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            limit_context(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            configure(vllm_config)

    for architecture in ARCHITECTURES:
        MODELS_CONFIG_MAP.setdefault(architecture, DenoisingConfigHook)
    _watch_arguments()
    install_validation()


def _watch_arguments() -> None:
    """Wrap ``EngineArgs.create_engine_config`` to see which arguments were given. Idempotent."""
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_engine_config
    if getattr(original, "_sinkprune", False):
        return

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _requests_given.set(self.max_num_seqs is not None)
        try:
            return original(self, *args, **kwargs)
        finally:
            _requests_given.reset(token)

    create_engine_config._sinkprune = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def limit_context(model_config: Any) -> None:
    """Limit the default length of prompt and answer together: a step runs all of it, so it sizes every batch.

    :param model_config: vLLM's ``ModelConfig``, changed in place unless it names a length or a prompt can be split
    """
    if block_of(resolve_diffusion(model_config.hf_config)) is not None:
        return
    if model_config.original_max_model_len in (None, -1) and model_config.max_model_len > LONGEST_CONTEXT:
        _logger().info(
            "max_model_len %d, where the model's configuration has %d: a denoising step runs prompt and answer at "
            "once; --max-model-len sets another",
            LONGEST_CONTEXT,
            model_config.max_model_len,
        )
        model_config.max_model_len = LONGEST_CONTEXT


def configure(vllm_config: Any) -> None:
    """Adapt a configuration to denoising. What it changes is logged.

    :param vllm_config: vLLM's configuration, changed in place
    :raises ValueError: for options that a denoising model doesn't support
    """
    from vllm.platforms import current_platform

    from sinkprune_plugin.vllm.cpu import set_cache

    _refuse(vllm_config)
    canvas = _set_canvas(vllm_config)
    _set_requests(vllm_config, canvas)
    _set_request_defaults(vllm_config.model_config, canvas)
    _set_scheduler(vllm_config)
    _set_prompts(vllm_config, canvas)
    if current_platform.is_cpu():
        set_cache(vllm_config)
    vllm_config.attention_config.use_non_causal = True
    # From config.json, where use_sliding_window turns it off or nothing reads it; our configurations refuse any other.
    vllm_config.cache_config.sliding_window = None
    _set_attention(vllm_config)
    _set_graphs(vllm_config)
    if not warms_up(canvas, vllm_config.model_config.max_model_len):
        _logger().info(
            "kernels aren't warmed up: that takes four canvases of %d, more than max_model_len %d; the first requests "
            "are slower",
            canvas,
            vllm_config.model_config.max_model_len,
        )
        vllm_config.kernel_config.enable_jit_warmup = False


def _logger() -> Any:
    from vllm.logger import init_logger

    # A logger below vLLM's own, which is the only one that is configured in its processes.
    return init_logger("vllm.sinkprune")


def _refuse(vllm_config: Any) -> None:
    name = vllm_config.model_config.architecture
    parallel = vllm_config.parallel_config
    refused = {
        "pipeline parallelism (pipeline_parallel_size > 1); use tensor_parallel_size": parallel.pipeline_parallel_size
        > 1,
        "context parallelism; use tensor_parallel_size": getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        # It splits a batch into two, each with a part of the plan of the step.
        "dual batch overlap; leave --enable-dbo and --ubatch-size out": parallel.use_ubatching,
        "speculative decoding; leave speculative_config out": vllm_config.speculative_config is not None,
        "LoRA; merge the adapter into the weights": vllm_config.lora_config is not None,
        "KV transfer; leave kv_transfer_config out": vllm_config.kv_transfer_config is not None,
        # The sampler proposes tokens by itself, so they would be ignored.
        "custom logits processors; leave --logits-processors out": bool(vllm_config.model_config.logits_processors),
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(f"{name} denoises a canvas and doesn't support {what}")
    if parallel.tensor_parallel_size > 1:
        # The modules check it as well, but in other processes, whose errors reach the user as tracebacks.
        check_config(vllm_config)


def _set_canvas(vllm_config: Any) -> int:
    from vllm.config.diffusion import DiffusionConfig

    longest = vllm_config.model_config.max_model_len - 1
    if vllm_config.diffusion_config is None:
        canvas = default_canvas(longest + 1)
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=canvas)
        _logger().info(
            "canvas_length %d for max_model_len %d: the longest answer served; --diffusion-config sets another",
            canvas,
            longest + 1,
        )
    canvas = int(vllm_config.diffusion_config.canvas_length)
    if canvas > longest:
        raise ValueError(
            f"canvas_length {canvas} leaves no room for a prompt within max_model_len {longest + 1}; set at most "
            f"{longest} in --diffusion-config"
        )
    return canvas


def _set_requests(vllm_config: Any, canvas: int) -> None:
    """Cap the number of requests if none was given, by what vLLM allocates for each."""
    scheduler, vocabulary = vllm_config.scheduler_config, vllm_config.model_config.get_vocab_size()
    given = _requests_given.get()
    if given is None:
        # A configuration that wasn't made from EngineArgs: as vLLM judges for DiffusionGemma.
        given = scheduler.max_num_seqs < scheduler.DEFAULT_MAX_NUM_SEQS
    default = default_requests(canvas, vocabulary)
    before, size = scheduler.max_num_seqs, bitmask_bytes(scheduler.max_num_seqs, canvas, vocabulary)
    if not given and before > default:
        scheduler.max_num_seqs = default
        if scheduler.max_num_active_seqs is not None:
            scheduler.max_num_active_seqs = min(scheduler.max_num_active_seqs, default)
        _logger().info(
            "max_num_seqs %d in place of vLLM's default %d: vLLM reserves memory for structured outputs, %d bytes "
            "instead of %d at a canvas of %d; --max-num-seqs sets another",
            default,
            before,
            bitmask_bytes(default, canvas, vocabulary),
            size,
            canvas,
        )
    elif size > 2**30:
        _logger().warning(
            "max_num_seqs %d at a canvas of %d makes vLLM reserve %d bytes for structured outputs, which a denoising "
            "model doesn't use; lower --max-num-seqs or canvas_length",
            before,
            canvas,
            size,
        )


def _set_request_defaults(model_config: Any, canvas: int) -> None:
    """Keep vLLM from filling in, from ``generation_config.json``, what would get a client's request refused."""
    from sinkprune_plugin.vllm.request_validation import REFUSED

    given = model_config.get_diff_sampling_param()
    kept = {name: REFUSED[name] for name, value in given.items() if name in REFUSED and value != REFUSED[name]}
    if given.get("max_tokens", 0) > canvas:
        # What transformers calls it, and vLLM reads.
        kept["max_new_tokens"] = canvas
    if kept:
        named = {name: given["max_tokens" if name == "max_new_tokens" else name] for name in kept}
        _logger().info(
            "defaults of requests %s, where generation_config.json has %s: no request can have more than the canvas or "
            "those penalties",
            kept,
            named,
        )
        model_config.override_generation_config = {**model_config.override_generation_config, **kept}


def _set_scheduler(vllm_config: Any) -> None:
    logger, scheduler = _logger(), vllm_config.scheduler_config
    if scheduler.scheduler_cls not in (None, SCHEDULER):
        logger.warning("--scheduler-cls %s is replaced by %s", scheduler.scheduler_cls, SCHEDULER)
    scheduler.scheduler_cls = SCHEDULER
    if scheduler.async_scheduling is not False:
        # vLLM switches it off where the platform or the executor can't, after this hook.
        logger.info(
            "asynchronous scheduling is for requests with a fixed number of steps; the others wait for each step's "
            "result; --no-async-scheduling switches it off"
        )


def _set_prompts(vllm_config: Any, canvas: int) -> None:
    """Whether prompts are split and their keys are shared, which a block-causal context alone allows."""
    from vllm.platforms import current_platform

    logger = _logger()
    model, scheduler, cache = vllm_config.model_config, vllm_config.scheduler_config, vllm_config.cache_config
    block = block_of(resolve_diffusion(model.hf_config))
    if block is not None:
        set_pages(cache, block, cpu=current_platform.is_cpu(), log=logger)
        if scheduler.long_prefill_token_threshold:
            logger.info("long_prefill_token_threshold is off: a prompt is split where max_num_batched_tokens end")
        # vLLM's warm-up runs one token more than the canvas at once.
        least = max(block, canvas + 1)
        reason = f"one more than canvas_length, or a block of {block}"
    else:
        if cache.enable_prefix_caching:
            logger.info("prefix caching is off: the keys and values of a prompt depend on its answer's canvas")
        cache.enable_prefix_caching = False
        if scheduler.enable_chunked_prefill or scheduler.long_prefill_token_threshold:
            # A part of a bidirectional query would be a different computation, so whole requests wait instead.
            logger.info("chunked prefill is off: a denoising step isn't split")
        scheduler.enable_chunked_prefill = False
        least, reason = model.max_model_len, "max_model_len: a denoising step isn't split"
    scheduler.long_prefill_token_threshold = 0
    for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        budget = getattr(scheduler, name, None)
        if budget is not None and budget < least:
            logger.info("%s raised from %d to %d, %s", name, budget, least, reason)
            setattr(scheduler, name, least)


def _set_attention(vllm_config: Any) -> None:
    """Choose a backend that can do what a context of blocks needs.

    With a causal context, causality request by request. With a block-causal one, more sequences than there are
    requests: FlashInfer and FlexAttention have buffers for ``max_num_seqs``.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    context = resolve_diffusion(vllm_config.model_config.hf_config).context
    if context == "bidirectional":
        return
    attention, backends = vllm_config.attention_config, AttentionBackendEnum
    reasons = {
        "causal": "mixes causal and bidirectional attention in a batch, which {} doesn't",
        "block_causal": "reads the blocks of a prompt as sequences of their own, more than {} has room for",
    }
    if attention.backend == backends.FLASHINFER or (
        context == "block_causal" and attention.backend == backends.FLEX_ATTENTION
    ):
        raise ValueError(
            f"{vllm_config.model_config.architecture} {reasons[context].format(attention.backend.name)}; use "
            "--attention-backend TRITON_ATTN or FLASH_ATTN"
        )
    if context == "block_causal":
        if attention.backend is None and current_platform.is_cuda():
            # vLLM would choose FlashInfer in some cases.
            flash = (
                vllm_config.model_config.dtype != torch.float32
                and vllm_config.cache_config.cache_dtype == "auto"
                and current_platform.has_device_capability(80)
            )
            attention.backend = backends.FLASH_ATTN if flash else backends.TRITON_ATTN
            _logger().info(
                "attention backend %s: the blocks of a prompt are more sequences than FlashInfer has room for; "
                "--attention-backend sets another",
                attention.backend.name,
            )
        return
    if attention.backend is None and current_platform.is_cuda() and not current_platform.has_device_capability(90):
        # vLLM picks FlashAttention 4 from there on; earlier versions have one causality for the whole batch.
        attention.backend = AttentionBackendEnum.TRITON_ATTN
        _logger().info(
            "attention backend TRITON_ATTN: requests of a batch differ in causality; --attention-backend sets another"
        )


def _set_graphs(vllm_config: Any) -> None:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.config.vllm import OptimizationLevel

    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None and vllm_config.optimization_level != OptimizationLevel.O0:
        # vLLM would fill in full graphs after this hook; where it runs eagerly, it sets NONE in any case.
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    elif mode is not None and mode.has_full_cudagraphs():
        # Steps of one request differ in width, and the logits' rows are chosen outside of the model's graph.
        _logger().info(
            "cudagraph_mode %s replaced by PIECEWISE: the steps of a denoising model differ in width", mode.name
        )
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE

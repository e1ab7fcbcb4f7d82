"""vLLM's configuration for a model that denoises, set before the engine is built."""

from typing import Any

from sinkprune_plugin.models.catalogue import ARCHITECTURES

__all__ = ["DEFAULT_CANVAS", "register_config_hooks"]

# Longest generation served unless --diffusion-config says otherwise.
DEFAULT_CANVAS = 1024


def register_config_hooks() -> None:
    """Make vLLM configure our models, and validate their requests in the front end. Idempotent."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from sinkprune_plugin.vllm.request_validation import install_validation

    class DenoisingConfigHook(VerifyAndUpdateConfig):
        """An entry of vLLM's map from architectures to hooks."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            configure(vllm_config)

    for architecture in ARCHITECTURES:
        MODELS_CONFIG_MAP.setdefault(architecture, DenoisingConfigHook)
    install_validation()


def configure(vllm_config: Any) -> None:
    """Adapt a configuration to denoising.

    :param vllm_config: vLLM's configuration, changed in place
    :raises ValueError: for options that a denoising model doesn't support
    """
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    from sinkprune_plugin.vllm.cpu import set_cache

    logger = init_logger("vllm.sinkprune")
    _refuse(vllm_config)
    model, scheduler, cache = vllm_config.model_config, vllm_config.scheduler_config, vllm_config.cache_config
    canvas = _set_canvas(vllm_config)
    # The prompt's keys and values depend on the canvas: none can be shared between requests.
    cache.enable_prefix_caching = False
    # Each step depends on whether the last one finished a block.
    scheduler.async_scheduling = False
    scheduler.scheduler_cls = "sinkprune_plugin.vllm.scheduler.DenoisingScheduler"
    # A part of a bidirectional query would be a different computation, so whole requests wait instead.
    scheduler.enable_chunked_prefill = False
    scheduler.long_prefill_token_threshold = 0
    for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        budget = getattr(scheduler, name, None)
        if budget is not None and budget < model.max_model_len:
            logger.info("%s raised from %d to max_model_len %d: a denoising step isn't split", name, budget,
                        model.max_model_len)  # fmt: skip
            setattr(scheduler, name, model.max_model_len)
    if current_platform.is_cpu():
        set_cache(vllm_config)
    vllm_config.attention_config.use_non_causal = True
    _set_graphs(vllm_config, canvas, logger)


def _refuse(vllm_config: Any) -> None:
    name = vllm_config.model_config.architecture
    parallel = vllm_config.parallel_config
    refused = {
        "pipeline parallelism (pipeline_parallel_size > 1); use tensor_parallel_size": parallel.pipeline_parallel_size
        > 1,
        "context parallelism; use tensor_parallel_size": getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "speculative decoding; leave speculative_config out": vllm_config.speculative_config is not None,
        "LoRA; merge the adapter into the weights": vllm_config.lora_config is not None,
        "KV transfer; leave kv_transfer_config out": vllm_config.kv_transfer_config is not None,
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(f"{name} denoises a canvas and doesn't support {what}")


def _set_canvas(vllm_config: Any) -> int:
    from vllm.config.diffusion import DiffusionConfig

    longest = vllm_config.model_config.max_model_len - 1
    if vllm_config.diffusion_config is None:
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=min(DEFAULT_CANVAS, longest))
    canvas = int(vllm_config.diffusion_config.canvas_length)
    if canvas > longest:
        raise ValueError(
            f"canvas_length {canvas} leaves no room for a prompt within max_model_len {longest + 1}; set at most "
            f"{longest} in --diffusion-config"
        )
    return canvas


def _set_graphs(vllm_config: Any, canvas: int, logger: Any) -> None:
    from vllm.config.compilation import CUDAGraphMode

    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is not None and mode.has_full_cudagraphs():
        # Steps of one request differ in width, and the logits' rows are chosen outside of the model's graph.
        logger.info(
            "cudagraph_mode %s replaced by PIECEWISE: the steps of a denoising model differ in width", mode.name
        )
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    if 4 * canvas + 4 > vllm_config.model_config.max_model_len:
        # vLLM warms its kernels up with requests of about four canvases, which would lie beyond the last position.
        vllm_config.kernel_config.enable_jit_warmup = False

"""Checks of a request where it enters, so that a wrong option gives one clear line (HTTP 400) and never ends the
engine.

vLLM has a hook that sees sampling parameters, but none that also sees prompt and configuration, so this wraps
``InputProcessor.process_inputs``, which all entry points share and which runs before anything reaches the engine.
"""

import functools
from typing import Any

from sinkprune_plugin.diffusion import DiffusionSpec, resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.catalogue import ARCHITECTURES
from sinkprune_plugin.sampling.options import SamplingOptions, parse_options
from sinkprune_plugin.vllm.block_causal import block_of, cache_salt
from sinkprune_plugin.vllm.request_plan import attach_plan

__all__ = ["check_request", "install_validation"]

# Sampling parameters without a meaning here, with the value that turns them off.
REFUSED = {
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "min_tokens": 0,
    "logit_bias": None,
    "bad_words": None,
    "allowed_token_ids": None,
    "structured_outputs": None,
    "logprobs": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "prompt_logprob_token_ids": None,
    "thinking_token_budget": None,
    "trace_decode_token_ids": None,
}


def install_validation() -> None:
    """Wrap ``InputProcessor.process_inputs``. Idempotent."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if getattr(original, "_sinkprune", False):
        return

    @functools.wraps(original)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, supported_tasks: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self.model_config.architecture not in ARCHITECTURES:
            return original(self, request_id, prompt, params, supported_tasks, *args, **kwargs)
        plain, asked = _split(params, kwargs)
        request = original(self, request_id, prompt, plain, supported_tasks, *args, **kwargs)
        _resolve(self, request, asked)
        return request

    process_inputs._sinkprune = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs  # type: ignore[method-assign]


def _split(params: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Parameters that vLLM accepts for a diffusion model, and the requested options."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    if not isinstance(params, SamplingParams):
        raise VLLMValidationError("a denoising model generates; it doesn't pool")
    if kwargs.get("resumable"):
        raise VLLMValidationError("a denoising model needs its whole prompt at once; streaming input isn't supported")
    try:
        asked = check_request(params)
    except UsageError as error:
        raise VLLMValidationError(str(error)) from error
    plain = params.clone()
    # We interpret these; vLLM refuses them for diffusion models.
    plain.temperature, plain.seed, plain.extra_args = 1.0, None, None
    return plain, asked


def _resolve(processor: Any, request: Any, asked: dict[str, Any]) -> None:
    from vllm.exceptions import VLLMValidationError

    params = request.sampling_params
    if request.prompt_token_ids is None:
        raise VLLMValidationError("prompt embeddings aren't supported by a denoising model; send text or token ids")
    spec = resolve_diffusion(processor.model_config.hf_config)
    mask = spec.mask_token_id
    if mask in request.prompt_token_ids:
        raise VLLMValidationError(
            f"the prompt holds the mask token {mask} at position {request.prompt_token_ids.index(mask)}; leave it out"
        )
    prompt_length = len(request.prompt_token_ids)
    canvas = processor.vllm_config.diffusion_config.canvas_length
    # A client that gives no length gets from vLLM all that fits (over HTTP as if it had asked for that); here the
    # served canvas is what fits.
    if params.max_tokens >= processor.model_config.max_model_len - prompt_length:
        params.max_tokens = min(params.max_tokens, canvas)
    try:
        longest = processor.model_config.max_model_len
        options = resolve_options(asked, params.max_tokens, prompt_length, canvas, longest, spec)
    except UsageError as error:
        raise VLLMValidationError(str(error)) from error
    attach_plan(params, options)
    _keep_apart(request, options, processor.vllm_config.cache_config, spec)
    # Nothing is left to denoise after the generation, so a request must not wait for more tokens.
    params.max_tokens = min(params.max_tokens, options.gen_length)
    # Each of n samples is given its own seed by vLLM, counted from this one.
    params.seed = options.seed


def _keep_apart(request: Any, options: SamplingOptions, cache: Any, spec: DiffusionSpec) -> None:
    """See to it that the prefix cache gives a request keys of blocks like its own only."""
    request.cache_salt = cache_salt(request.cache_salt, options.block_length, block_of(spec))
    if options.on_grid and cache.block_size % options.block_length:
        request.sampling_params.skip_reading_prefix_cache = True


def check_request(params: Any) -> dict[str, Any]:
    """Check what can be checked without the prompt.

    :param params: ``SamplingParams`` as the client sent them
    :return: the options asked for, by their ``dlm_`` names, and the standard parameters used in their place
    :raises UsageError: naming the parameter, its value and the remedy
    """
    for name, off in REFUSED.items():
        value = getattr(params, name, off)
        if value != off and value not in (None, [], {}):
            raise UsageError(f"{name} {value!r} isn't supported by a denoising model; leave it out")
    asked = dict(params.extra_args or {})
    if params.temperature != 1.0:
        if "dlm_temperature" in asked:
            raise UsageError("temperature and dlm_temperature are both given; leave one out")
        asked["dlm_temperature"] = params.temperature
    if params.seed is not None:
        if "dlm_seed" in asked:
            raise UsageError("seed and dlm_seed are both given; leave one out")
        asked["dlm_seed"] = params.seed
    # SamplingParams turns both off where the temperature is 0.
    asked["top_k"], asked["top_p"] = max(params.top_k, 0), params.top_p
    return asked


def resolve_options(
    asked: dict[str, Any],
    max_tokens: int,
    prompt_length: int,
    canvas: int,
    max_model_len: int,
    spec: DiffusionSpec | None = None,
) -> SamplingOptions:
    """Resolve and check the options of a request.

    :param asked: from :func:`check_request`
    :param max_tokens: tokens wanted
    :param prompt_length: tokens of the prompt
    :param canvas: longest generation served
    :param max_model_len: longest prompt and generation together
    :param spec: the model's diffusion spec, for what its family says
    :return: the options
    :raises UsageError: naming the option, its value and the remedy
    """
    extra = {name: value for name, value in asked.items() if name not in ("top_k", "top_p")}
    options = parse_options(extra, max_tokens=max_tokens, top_k=asked["top_k"], top_p=asked["top_p"], spec=spec)
    if options.cfg_scale:
        raise UsageError(
            f"dlm_cfg_scale {options.cfg_scale} isn't served: guidance needs a second forward pass; use "
            "sinkprune_plugin.sampling.denoise, or leave it out"
        )
    what = "dlm_gen_length" if "dlm_gen_length" in asked else "max_tokens"
    if options.gen_length > canvas:
        raise UsageError(
            f"{what} {options.gen_length} is longer than the served canvas of {canvas}; ask for fewer tokens or start "
            f"the server with --diffusion-config '{{\"canvas_length\": {options.gen_length}}}'"
        )
    if prompt_length + options.gen_length > max_model_len:
        raise UsageError(
            f"{what} {options.gen_length} after a prompt of {prompt_length} tokens is longer than max_model_len "
            f"{max_model_len}; ask for at most {max_model_len - prompt_length}"
        )
    return options if spec is None else options.after_prompt(prompt_length, spec)

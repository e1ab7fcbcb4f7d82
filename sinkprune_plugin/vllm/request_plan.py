"""The options of one request as they travel from the front end to scheduler and worker."""

from dataclasses import asdict
from typing import Any

from sinkprune_plugin.sampling.options import SamplingOptions

__all__ = ["PLAN_KEY", "attach_plan", "has_plan", "plan_of", "stops_of"]

# Key of the resolved options in ``SamplingParams.extra_args``. Not one of the ``dlm_`` options: a client can't send it,
# the front end refuses keys it doesn't know.
PLAN_KEY = "sinkprune_plan"
# A request that never passed the front end, such as vLLM's warm-up requests, gets blocks of this many tokens.
WARMUP_BLOCK = 32


def attach_plan(params: Any, options: SamplingOptions) -> None:
    """Put resolved options into a request, as plain values that survive serialisation.

    :param params: the request's own ``SamplingParams``; its ``extra_args`` are replaced
    :param options: validated options
    """
    params.extra_args = {PLAN_KEY: asdict(options)}


def has_plan(params: Any) -> bool:
    """Whether a request went through the front end; vLLM's warm-up requests don't.

    :param params: its ``SamplingParams``
    """
    return PLAN_KEY in (getattr(params, "extra_args", None) or {})


def plan_of(params: Any, canvas_length: int) -> SamplingOptions:
    """Read the options of a request back.

    :param params: ``SamplingParams`` that went through :func:`attach_plan`, or those of a warm-up request
    :param canvas_length: longest generation served, which warm-up requests are planned with
    :return: the options; ``seed`` is that of the request, since each sample of one prompt has its own
    """
    stored = (getattr(params, "extra_args", None) or {}).get(PLAN_KEY)
    if stored is None:
        return SamplingOptions.resolve(gen_length=canvas_length, block_length=min(WARMUP_BLOCK, canvas_length))
    if params.seed is not None:
        stored = {**stored, "seed": params.seed}
    return SamplingOptions(**stored)


def stops_of(params: Any) -> tuple[int, ...]:
    """The tokens at which vLLM ends a request's text.

    :param params: its ``SamplingParams``; ``ignore_eos`` has left the end-of-sequence token out already
    :return: token ids
    """
    eos = params.eos_token_id
    return tuple(sorted({*(params.stop_token_ids or ()), *(() if eos is None else (eos,))}))

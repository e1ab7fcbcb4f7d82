"""A vLLM engine in the caller's process: token ids in, token ids out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from sinkprune_plugin.errors import UsageError, reason_of
from sinkprune_plugin.vllm.cpu import prepare

__all__ = ["OfflineEngine"]


class OfflineEngine:
    """vLLM's ``LLM`` on one checkpoint.

    :param model: directory or hub name
    :param max_requests: most requests at once
    :param max_model_len: longest prompt and answer together
    :param canvas_length: longest answer
    :param dtype: precision to run in; vLLM on its own runs float32 checkpoints in 16 bits
    :param options: further arguments of ``LLM``
    :raises UsageError: if vLLM isn't installed or can't serve the model here
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_requests: int,
        max_model_len: int,
        canvas_length: int,
        dtype: torch.dtype,
        **options: Any,
    ) -> None:
        prepare()
        from vllm import LLM

        # Compiled graphs pay off on a GPU; on a CPU they only make the start slower.
        options.setdefault("enforce_eager", not torch.cuda.is_available())
        try:
            self._engine = LLM(
                model=str(model),
                dtype=cast("Any", str(dtype).removeprefix("torch.")),
                max_num_seqs=max_requests,
                max_model_len=max_model_len,
                diffusion_config={"canvas_length": canvas_length},
                disable_log_stats=True,
                **options,
            )
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"vLLM can't serve {model} here: {reason_of(error)}; use the transformers backend"
            ) from error

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        gen_length: int,
        options: Mapping[str, Any],
        *,
        ignore_eos: bool = True,
        progress: bool = False,
    ) -> list[list[int]]:
        """Generate for all prompts at once.

        :param prompts: token ids
        :param gen_length: tokens of each answer
        :param options: ``dlm_`` options
        :param ignore_eos: continue after an end-of-sequence token
        :param progress: show vLLM's progress bar
        :return: the answers' token ids
        """
        from vllm import SamplingParams

        settings = SamplingParams(
            max_tokens=gen_length, ignore_eos=ignore_eos, detokenize=False, extra_args=dict(options)
        )
        requests: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._engine.generate(requests, settings, use_tqdm=progress)
        return [list(output.outputs[0].token_ids) for output in outputs]

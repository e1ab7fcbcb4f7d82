"""Answers in text, denoised by transformers or by vLLM."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from sinkprune_plugin.diffusion import DiffusionSpec
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.lm_eval.generation_requests import AnswerRequest, cut_text, cut_tokens
from sinkprune_plugin.lm_eval.model_arguments import ModelArguments, sampling_options
from sinkprune_plugin.sampling import denoise

__all__ = ["AnswerWriter"]


class AnswerWriter:
    """Writes answers to prompts.

    :param arguments: of the model class
    :param config: the model's configuration
    :param tokenizer: the model's tokenizer
    :param spec: family and mask token
    :param max_length: longest prompt and answer together
    :param model: gives the transformers model; not called where vLLM writes
    """

    def __init__(
        self,
        arguments: ModelArguments,
        config: Any,
        tokenizer: Any,
        spec: DiffusionSpec,
        max_length: int,
        model: Callable[[], Any],
    ) -> None:
        self._arguments, self._config, self._tokenizer = arguments, config, tokenizer
        self._spec, self._max_length, self._model = spec, max_length, model

    def check(self, wanted: AnswerRequest) -> None:
        """Refuse answers that can't be written.

        :param wanted: the answer's length and how it is sampled
        :raises UsageError: naming the option
        """
        sampling_options(
            self._spec,
            gen_length=wanted.length,
            block_length=self._block(wanted),
            steps=self._arguments.steps,
            cache=self._arguments.cache,
            temperature=wanted.temperature,
            cfg_scale=self._arguments.cfg,
            top_k=wanted.top_k,
            top_p=wanted.top_p,
        )
        if self._arguments.backend == "vllm" and (wanted.top_k or wanted.top_p != 1):
            raise UsageError(
                f"top_k {wanted.top_k} and top_p {wanted.top_p:g} aren't passed on to vLLM; use backend=transformers"
            )

    def batches(self, members: Sequence[int], prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Split prompts into batches, the longest first.

        :param members: numbers of the prompts
        :param prompts: all prompts
        :return: numbers
        """
        # Prompts of one length share forward passes. vLLM makes its own batches.
        ordered = sorted(members, key=lambda number: -len(prompts[number]))
        size = len(ordered) if self._arguments.backend == "vllm" else self._arguments.batch_size
        for first in range(0, len(ordered), size):
            yield ordered[first : first + size]

    def write(self, prompts: Sequence[Sequence[int]], wanted: AnswerRequest, seed: int) -> list[str]:
        """Answer prompts.

        :param prompts: token ids
        :param wanted: the answers' length, ends, and how they are sampled
        :param seed: of the noise
        :return: texts, cut before the end-of-sequence token and the first stop string
        """
        special = self._tokenizer.added_tokens_encoder
        # A stop string that is one special token would be missing from the decoded text.
        stops = self._ends | {special[text] for text in wanted.until if text in special}
        if self._arguments.backend == "vllm":
            written = self._with_vllm(prompts, wanted, seed)
        else:
            written = self._with_transformers(prompts, wanted, seed, stops)
        return [
            cut_text(self._tokenizer.decode(cut_tokens(tokens, stops), skip_special_tokens=True), wanted.until)
            for tokens in written
        ]

    @cached_property
    def _ends(self) -> set[int]:
        named = getattr(self._config, "eos_token_id", None)
        ends = {self._tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
        return {token for token in ends if token is not None}

    def _block(self, wanted: AnswerRequest) -> int | None:
        block = self._arguments.block_length
        return None if block is None else min(block, wanted.length)

    def _with_transformers(
        self, prompts: Sequence[Sequence[int]], wanted: AnswerRequest, seed: int, stops: set[int]
    ) -> list[list[int]]:
        written = denoise(
            self._model(),
            [torch.tensor(prompt) for prompt in prompts],
            gen_length=wanted.length,
            block_length=self._block(wanted),
            steps=self._arguments.steps,
            cache=self._arguments.cache,
            temperature=wanted.temperature,
            cfg_scale=self._arguments.cfg,
            seed=seed,
            top_k=wanted.top_k,
            top_p=wanted.top_p,
            spec=self._spec,
            eos_token_ids=stops,
        )
        return [tokens.tolist() for tokens in written.sequences]

    def _with_vllm(self, prompts: Sequence[Sequence[int]], wanted: AnswerRequest, seed: int) -> list[list[int]]:
        options: dict[str, Any] = {
            "dlm_block_length": self._block(wanted),
            "dlm_cache": self._arguments.cache,
            "dlm_steps": self._arguments.steps,
            "dlm_seed": seed,
            "dlm_temperature": wanted.temperature,
        }
        options = {name: value for name, value in options.items() if value is not None}
        answers: list[list[int]] = self._engine.generate(prompts, wanted.length, options, ignore_eos=False)
        return answers

    @cached_property
    def _engine(self) -> Any:
        from sinkprune_plugin.vllm.offline import OfflineEngine

        wanted = self._arguments.dtype
        dtype = getattr(self._config, "dtype", None) if wanted == "auto" else getattr(torch, wanted)
        return OfflineEngine(
            self._arguments.pretrained,
            max_requests=self._arguments.batch_size,
            max_model_len=self._max_length,
            canvas_length=self._max_length - 1,
            # A configuration may not name one.
            dtype=self._model().dtype if dtype is None else dtype,
        )

"""The model class that lm-evaluation-harness knows as ``sinkprune``."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from sinkprune_plugin.devices import choose_device
from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.lm_eval.answer_writer import AnswerWriter
from sinkprune_plugin.lm_eval.conditional_likelihood import answer_log_likelihoods
from sinkprune_plugin.lm_eval.generation_requests import AnswerRequest
from sinkprune_plugin.lm_eval.model_arguments import ModelArguments
from sinkprune_plugin.loading import default_sequence_length, load_config, load_model, load_tokenizer
from sinkprune_plugin.sampling import denoise
from sinkprune_plugin.sampling.family_options import block_within
from sinkprune_plugin.vllm.cpu import prepare

__all__ = ["SinkpruneLM"]

LONGEST = 4096


class SinkpruneLM(TemplateLM):
    """A diffusion LM, dense or sparse, for lm-evaluation-harness.

    :param pretrained: checkpoint directory or hub name
    :param arguments: see :class:`~sinkprune_plugin.lm_eval.model_arguments.ModelArguments`
    :raises UsageError: on wrong arguments, or if tokenizer or configuration can't be loaded
    """

    def __init__(self, pretrained: str | None = None, **arguments: Any) -> None:
        super().__init__()
        self.arguments = ModelArguments.read({"pretrained": pretrained, **arguments})
        if self.arguments.backend == "vllm":
            prepare()
        self.tokenizer: Any = load_tokenizer(self.arguments.pretrained)
        self.config: Any = load_config(self.arguments.pretrained)
        self.spec = resolve_diffusion(self.config, self.tokenizer)
        self._length = self._longest()
        # A family that never masks a sequence's last token was trained with a visible one there.
        self._ending = [self.eot_token_id] if self.spec.keep_last else []

    def _longest(self) -> int:
        wanted = self.arguments.max_length
        if wanted is None:
            return default_sequence_length(self.config, LONGEST)
        try:
            limit = default_sequence_length(self.config, wanted)
        except UsageError:
            # The configuration names no limit, so the user's is the only one.
            return wanted
        if wanted > limit:
            raise UsageError(f"max_length {wanted} is longer than the model's {limit}; use at most {limit}")
        return wanted

    @cached_property
    def model(self) -> Any:
        """The transformers model, loaded when it is needed: not for answers from vLLM."""
        dtype = self.arguments.dtype
        model: Any = load_model(self.arguments.pretrained, dtype if dtype == "auto" else getattr(torch, dtype))
        return model.to(choose_device(self.arguments.device or "auto"))

    @cached_property
    def _writer(self) -> AnswerWriter:
        return AnswerWriter(self.arguments, self.config, self.tokenizer, self.spec, self.max_length, lambda: self.model)

    @property
    def eot_token_id(self) -> int:
        """End-of-sequence token."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UsageError("the tokenizer has no eos_token, which ends a text; set it")
        return int(eos)

    @property
    def prefix_token_id(self) -> int:
        """What replaces an empty context: the beginning-of-sequence token, or else the end-of-sequence token."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Longest context and answer together, in tokens."""
        return self._length

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's cache of requests."""
        return self.arguments.pretrained.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """See ``LM``."""
        if not self.tokenizer.chat_template:
            raise UsageError("the tokenizer has no chat template; leave --apply_chat_template out")
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return cast("str", text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, with BOS before them if that was asked for and the text doesn't begin with it."""
        tokens = cast("list[int]", self.tokenizer.encode(string, add_special_tokens=False))
        wanted = self.arguments.add_bos_token if add_special_tokens is None else add_special_tokens
        bos = self.tokenizer.bos_token_id
        return [bos, *tokens] if wanted and bos is not None and tokens[:1] != [bos] else tokens

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        questions: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (_, context, answer) in enumerate(requests):
            questions.setdefault((tuple(self._fit(context, len(answer))), len(answer)), []).append(number)
        results = [(0.0, False)] * len(requests)
        # The longest first: if memory doesn't suffice, that fails at once.
        order = sorted(questions, key=lambda question: -len(question[0]) - question[1])
        with tqdm(total=len(requests), desc="loglikelihood", disable=_disable(kwargs.get("disable_tqdm"))) as bar:
            for context, length in order:
                numbers = questions[context, length]
                answers = [requests[number][2] for number in numbers]
                for number, score, answer in zip(numbers, self._score(context, answers), answers, strict=True):
                    results[number] = (score, self.arguments.check_greedy and self._is_greedy(context, answer))
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], results[number])
                bar.update(len(numbers))
        return results

    def _fit(self, context: Sequence[int], length: int) -> list[int]:
        room = self.max_length - length - len(self._ending)
        if room < 1:
            raise UsageError(f"an answer of {length} tokens doesn't fit max_length {self.max_length}; raise it")
        return list(context[-room:]) or [self.prefix_token_id]

    def _score(self, context: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
        return answer_log_likelihoods(
            self.model,
            context,
            answers,
            self.spec,
            mc_num=self.arguments.mc_num,
            batch_size=self.arguments.batch_size,
            cfg=self.arguments.cfg,
            seed=self.arguments.seed,
            ending=self._ending,
        )

    def _is_greedy(self, context: Sequence[int], answer: Sequence[int]) -> bool:
        written = denoise(
            self.model,
            torch.tensor(context),
            gen_length=len(answer),
            block_length=block_within(self.spec, len(answer)),
            cfg_scale=self.arguments.cfg,
            spec=self.spec,
        )
        return written.sequences[0].tolist() == list(answer)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in the harness's windows: of the longest length, each token predicted once.

        :param requests: with the text as their only argument
        :param disable_tqdm: no progress bar
        :return: nats
        """
        results = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=_disable(disable_tqdm)):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1 - len(self._ending),
                context_len=1,
            )
            pieces = map(make_disjoint_window, windows)
            total = sum(self._score(context, [piece])[0] for context, piece in pieces)
            results.append(float(total))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Denoise answers and cut them at the stop strings.

        :param requests: with context and ``gen_kwargs``, see :class:`AnswerRequest`
        :param disable_tqdm: no progress bar
        :return: answers
        """
        groups: dict[tuple[AnswerRequest, int], list[int]] = {}
        prompts, seen = [], Counter[str]()
        # All are checked before the first one is answered.
        for number, request in enumerate(requests):
            context, given = request.args
            wanted = AnswerRequest.read(given)
            self._writer.check(wanted)
            prompts.append(self._fit(self.tok_encode(context), wanted.length))
            # A task that repeats a request wants different samples.
            key = f"{context}\0{wanted}"
            groups.setdefault((wanted, self.arguments.seed + seen[key]), []).append(number)
            seen[key] += 1
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=_disable(disable_tqdm)) as bar:
            for (wanted, seed), members in groups.items():
                for numbers in self._writer.batches(members, prompts):
                    texts = self._writer.write([prompts[number] for number in numbers], wanted, seed)
                    for number, text in zip(numbers, texts, strict=True):
                        answers[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(numbers))
        return answers


def _disable(asked: Any) -> bool | None:
    # None: shown on a terminal only.
    return True if asked else None

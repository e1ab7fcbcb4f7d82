"""The model class that lm-evaluation-harness knows as ``sinkprune``."""

from typing import Any, cast

import torch
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.evaluation.conditional_likelihood import answer_log_likelihood
from sinkprune_plugin.loading import default_sequence_length, load_model, load_tokenizer
from sinkprune_plugin.sampling import SamplingOptions, denoise

__all__ = ["SinkpruneLM"]

LONGEST = 4096
DEFAULT_ANSWER = 256


class SinkpruneLM(TemplateLM):
    """A diffusion LM, dense or sparse, for lm-evaluation-harness.

    :param pretrained: checkpoint directory or hub name
    :param backend: what generates answers: ``transformers`` or ``vllm``; likelihoods are always transformers'
    :param mc_num: Monte-Carlo samples of a likelihood
    :param cfg: scale of classifier-free guidance
    :param block_length: tokens in a block of an answer
    :param steps: denoising steps of an answer; default one for each token
    :param cache: cache mode of an answer
    :param check_greedy: also find out whether the answer is what the model would write; costs as many forward passes
        as the answer has tokens, and only tasks such as LAMBADA's accuracy use it
    :param max_length: longest context and answer; default the model's, at most 4096
    :param batch_size: rows in a forward pass
    :param device: default the GPU if there is one
    :param dtype: ``auto``, ``float32`` or ``bfloat16``
    :param seed: of all noise
    :raises UsageError: on wrong arguments
    """

    def __init__(
        self,
        pretrained: str,
        backend: str = "transformers",
        mc_num: int = 128,
        cfg: float = 0.0,
        block_length: int = 32,
        steps: int | None = None,
        cache: str = "none",
        check_greedy: bool = False,
        max_length: int | None = None,
        batch_size: int | str = 32,
        device: str | None = None,
        dtype: str = "auto",
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        # Passed by the harness itself.
        for name in ("max_batch_size", "trust_remote_code"):
            unknown.pop(name, None)
        if unknown:
            raise UsageError(f"model argument {sorted(unknown)[0]!r} is unknown to sinkprune; see docs/evaluation.md")
        if backend not in ("transformers", "vllm"):
            raise UsageError(f"backend {backend!r} is unknown; use transformers or vllm")
        if int(mc_num) < 1:
            raise UsageError(f"mc_num {mc_num} is out of range; use at least 1")
        # Checked before anything is loaded.
        SamplingOptions.resolve(gen_length=max(int(block_length), 1), block_length=block_length, cache=cache)
        self.tokenizer: Any = load_tokenizer(pretrained)
        self.model: Any = load_model(pretrained, dtype if dtype == "auto" else getattr(torch, dtype))
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.spec = resolve_diffusion(self.model.config, self.tokenizer)
        self.pretrained, self.backend = pretrained, backend
        self.mc_num, self.cfg, self.seed = int(mc_num), float(cfg), int(seed)
        self.block_length, self.steps, self.cache = int(block_length), steps, cache
        self.check_greedy = check_greedy
        self.rows = int(batch_size) if str(batch_size).isdigit() else 32
        self._length = max_length or default_sequence_length(self.model.config, LONGEST)
        self._engine: Any = None

    @property
    def eot_token_id(self) -> int:
        """End-of-sequence token, which stands in for an empty context."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UsageError("the tokenizer has no eos_token, which an empty context needs; set it")
        return int(eos)

    @property
    def max_length(self) -> int:
        """Longest context and answer together, in tokens."""
        return int(self._length)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return self.pretrained.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """See ``LM``."""
        text = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return cast("str", text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode text without special tokens."""
        return cast("list[int]", self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)))

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        results = []
        quiet = True if kwargs.get("disable_tqdm") else None
        for pair, context, answer in tqdm(requests, desc="loglikelihood", disable=quiet):
            room = self.max_length - len(answer)
            if room < 1:
                raise UsageError(f"an answer of {len(answer)} tokens doesn't fit max_length {self.max_length}")
            kept = context[-room:]
            score = self._score(kept, answer)
            greedy = self.check_greedy and self._is_greedy(kept, answer)
            results.append((score, greedy))
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, results[-1])
        return results

    def _score(self, context: list[int], answer: list[int]) -> float:
        return answer_log_likelihood(
            self.model,
            context,
            answer,
            self.spec,
            mc_num=self.mc_num,
            batch_size=self.rows,
            cfg=self.cfg,
            seed=self.seed,
        )

    def _is_greedy(self, context: list[int], answer: list[int]) -> bool:
        written = denoise(
            self.model, torch.tensor(context), gen_length=len(answer), block_length=len(answer), spec=self.spec
        )
        return written.sequences[0].tolist() == answer

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in pieces of the longest length, each given the end of the last.

        :param requests: with the text as their only argument
        :param disable_tqdm: no progress bar
        :return: nats
        """
        results = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=True if disable_tqdm else None):
            (text,) = request.args
            tokens = self.tok_encode(text)
            context, total = [self.eot_token_id], 0.0
            for begin in range(0, len(tokens), self.max_length - 1):
                piece = tokens[begin : begin + self.max_length - 1]
                total += self._score(context, piece)
                context = piece[-1:]
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return results

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Denoise answers and cut them at the stop strings.

        :param requests: with context and ``gen_kwargs`` (``until``, ``max_gen_toks``, ``temperature``)
        :param disable_tqdm: no progress bar
        :return: answers
        """
        answers = []
        for request in tqdm(requests, desc="generate_until", disable=True if disable_tqdm else None):
            context, settings = request.args
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            length = int(settings.get("max_gen_toks", DEFAULT_ANSWER))
            room = self.max_length - length
            if room < 1:
                raise UsageError(f"max_gen_toks {length} leaves no room for a context within {self.max_length} tokens")
            prompt = self.tok_encode(context)[-room:] or [self.eot_token_id]
            temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
            text = self.tokenizer.decode(self._generate(prompt, length, temperature), skip_special_tokens=True)
            for stop in until:
                text = text.split(stop)[0] if stop else text
            answers.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return answers

    def _generate(self, prompt: list[int], length: int, temperature: float) -> list[int]:
        block = min(self.block_length, length)
        eos = self.tokenizer.eos_token_id
        if self.backend == "vllm":
            options: dict[str, Any] = {"dlm_block_length": block, "dlm_cache": self.cache, "dlm_seed": self.seed}
            options |= {"dlm_temperature": temperature} | ({"dlm_steps": self.steps} if self.steps else {})
            (tokens,) = self._vllm().generate([prompt], length, options, ignore_eos=False)
            return cast("list[int]", tokens)
        written = denoise(
            self.model,
            torch.tensor(prompt),
            gen_length=length,
            block_length=block,
            steps=self.steps,
            cache=self.cache,
            temperature=temperature,
            cfg_scale=self.cfg,
            seed=self.seed,
            spec=self.spec,
            eos_token_ids=[] if eos is None else [eos],
        )
        return cast("list[int]", written.sequences[0].tolist())

    def _vllm(self) -> Any:
        if self._engine is None:
            from sinkprune_plugin.vllm.offline import OfflineEngine

            if self.cfg:
                raise UsageError(f"cfg {self.cfg} isn't served by vLLM; use backend=transformers")
            self._engine = OfflineEngine(
                self.pretrained,
                max_requests=8,
                max_model_len=self.max_length,
                canvas_length=self.max_length - 1,
                dtype=self.model.dtype,
            )
        return self._engine

"""What a task's ``generation_kwargs`` request, and where an answer ends."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sampling.edit_options import refuse_edits

__all__ = ["AnswerRequest", "cut_text", "cut_tokens"]

DEFAULT_LENGTH = 256
# The first one given counts, as in the harness's own model classes.
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_OTHERS = ("until", "do_sample", "temperature", "top_k", "top_p", "num_beams")


@dataclass(frozen=True)
class AnswerRequest:
    """One answer's length, its stop strings and how it is sampled.

    :param length: tokens of the canvas
    :param until: texts that end the answer and don't belong to it
    :param temperature: 0 is greedy
    :param top_k: 0 for all tokens
    :param top_p: 1 for all tokens
    """

    length: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "AnswerRequest":
        """Read a request's ``gen_kwargs``; without ``do_sample``, a temperature above 0 means to sample.

        :param given: option → value
        :return: the request
        :raises UsageError: on an unknown option, since ignoring one would change the result
        """
        refuse_edits(given)
        for name in given:
            if name not in _LENGTH_NAMES + _OTHERS:
                raise UsageError(
                    f"generation option {name!r} is unknown to sinkprune; use max_gen_toks, {', '.join(_OTHERS)}, and "
                    "--model_args for block_length, steps and cache"
                )
        if given.get("num_beams", 1) != 1:
            raise UsageError(f"num_beams {given['num_beams']!r} doesn't apply to denoising; leave it out")
        length = next((given[name] for name in _LENGTH_NAMES if given.get(name) is not None), DEFAULT_LENGTH)
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise UsageError(f"max_gen_toks {length!r} is out of range; use a whole number from 1")
        until = given.get("until") or ()
        temperature = given.get("temperature")
        sample = given.get("do_sample")
        if sample is None:
            sample = bool(temperature)
        # As in transformers, sampling without a temperature is sampling at 1.
        drawn = 1.0 if temperature is None else temperature
        return cls(
            length=length,
            until=tuple(text for text in ((until,) if isinstance(until, str) else until) if text),
            temperature=drawn if sample else 0.0,
            top_k=given.get("top_k") or 0 if sample else 0,
            top_p=given.get("top_p", 1.0) if sample else 1.0,
        )


def cut_tokens(tokens: Sequence[int], stops: Collection[int]) -> list[int]:
    """Tokens before the first one that ends the answer.

    :param tokens: token ids
    :param stops: token ids that end it
    :return: token ids
    """
    for place, token in enumerate(tokens):
        if token in stops:
            return list(tokens[:place])
    return list(tokens)


def cut_text(text: str, until: Sequence[str]) -> str:
    """Text before the first of the stop strings.

    :param text: decoded answer
    :param until: not empty each
    :return: text
    """
    ends = [place for place in map(text.find, until) if place >= 0]
    return text[: min(ends)] if ends else text

"""The options of one generation, checked and resolved."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sinkprune_plugin.errors import UsageError

__all__ = ["CACHES", "OPTION_NAMES", "REMASKINGS", "SamplingOptions", "parse_options"]

CACHES = ("none", "prefix", "dual", "commit")
REMASKINGS = ("low_confidence", "random", "margin", "entropy")
OPTION_NAMES = (
    "dlm_block_length",
    "dlm_steps",
    "dlm_gen_length",
    "dlm_cache",
    "dlm_temperature",
    "dlm_remasking",
    "dlm_threshold",
    "dlm_cfg_scale",
    "dlm_seed",
)
DEFAULT_BLOCK = 32
HOTTEST = 100.0


@dataclass(frozen=True)
class SamplingOptions:
    """Options of one generation; made by :meth:`resolve`, which checks them.

    :param gen_length: tokens to generate, G
    :param block_length: tokens in a block, L; the last block may be shorter
    :param steps: denoising steps of the whole generation
    :param cache: ``none``, ``prefix``, ``dual`` or ``commit``
    :param temperature: of the Gumbel noise; 0 is greedy
    :param remasking: ``low_confidence``, ``random``, ``margin`` or ``entropy``
    :param threshold: unmask all positions surer than this, instead of a fixed number in each step
    :param cfg_scale: scale of classifier-free guidance
    :param seed: of the noise
    :param top_k: 0 for all tokens
    :param top_p: 1 for all tokens
    """

    gen_length: int
    block_length: int
    steps: int
    cache: str = "none"
    temperature: float = 0.0
    remasking: str = "low_confidence"
    threshold: float | None = None
    cfg_scale: float = 0.0
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Begin and end of each block in the canvas."""
        return tuple(
            (begin, min(begin + self.block_length, self.gen_length))
            for begin in range(0, self.gen_length, self.block_length)
        )

    def steps_in_block(self, block: int) -> int:
        """Denoising steps of a block: in proportion to its width, at least one, at most one a token.

        :param block: its number
        :return: its steps; over all blocks they add up to ``steps`` where all blocks are equally wide
        """
        begin, end = self.blocks[block]
        return max(1, min(end - begin, end * self.steps // self.gen_length - begin * self.steps // self.gen_length))

    def tokens_per_step(self, block: int) -> tuple[int, ...]:
        """How many tokens each step of a block unmasks; the first steps take what doesn't divide.

        :param block: its number
        :return: one number for each step, their sum being the block's width
        """
        begin, end = self.blocks[block]
        steps = self.steps_in_block(block)
        each, rest = divmod(end - begin, steps)
        return tuple(each + (step < rest) for step in range(steps))

    @classmethod
    def resolve(
        cls,
        *,
        gen_length: int,
        block_length: int | None = None,
        steps: int | None = None,
        gen_length_given: bool = False,
        **others: Any,
    ) -> "SamplingOptions":
        """Fill in defaults and check everything.

        :param gen_length: tokens to generate
        :param block_length: default 32, or the whole generation where that is shorter
        :param steps: default one for each token
        :param gen_length_given: whether the length is the user's own choice, which a block length must then divide
        :param others: further fields
        :return: the options
        :raises UsageError: naming the option by its ``dlm_`` name, its value and the remedy
        """
        _whole("dlm_gen_length", gen_length, 1)
        if block_length is None:
            block_length = min(DEFAULT_BLOCK, gen_length)
            while gen_length_given and gen_length % block_length:
                block_length -= 1
        _whole("dlm_block_length", block_length, 1)
        if block_length > gen_length:
            raise UsageError(f"dlm_block_length {block_length} is longer than the generation of {gen_length} tokens")
        if gen_length_given and gen_length % block_length:
            raise UsageError(
                f"dlm_block_length {block_length} doesn't divide dlm_gen_length {gen_length}; use a divisor, or leave "
                "dlm_gen_length out for a shorter last block"
            )
        blocks = math.ceil(gen_length / block_length)
        steps = gen_length if steps is None else steps
        _whole("dlm_steps", steps, 1)
        if not blocks <= steps <= gen_length:
            raise UsageError(f"dlm_steps {steps} isn't within {blocks} (one a block) and {gen_length} (one a token)")
        if gen_length % block_length == 0 and steps % blocks:
            raise UsageError(
                f"dlm_steps {steps} isn't a multiple of the {blocks} blocks; use {steps - steps % blocks} or "
                f"{steps + blocks - steps % blocks}"
            )
        options = cls(gen_length=gen_length, block_length=block_length, steps=steps, **others)
        options._check()
        return options

    def _check(self) -> None:
        for name, value, known in (("dlm_cache", self.cache, CACHES), ("dlm_remasking", self.remasking, REMASKINGS)):
            if value not in known:
                raise UsageError(f"{name} {value!r} is unknown; use {', '.join(known[:-1])} or {known[-1]}")
        _number("dlm_temperature", self.temperature, 0.0, HOTTEST)
        _number("dlm_cfg_scale", self.cfg_scale, 0.0, HOTTEST)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        if self.threshold is not None:
            _number("dlm_threshold", self.threshold, 0.0, 1.0, open_low=True)
            if self.remasking == "entropy":
                raise UsageError("dlm_threshold needs a probability; use dlm_remasking low_confidence with it")
        _whole("dlm_seed", self.seed, 0, 2**63 - 1)
        _whole("top_k", self.top_k, 0)
        if self.cfg_scale and self.cache != "none":
            raise UsageError(f"dlm_cfg_scale {self.cfg_scale} works with dlm_cache none only, not {self.cache}")


def _whole(name: str, value: Any, low: int, high: int = 2**31 - 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} {value!r} isn't a whole number")
    if not low <= value <= high:
        raise UsageError(f"{name} {value} isn't within {low} and {high}")


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} {value!r} isn't a finite number")
    if not low <= value <= high or (open_low and value == low):
        raise UsageError(f"{name} {value} isn't {'above' if open_low else 'from'} {low:g} and up to {high:g}")


_WHOLE = ("dlm_block_length", "dlm_steps", "dlm_gen_length", "dlm_seed")
_REAL = ("dlm_temperature", "dlm_threshold", "dlm_cfg_scale")


def parse_options(given: Mapping[str, Any], *, max_tokens: int, top_k: int = 0, top_p: float = 1.0) -> SamplingOptions:
    """Resolve the ``dlm_`` options of a request.

    :param given: option → value; numbers may come as text, as they do over HTTP
    :param max_tokens: length of the generation where ``dlm_gen_length`` isn't given
    :param top_k: 0 for all tokens
    :param top_p: 1 for all tokens
    :return: the options
    :raises UsageError: for an unknown option or a wrong value, in one line with the remedy
    """
    for name in given:
        if name not in OPTION_NAMES:
            near = difflib.get_close_matches(name, OPTION_NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(OPTION_NAMES)}"
            raise UsageError(f"unknown option {name!r}; {hint}")
    values = {name.removeprefix("dlm_"): _read(name, value) for name, value in given.items() if value is not None}
    length = values.pop("gen_length", None)
    return SamplingOptions.resolve(
        gen_length=max_tokens if length is None else length,
        gen_length_given=length is not None,
        top_k=top_k,
        top_p=top_p,
        **values,
    )


def _read(name: str, value: Any) -> Any:
    if not isinstance(value, str) or name not in _WHOLE + _REAL:
        return value
    try:
        return int(value) if name in _WHOLE else float(value)
    except ValueError:
        raise UsageError(f"{name} {value!r} isn't a {'whole ' if name in _WHOLE else ''}number") from None

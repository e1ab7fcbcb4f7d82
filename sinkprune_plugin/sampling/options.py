"""The options of one generation, checked and resolved."""

import difflib
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from sinkprune_plugin.diffusion import DiffusionSpec
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sampling.edit_options import refuse_edits
from sinkprune_plugin.sampling.family_options import family_options

__all__ = ["CACHES", "OPTION_NAMES", "REMASKINGS", "CacheName", "RemaskingName", "SamplingOptions", "parse_options"]

CacheName = Literal["none", "prefix", "dual", "commit"]
RemaskingName = Literal["low_confidence", "random", "margin", "entropy"]
CACHES: tuple[str, ...] = get_args(CacheName)
REMASKINGS: tuple[str, ...] = get_args(RemaskingName)
OPTION_NAMES = (
    "dlm_block_length",
    "dlm_steps",
    "dlm_gen_length",
    "dlm_cache",
    "dlm_temperature",
    "dlm_remasking",
    "dlm_threshold",
    "dlm_factor",
    "dlm_early_stop",
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
    :param threshold: unmask all positions with higher confidence than this, instead of a fixed number in each step
    :param factor: Fast-dLLM's factor f: unmask the n most confident positions, n being the largest with
        (n + 1) (1 - c_n) < f, instead of a fixed number in each step
    :param early_stop: end a block as soon as an end-of-sequence token and all before it are unmasked; the text, which
        ends there, is the same
    :param on_grid: blocks lie on a grid over prompt and generation, see :meth:`after_prompt`
    :param offset: tokens of the first block that the prompt ends with, 0 off the grid; the narrow block that this
        leaves may add a step
    :param cfg_scale: scale of classifier-free guidance; 0 is off
    :param seed: of the noise, 0 to 2^63 - 1
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
    factor: float | None = None
    early_stop: bool = False
    on_grid: bool = False
    offset: int = 0

    def after_prompt(self, prompt_length: int, spec: DiffusionSpec) -> "SamplingOptions":
        """The options of a generation that begins where a prompt ends.

        Blocks are counted from there, except where context tokens see each other block by block (LLaDA2): then they
        lie on a grid over prompt and generation, as in the published sampler, and the first one may begin within the
        prompt.

        :param prompt_length: tokens of the prompt
        :param spec: the model's diffusion spec
        """
        if spec.context != "block_causal" or spec.block_length is None:
            return self
        # A generation that is shorter than a block doesn't make the model's blocks shorter.
        block = spec.block_length if self.block_length == self.gen_length else self.block_length
        return replace(self, block_length=block, on_grid=True, offset=prompt_length % block)

    def open_block(self, done: int) -> tuple[int, int, int]:
        """The block that is open once so many tokens are generated.

        :param done: tokens of finished blocks
        :return: its number, its tokens before these (of the prompt), and its tokens after them, 0 at the end
        """
        number, before = divmod(done + self.offset, self.block_length)
        return number, before, min(self.block_length - before, self.gen_length - done)

    @property
    def fixed_steps(self) -> bool:
        """Whether the number of steps of each block is known before it is denoised."""
        return self.threshold is None and self.factor is None and not self.early_stop

    @property
    def blocks(self) -> tuple[tuple[int, int], ...]:
        """Begin and end of each block in the canvas."""
        return tuple(
            (max(begin, 0), min(begin + self.block_length, self.gen_length))
            for begin in range(-self.offset, self.gen_length, self.block_length)
        )

    def steps_in_block(self, block: int) -> int:
        """Denoising steps of a block: in proportion to its width, at least one, at most one per token.

        Rounding down where each block ends keeps both bounds by itself, as long as there are at least as many steps
        as blocks and at most as many as tokens. Equally wide blocks get equally many, as published.

        :param block: its number
        :return: its steps; over all blocks they add up to ``steps``
        """
        begin, end = self.blocks[block]
        # A first block that the prompt has a part of may be narrower than its share of a step.
        return max(1, end * self.steps // self.gen_length - begin * self.steps // self.gen_length)

    def tokens_per_step(self, block: int) -> tuple[int, ...]:
        """How many tokens each step of a block unmasks; the first steps take the remainder.

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
        cache: str = "none",
        temperature: float = 0.0,
        remasking: str = "low_confidence",
        threshold: float | None = None,
        cfg_scale: float = 0.0,
        seed: int = 0,
        top_k: int = 0,
        top_p: float = 1.0,
        factor: float | None = None,
        early_stop: bool = False,
    ) -> "SamplingOptions":
        """Fill in defaults and check everything.

        :param gen_length: tokens to generate
        :param block_length: default 32, or the whole generation where that is shorter
        :param steps: default one for each token
        :param gen_length_given: whether the length is the user's own choice, which a block length must then divide
        :param cache: this and the following: see :class:`SamplingOptions`
        :return: the options
        :raises UsageError: naming the option by its ``dlm_`` name, its value and the remedy
        """
        gen_length = _whole("dlm_gen_length", gen_length, 1)
        chosen = block_length is not None
        block_length = _whole(
            "dlm_block_length", min(DEFAULT_BLOCK, gen_length) if block_length is None else block_length, 1
        )
        if block_length > gen_length:
            raise UsageError(
                f"dlm_block_length {block_length} is longer than the generation of {gen_length} tokens; use at most "
                f"{gen_length}, or generate more"
            )
        if chosen and gen_length_given and gen_length % block_length:
            raise UsageError(
                f"dlm_block_length {block_length} doesn't divide dlm_gen_length {gen_length}; use a divisor, or leave "
                "dlm_gen_length out for a shorter last block"
            )
        blocks = math.ceil(gen_length / block_length)
        steps = _whole("dlm_steps", gen_length if steps is None else steps, 1)
        if not blocks <= steps <= gen_length:
            raise UsageError(
                f"dlm_steps {steps} is out of range; use {blocks} (one per block) to {gen_length} (one per token)"
            )
        if gen_length % block_length == 0 and steps % blocks:
            below = steps - steps % blocks
            raise UsageError(
                f"dlm_steps {steps} isn't a multiple of the {blocks} blocks; use {below} or {below + blocks}"
            )
        cfg_scale = _number("dlm_cfg_scale", cfg_scale, 0.0, math.inf)
        cache = _name("dlm_cache", cache, CACHES)
        remasking = _name("dlm_remasking", remasking, REMASKINGS)
        if cfg_scale and cache != "none":
            raise UsageError(f"dlm_cfg_scale {cfg_scale:g} works without a cache only; use dlm_cache none, not {cache}")
        threshold, factor = _rules(threshold, factor, remasking)
        if not isinstance(early_stop, bool):
            raise UsageError(f"dlm_early_stop {_shown(early_stop)} isn't true or false; use one of these")
        return cls(
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
            cache=cache,
            temperature=_number("dlm_temperature", temperature, 0.0, HOTTEST),
            remasking=remasking,
            threshold=threshold,
            cfg_scale=cfg_scale,
            seed=_whole("dlm_seed", seed, 0, 2**63 - 1),
            top_k=_whole("top_k", top_k, 0),
            top_p=_number("top_p", top_p, 0.0, 1.0, above=True),
            factor=factor,
            early_stop=early_stop,
        )


def _rules(threshold: Any, factor: Any, remasking: str) -> tuple[float | None, float | None]:
    """The two rules that unmask as many as the model is sure of."""
    if threshold is not None:
        threshold = _number("dlm_threshold", threshold, 0.0, 1.0, above=True)
    if factor is not None:
        factor = _number("dlm_factor", factor, 0.0, math.inf, above=True)
    if threshold is not None and factor is not None:
        raise UsageError(
            f"dlm_threshold {threshold:g} and dlm_factor {factor:g} are two rules for the same choice; leave one out"
        )
    for name, value in (("dlm_threshold", threshold), ("dlm_factor", factor)):
        if value is not None and remasking == "entropy":
            raise UsageError(
                f"{name} {value:g} is for probabilities, not entropies; use dlm_remasking low_confidence with it"
            )
    return threshold, factor


def _whole(name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} {_shown(value)} isn't a whole number; use one from {low} to {high}")
    if not low <= value <= high:
        raise UsageError(f"{name} {_shown(value)} is out of range; use a whole number from {low} to {high}")
    return value


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> float:
    allowed = f"{'above' if above else 'from'} {low:g}" + ("" if math.isinf(high) else f" and up to {high:g}")
    # Compared as it is: an int may be too large for a float. nan and inf fail the comparisons.
    good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not good or value == math.inf or (above and value == low):
        raise UsageError(f"{name} {_shown(value)} is out of range; use a number {allowed}")
    return float(value)


def _name(name: str, value: Any, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise UsageError(f"{name} {_shown(value)} is unknown; use {', '.join(known[:-1])} or {known[-1]}")
    return value


def _shown(value: Any) -> str:
    # A client's value may be huge, or hold line breaks; a message is one short line. Python refuses to print an int of
    # more than 4300 digits.
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"of {value.bit_length()} bits"
    return " ".join(reprlib.repr(value).split())


_WHOLE = ("dlm_block_length", "dlm_steps", "dlm_gen_length", "dlm_seed")
_REAL = ("dlm_temperature", "dlm_threshold", "dlm_factor", "dlm_cfg_scale")
_TRUTHS = {"true": True, "false": False, "1": True, "0": False}


def parse_options(
    given: Mapping[str, Any],
    *,
    max_tokens: int,
    top_k: int = 0,
    top_p: float = 1.0,
    spec: DiffusionSpec | None = None,
) -> SamplingOptions:
    """Resolve the ``dlm_`` options of a request.

    :param given: option → value; numbers may come as text, as they do over HTTP
    :param max_tokens: length of the generation where ``dlm_gen_length`` isn't given
    :param top_k: 0 for all tokens
    :param top_p: 1 for all tokens
    :param spec: the model's diffusion spec, for what its family says
    :return: the options
    :raises UsageError: for an unknown option or a wrong value, in one line with the remedy
    """
    refuse_edits(given)
    for name in given:
        if name not in OPTION_NAMES:
            near = difflib.get_close_matches(str(name)[:100], OPTION_NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(OPTION_NAMES)}"
            raise UsageError(f"unknown option {_shown(name)}; {hint}")
    values = {name.removeprefix("dlm_"): _read(name, value) for name, value in given.items() if value is not None}
    length = values.pop("gen_length", None)
    return SamplingOptions.resolve(
        gen_length=max_tokens if length is None else length,
        gen_length_given=length is not None,
        top_k=top_k,
        top_p=top_p,
        **family_options(spec, values, max_tokens if length is None else length),
    )


def _read(name: str, value: Any) -> Any:
    if name == "dlm_early_stop" and not isinstance(value, bool):
        # Over HTTP there are numbers and text only.
        return _TRUTHS.get(str(value).lower(), value)
    if not isinstance(value, str) or name not in _WHOLE + _REAL:
        return value
    # Plain decimal notation only: int and float also take underscores, spaces, digits of other scripts and nan.
    pattern = (
        r"[+-]?[0-9]{1,20}"
        if name in _WHOLE
        else r"[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?"
    )
    if not re.fullmatch(pattern, value):
        raise UsageError(
            f"{name} {_shown(value)} isn't a {'whole ' if name in _WHOLE else ''}number; send one in digits"
        )
    return int(value) if name in _WHOLE else float(value)

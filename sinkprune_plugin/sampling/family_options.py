"""What a model's family says about sampling: its blocks, and the one cache that is right where it has them.

A model that denoises block by block was trained with an open block after a final context, so keys and values of
finished blocks are exact, and ``commit`` is what it computes. Elsewhere the same cache is an approximation.
"""

from collections.abc import Mapping
from typing import Any

from sinkprune_plugin.diffusion import DiffusionSpec
from sinkprune_plugin.errors import UsageError

__all__ = ["block_within", "default_caches", "family_options"]


def family_options(spec: DiffusionSpec | None, given: Mapping[str, Any], gen_length: int) -> dict[str, Any]:
    """Fill in what the family says, and refuse what it rules out.

    :param spec: the model's diffusion spec; None: it has no blocks
    :param given: options of :meth:`~sinkprune_plugin.sampling.options.SamplingOptions.resolve` by name; None where one
        isn't given
    :param gen_length: tokens to generate
    :return: the options that are given or follow
    :raises UsageError: naming the option, its value and the remedy
    """
    options = {name: value for name, value in given.items() if value is not None}
    block = None if spec is None else spec.block_length
    if spec is None or block is None:
        return options
    cache = options.setdefault("cache", "commit")
    if cache in ("none", "prefix", "dual"):
        raise UsageError(
            f"dlm_cache {cache} isn't what a {spec.name} model computes: it denoises a block after the finished ones "
            "before it and never sees later ones, which is dlm_cache commit; use that, or leave it out"
        )
    if options.get("cfg_scale"):
        raise UsageError(
            f"dlm_cfg_scale {options['cfg_scale']} isn't supported for a {spec.name} model, whose finished blocks are "
            "kept with their prompt; leave it out"
        )
    length = options.setdefault("block_length", min(block, gen_length) if isinstance(gen_length, int) else block)
    if isinstance(length, int) and length > block:
        raise UsageError(
            f"dlm_block_length {length} is longer than the {block} tokens of a block that this {spec.name} model was "
            f"trained with; use at most {block}"
        )
    return options


def block_within(spec: DiffusionSpec, wanted: int) -> int:
    """A block length that a model takes.

    :param spec: its diffusion spec
    :param wanted: tokens in a block
    :return: as many, or those of the model's own blocks if these are shorter
    """
    return wanted if spec.block_length is None else min(wanted, spec.block_length)


def default_caches(spec: DiffusionSpec) -> tuple[str, ...]:
    """Caches to compare models with.

    :param spec: the models' diffusion spec
    """
    return ("none", "dual") if spec.block_length is None else ("commit",)

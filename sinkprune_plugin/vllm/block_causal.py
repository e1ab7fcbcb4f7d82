"""vLLM's configuration for a block-causal context, whose keys and values are final block by block.

What other denoising models have to switch off works there: the prefix cache, since a block's keys don't depend on what
comes after it, and prompts in chunks, since a chunk may end with any block.
"""

import math
from typing import Any

from sinkprune_plugin.diffusion import DiffusionSpec

__all__ = ["CPU_PAGE", "PAGE", "block_of", "cache_salt", "set_pages"]

# Positions in a page of the cache are a multiple of this: what vLLM's attention kernels take, and on CPUs.
PAGE, CPU_PAGE = 16, 32
# vLLM's own default on CPUs, where larger pages are faster.
_CPU_DEFAULT = 128


def block_of(spec: DiffusionSpec) -> int | None:
    """Tokens in a block of a block-causal context; None for another context.

    :param spec: a model's diffusion spec
    """
    return spec.block_length if spec.context == "block_causal" else None


def set_pages(cache: Any, block: int, *, cpu: bool, log: Any) -> None:
    """Make pages hold whole blocks, as the prefix cache needs; without a choice it is switched off.

    A page is found again by the tokens up to its end, and keys of a block that goes on after it depend on more.

    :param cache: vLLM's ``CacheConfig``, changed in place
    :param block: tokens in a block
    :param cpu: whether vLLM runs on a CPU
    :param log: vLLM's logger
    """
    if not cache.enable_prefix_caching:
        return
    if not cache.user_specified_block_size:
        page = math.lcm(block, CPU_PAGE if cpu else PAGE)
        if cpu and _CPU_DEFAULT % page == 0:
            page = _CPU_DEFAULT
        # Or the attention backend's default replaces it.
        cache.block_size, cache.user_specified_block_size = page, True
        log.info("block_size %d: a page of the prefix cache holds whole blocks of %d; --block-size sets another", page,
                 block)  # fmt: skip
    elif cache.block_size % block:
        cache.enable_prefix_caching = False
        log.info(
            "prefix caching is off: a page of %d positions doesn't hold whole blocks of %d, whose keys depend on all "
            "of the block; use a multiple in --block-size",
            cache.block_size,
            block,
        )


def cache_salt(salt: str | None, block: int, own: int | None) -> str | None:
    """What keeps apart the cached keys of requests with other blocks, which are other keys.

    :param salt: the client's own
    :param block: tokens in a block of the request
    :param own: those of the model; None for a model without a block-causal context
    :return: the salt to use
    """
    if own is None or block == own:
        return salt
    return f"{salt or ''} dlm_block_length {block}"

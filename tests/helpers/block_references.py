"""A sampler for models that denoise block by block, written out plainly: the tests' reference."""

from plain_nemotron_labs import plain_nemotron_labs
from torch.nn import functional as F

__all__ = ["plain_block_logits"]


def plain_block_logits(tensors, config):
    """Logits for :func:`sampling_references.plain_denoise`: nothing is kept between steps.

    In each step the whole sequence up to the end of the open block goes through the network: the prompt and finished
    blocks causally, the open block in both directions.
    """

    def logits(x, begin, end, step):
        visible = [list(range(q + 1)) if q < begin else list(range(end)) for q in range(end)]
        result = plain_nemotron_labs(tensors, config, x[0, :end], visible)
        # Nothing after the block exists, so it isn't read.
        return F.pad(result, (0, 0, 0, x.shape[1] - end))[None]

    return logits

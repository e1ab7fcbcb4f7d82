"""What vLLM's defaults cost a model that denoises a long canvas, and the defaults served in their place.

vLLM's Model Runner V2 allocates a bitmask for structured outputs of max_num_seqs × canvas × ⌈vocabulary / 32⌉ int32 on
the device, whether it is used or not (``vllm/v1/worker/gpu/structured_outputs.py``). For a canvas of a few hundred
tokens and a vocabulary of 126464 this takes gigabytes at vLLM's default of 256 to 1024 requests.
"""

__all__ = [
    "BITMASK_BUDGET",
    "LONGEST_CANVAS",
    "LONGEST_CONTEXT",
    "MOST_REQUESTS",
    "bitmask_bytes",
    "default_canvas",
    "default_requests",
    "warms_up",
]

# Longest prompt and answer together unless --max-model-len says otherwise. A step runs all of it at once, so it is also
# the least number of tokens in a batch; Dream's configuration names 131072.
LONGEST_CONTEXT = 8192
# Longest answer served unless --diffusion-config says otherwise. vLLM's warm-up requests have a prompt of one token
# more than the canvas and take three canvases after it: with a canvas of 1023 they fit into LLaDA's 4096 positions.
LONGEST_CANVAS = 1023
# Such a model's canvas isn't made shorter than this (or its context) for the warm-up.
_SHORTEST_CANVAS = 255
# Most requests at once unless --max-num-seqs says otherwise: 64 blocks of 32 tokens are 2048 rows, past the point at
# which the matrix products of a GPU are limited by arithmetic.
MOST_REQUESTS = 64
# Bytes of the bitmask at the default number of requests.
BITMASK_BUDGET = 512 * 2**20
# Requests are capped at multiples of this.
_MULTIPLE = 8


def bitmask_bytes(requests: int, canvas: int, vocabulary: int) -> int:
    """Size of the bitmask for structured outputs.

    :param requests: most requests at once
    :param canvas: longest answer
    :param vocabulary: size of the vocabulary
    :return: bytes
    """
    return requests * canvas * -(-vocabulary // 32) * 4


def warms_up(canvas: int, max_model_len: int) -> bool:
    """Whether vLLM's warm-up requests stay within the positions of the model.

    :param canvas: longest answer
    :param max_model_len: longest prompt and answer together
    """
    return 4 * (canvas + 1) <= max_model_len


def default_canvas(max_model_len: int) -> int:
    """Longest answer served if none is asked for.

    :param max_model_len: longest prompt and answer together
    :return: a quarter of it, so that vLLM can warm its kernels up; at most :data:`LONGEST_CANVAS`, and more than a
        quarter where that would be less than 255
    """
    return min(LONGEST_CANVAS, max(max_model_len // 4 - 1, min(_SHORTEST_CANVAS, max_model_len - 1)))


def default_requests(canvas: int, vocabulary: int) -> int:
    """Most requests at once if no number is asked for.

    :param canvas: longest answer
    :param vocabulary: size of the vocabulary
    :return: as many as the bitmask's budget holds, at most :data:`MOST_REQUESTS`, at least one
    """
    fitting = BITMASK_BUDGET // bitmask_bytes(1, canvas, vocabulary)
    if fitting >= _MULTIPLE:
        fitting -= fitting % _MULTIPLE
    return max(1, min(MOST_REQUESTS, fitting))

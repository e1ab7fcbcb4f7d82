"""Uniform noise by counting: a hash of (seed, step, position, column), the same whatever else is in the batch.

Drawn from a generator, a request's noise would depend on its neighbours in the batch and on how the batch was cut. The
hash is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014):
once for each number of a row's key, each applied to the previous result, then once over key and column, which makes a
row a SplitMix64 stream of its own.
"""

import torch

__all__ = ["gumbel_argmax", "uniform_noise"]

# The constants of SplitMix64, as the signed integers that torch calculates with.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
# Numbers of noise held at once, 8 bytes each and a few copies: 64 MiB per copy.
CHUNK = 1 << 23


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    # torch shifts arithmetically; the copies of the sign bit must be cleared.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift_right(value, 30)) * _FIRST
    value = (value ^ _shift_right(value, 27)) * _SECOND
    return value ^ _shift_right(value, 31)


def uniform_noise(seed: torch.Tensor, step: torch.Tensor, position: torch.Tensor, columns: int) -> torch.Tensor:
    """Uniform numbers in the open interval (0, 1).

    :param seed: (R,) int64
    :param step: (R,) int64
    :param position: (R,) int64
    :param columns: numbers per row
    :return: (R, columns) float64, a function of each row's three numbers and the column only
    """
    key = _mix(seed + _GOLDEN)
    key = _mix(key ^ ((step + 1) * _GOLDEN))
    key = _mix(key ^ ((position + 1) * _GOLDEN))
    column = torch.arange(1, columns + 1, device=seed.device, dtype=torch.int64) * _GOLDEN
    bits = _mix(key[:, None] + column)
    # 52 bits and a half: never 0, never 1, and exact in float64.
    return (_shift_right(bits, 12).double() + 0.5) * 2.0**-52


def gumbel_argmax(
    logits: torch.Tensor, temperature: torch.Tensor, seed: torch.Tensor, step: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Draw a token for each row with the Gumbel-max trick in float64, as LLaDA's published sampler.

    That sampler takes the largest exp(logit) / (-log u)^temperature; its logarithm is taken here, which can't overflow.

    :param logits: (R, V) floating point; -inf excludes a token
    :param temperature: (R,) float64; a row with 0 takes its largest logit, on a tie the first
    :param seed: (R,) int64
    :param step: (R,) int64
    :param position: (R,) int64
    :return: (R,) int64
    """
    rows, vocabulary = logits.shape
    tokens = logits.argmax(dim=-1)
    chunk = max(1, CHUNK // max(vocabulary, 1))
    for begin in range(0, rows, chunk):
        part = slice(begin, begin + chunk)
        noise = uniform_noise(seed[part], step[part], position[part], vocabulary)
        hot = temperature[part, None].double()
        drawn = (logits[part].double() - hot * torch.log(-torch.log(noise))).argmax(dim=-1)
        tokens[part] = torch.where(temperature[part] > 0, drawn, tokens[part])
    return tokens

"""What the tests of the codecs share: dtypes, bits, comparisons."""

import torch

from sinkprune_plugin.formats.codecs import bitmask, bitmask24

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
CODECS = [bitmask, bitmask24]
ids = [codec.__name__.rpartition(".")[2] for codec in CODECS]


def raw(tensor):
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def bit_patterns(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def cast(values, dtype):
    """Small integers exactly, as any of the dtypes."""
    return values.to(dtype)


def assert_round_trip(weight, rebuilt):
    """Bit by bit, but for the sign of zeros."""
    assert rebuilt.dtype == weight.dtype
    assert rebuilt.shape == weight.shape
    zero = weight.float() == 0
    assert torch.equal(bit_patterns(rebuilt)[~zero], bit_patterns(weight)[~zero])
    assert bool((rebuilt.float()[zero] == 0).all())

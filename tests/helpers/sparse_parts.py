"""Weights in parts, by format."""

from sinkprune_plugin.formats.codecs import bitmask, bitmask24
from sinkprune_plugin.formats.codecs.format_names import CheckpointFormat

DENSE, BITMASK, TWO_OF_FOUR = CheckpointFormat
COMPRESS = {BITMASK: bitmask.compress, TWO_OF_FOUR: bitmask24.compress}
SPARSE = (BITMASK, TWO_OF_FOUR)


def in_parts(name, weight, sparse_format):
    return [(f"{name}.{part}", tensor) for part, tensor in COMPRESS[sparse_format](weight).items()]

"""Denoising a masked canvas in plain torch: the reference sampler, and the functions that engines share with it."""

from sinkprune_plugin.sampling.denoise import DenoiseOutput, denoise
from sinkprune_plugin.sampling.options import SamplingOptions, parse_options

__all__ = ["DenoiseOutput", "SamplingOptions", "denoise", "parse_options"]

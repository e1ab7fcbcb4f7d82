"""Denoising a masked canvas in plain torch: the reference sampler, and the functions that engines share with it."""

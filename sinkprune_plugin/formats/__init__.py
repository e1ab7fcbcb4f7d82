"""Sparse checkpoints in the layouts of compressed-tensors: written, read, converted."""

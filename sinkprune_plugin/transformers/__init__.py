"""Sparse checkpoints in transformers: quantizer, weight conversion, and the state shared while loading."""

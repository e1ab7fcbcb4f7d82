"""Sparse checkpoints in transformers: quantizer, weight conversion, and what it takes to load them."""

"""llm-compressor modifiers: sink-aware Wanda and SparseGPT."""

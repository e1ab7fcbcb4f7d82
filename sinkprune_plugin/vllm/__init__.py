"""The adapter for vLLM: everything here but :mod:`~sinkprune_plugin.vllm.register` imports vLLM."""

"""The adapter for vLLM: everything here but :mod:`~sinkprune_plugin.vllm.register` and :mod:`~sinkprune_plugin.vllm.cpu`
imports vLLM."""

"""The diffusion LMs as vLLM modules; vLLM imports the one it needs by the names given in ``register``."""

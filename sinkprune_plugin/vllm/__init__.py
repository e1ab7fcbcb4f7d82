"""The adapter for vLLM: everything here imports vLLM but ``cpu`` and, at import time, ``register``."""

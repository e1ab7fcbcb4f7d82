"""Checkpoints as vLLM modules in this process: loaded by vLLM's loader, run on the tokens of one request."""

from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F
from vllm_engine import free_port, prepare_vllm


@contextmanager
def loader():
    """Within it, a function that loads a checkpoint with vLLM's loader, as a worker does."""
    prepare_vllm()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    def load(path, **options):
        settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "skip_tokenizer_init": True}
        config = EngineArgs(model=str(path), **(settings | options)).create_engine_config()
        with set_current_vllm_config(config):
            # Does nothing if another test of this process has done it.
            address = f"tcp://127.0.0.1:{free_port()}"
            parallel_state.init_distributed_environment(1, 0, address, backend="gloo", local_rank=0)
            parallel_state.ensure_model_parallel_initialized(1, 1)
            return get_model(vllm_config=config), config

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            # As vLLM's own CPU worker does: the loader calls it on every device.
            patch.setattr(torch.accelerator, "empty_cache", lambda: None)
        yield load


def forward_function(monkeypatch):
    """Function (model, its configuration, tokens) → logits, with attention over the tokens of one request."""
    prepare_vllm()
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention import Attention

    def attend(self, query, key, value, output_shape=None, output_dtype=None):
        q, k, v = (
            x.reshape(len(x), heads, self.head_size).transpose(0, 1)
            for x, heads in ((query, self.num_heads), (key, self.num_kv_heads), (value, self.num_kv_heads))
        )
        k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=0) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=self.impl.scale).transpose(0, 1).flatten(1)

    monkeypatch.setattr(Attention, "forward", attend)

    @torch.inference_mode()
    def run(model, config, tokens):
        with set_current_vllm_config(config), set_forward_context(None, config):
            tokens = tokens.to(next(model.parameters()).device)
            hidden = model(input_ids=tokens, positions=torch.arange(len(tokens), device=tokens.device))
            return model.compute_logits(hidden).cpu()

    return run


def tokens_of(config, count=40):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config["vocab_size"], (count,), generator=generator)

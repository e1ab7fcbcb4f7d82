"""Small random SDAR checkpoints in the official layout, see ``official_checkpoints``."""

from official_checkpoints import _write

__all__ = ["write_sdar"]


def write_sdar(folder, *, seed=0, drop=(), **changes):
    """Write an SDAR checkpoint; ``changes`` are keys of config.json, ``drop`` are keys to leave out.

    Keys as in the published 1.7B model, names of tensors as in its modelling code.
    """
    config = {
        "architectures": ["SDARForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "block_size": 4,
        "bos_token_id": 1,
        "debug": False,
        "eos_token_id": 1,
        "ep_size": 1,
        "fuse_cross_entropy": True,
        "head_dim": 10,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 72,
        "mask_token_id": 3,
        "max_position_embeddings": 128,
        "max_window_layers": 28,
        "model_type": "sdar",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.52.4",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 88,
    }
    config.update(changes)
    width, hidden, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_width, kv_width = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    linears = {
        "self_attn.q_proj": (q_width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, q_width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
    }
    for i in range(config["num_hidden_layers"]):
        for name, shape in linears.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
            if config["attention_bias"] and "self_attn" in name:
                shapes[f"model.layers.{i}.{name}.bias"] = shape[:1]
        for norm, size in (("self_attn.q_norm", head), ("self_attn.k_norm", head)):
            shapes[f"model.layers.{i}.{norm}.weight"] = (size,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for key in drop:
        del config[key]
    return _write(folder, config, shapes, ("configuration_sdar.py", "modeling_sdar.py"), seed)

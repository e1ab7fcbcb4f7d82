"""Small random Nemotron-Labs-Diffusion checkpoints in the official layout, see ``official_checkpoints``."""

from official_checkpoints import _write

__all__ = ["write_nemotron_labs"]


def write_nemotron_labs(folder, *, seed=0, **changes):
    """Write a Nemotron-Labs-Diffusion checkpoint; ``changes`` are keys of config.json.

    Keys, and names of tensors, as in the published 3B model and in Megatron-Bridge's conversion.
    """
    config = {
        "ar_loss_weight": 1.0,
        "architectures": ["NemotronLabsDiffusionModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
            "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
        },
        "block_size": 4,
        "bos_token_id": 1,
        "dlm_loss_weight": None,
        "dlm_paradigm": "bidirectional",
        "dp_varying_mask_ratio": False,
        "eos_token_id": 2,
        "head_dim": 6,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 72,
        "mask_token_id": 3,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "nemotron_labs_diffusion",
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "pad_token_id": None,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
            "rope_type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "5.0.0",
        "use_cache": True,
        "vocab_size": 88,
    }
    config.update(changes)
    width, hidden, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_width, kv_width = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"encoder.embed_tokens.weight": (config["vocab_size"], width), "encoder.norm.weight": (width,)}

    def linear(name, rows, columns, with_bias):
        shapes[f"{name}.weight"] = (rows, columns)
        if with_bias:
            shapes[f"{name}.bias"] = (rows,)

    for i in range(config["num_hidden_layers"]):
        layer, bias = f"encoder.layers.{i}", config["attention_bias"]
        for name, rows in (("q", q_width), ("k", kv_width), ("v", kv_width)):
            linear(f"{layer}.self_attn.{name}_proj", rows, width, bias)
        linear(f"{layer}.self_attn.o_proj", width, q_width, bias)
        linear(f"{layer}.mlp.gate_proj", hidden, width, config["mlp_bias"])
        linear(f"{layer}.mlp.up_proj", hidden, width, config["mlp_bias"])
        linear(f"{layer}.mlp.down_proj", width, hidden, config["mlp_bias"])
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["diffusion_head.weight"] = (config["vocab_size"], width)
    files = ("configuration_nemotron_labs_diffusion.py", "modeling_nemotron_labs_diffusion.py")
    return _write(folder, config, shapes, files, seed)

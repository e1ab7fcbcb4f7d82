"""Small random checkpoints in the official layouts, written without the package: config.json, tensors, a Python file.

Each folder holds a Python file of the name that ``auto_map`` gives, which leaves a trace if it is executed.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = [
    "TRACE",
    "write_dream",
    "write_dream_tokenizer",
    "write_llada",
    "write_llada2",
    "write_llada_moe",
]

TRACE = "executed.txt"


def _write(folder, config, shapes, python_files, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        # Norm weights around 1 and everything else at 1/√fan_in keep the activations of a random network near 1,
        # so that an error anywhere shows in the logits.
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5)
        + (1.0 if ("norm" in name and name.endswith("weight")) or name.endswith("ln_f.weight") else 0.0)
        for name, shape in shapes.items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in python_files:
        (folder / name).write_text(f"open({str(folder / TRACE)!r}, 'w').write(__name__)\n")
    return config, tensors


def write_llada(folder, *, seed=0, drop=(), **changes):
    """Write a LLaDA checkpoint; ``changes`` are keys of config.json, ``drop`` are keys to leave out."""
    config = {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
            "AutoModel": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 48,
        "embedding_dropout": 0.0,
        "embedding_size": 96,
        "eos_token_id": 1,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": 2,
        "max_sequence_length": 64,
        "mlp_hidden_size": 80,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": 6,
        "n_kv_heads": 6,
        "n_layers": 2,
        "pad_token_id": 1,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": 90,
        "weight_tying": False,
    }
    config.update(changes)
    width, rows = config["d_model"], config["embedding_size"] or config["vocab_size"]
    hidden = config["mlp_hidden_size"] or config["mlp_ratio"] * width
    kv_heads = config["n_kv_heads"] or (1 if config["multi_query_attention"] else config["n_heads"])
    kv_width = kv_heads * width // config["n_heads"]
    bias, qkv_bias = config["include_bias"], config["include_bias"] or config["include_qkv_bias"]
    norm_bias = config["include_bias"] if config["bias_for_layer_norm"] is None else config["bias_for_layer_norm"]
    root = "model.transformer"
    shapes = {f"{root}.wte.weight": (rows, width)}

    def linear(name, rows, columns, with_bias):
        shapes[f"{name}.weight"] = (rows, columns)
        if with_bias:
            shapes[f"{name}.bias"] = (rows,)

    def norm(name):
        if config["layer_norm_with_affine"]:
            shapes[f"{name}.weight"] = (width,)
            if norm_bias:
                shapes[f"{name}.bias"] = (width,)

    for i in range(config["n_layers"]):
        block = f"{root}.blocks.{i}"
        linear(f"{block}.q_proj", width, width, qkv_bias)
        linear(f"{block}.k_proj", kv_width, width, qkv_bias)
        linear(f"{block}.v_proj", kv_width, width, qkv_bias)
        linear(f"{block}.attn_out", width, width, bias)
        linear(f"{block}.ff_proj", hidden, width, bias)
        linear(f"{block}.up_proj", hidden, width, bias)
        linear(f"{block}.ff_out", width, hidden, bias)
        norm(f"{block}.attn_norm")
        norm(f"{block}.ff_norm")
    norm(f"{root}.ln_f")
    if not config["weight_tying"]:
        linear(f"{root}.ff_out", rows, width, bias)
    for key in drop:
        del config[key]
    return _write(folder, config, shapes, ("configuration_llada.py", "modeling_llada.py"), seed)


def write_dream(folder, *, seed=0, **changes):
    """Write a Dream checkpoint; ``changes`` are keys of config.json."""
    config = {
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "bos_token_id": 1,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "hidden_size": 56,
        "initializer_range": 0.02,
        "intermediate_size": 72,
        "mask_token_id": 3,
        "max_position_embeddings": 128,
        "max_window_layers": 28,
        "model_type": "Dream",
        "num_attention_heads": 7,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 88,
    }
    config.update(changes)
    width, hidden = config["hidden_size"], config["intermediate_size"]
    kv_width = config["num_key_value_heads"] * width // config["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, width)
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (width, width)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (hidden, width)
        shapes[f"{layer}.mlp.up_proj.weight"] = (hidden, width)
        shapes[f"{layer}.mlp.down_proj.weight"] = (width, hidden)
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return _write(folder, config, shapes, ("configuration_dream.py", "modeling_dream.py"), seed)


def write_llada_moe(folder, *, seed=0, drop=(), experts=None, **changes):
    """Write a LLaDA-MoE checkpoint; ``changes`` are keys of config.json, ``drop`` are keys to leave out.

    ``experts`` gives each layer a number of its own.
    """
    config = {
        "architectures": ["LLaDAMoEModelLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_lladamoe.LLaDAConfig",
            "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
        "clip_qkv": None,
        "dense_intermediate_size": 72,
        "eos_token_id": 1,
        "expert_intermediate_size": 40,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "mask_token_id": 2,
        "max_position_embeddings": 128,
        "model_type": "llada",
        "moe_layer_freq": [1, 1],
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "num_attention_heads": 6,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 6,
        "output_router_logits": False,
        "pad_token_id": 1,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000,
        "routed_scaling_factor": 1,
        "router_aux_loss_coef": 0.01,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.53.2",
        "use_cache": False,
        "vocab_size": 88,
    }
    config.update(changes)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    kv_width = config["num_key_value_heads"] * width // heads
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}

    def mlp(name, channels):
        shapes[f"{name}.gate_proj.weight"] = (channels, width)
        shapes[f"{name}.up_proj.weight"] = (channels, width)
        shapes[f"{name}.down_proj.weight"] = (width, channels)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in (("q", width), ("k", kv_width), ("v", kv_width), ("o", width)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, width)
            if config["attention_bias"]:
                shapes[f"{layer}.self_attn.{name}_proj.bias"] = (rows,)
        if config["qk_layernorm"]:
            shapes[f"{layer}.self_attn.q_norm.weight"] = shapes[f"{layer}.self_attn.k_norm.weight"] = (width // heads,)
        if config["moe_layer_freq"][i]:
            count = experts[i] if experts else config["num_experts"]
            shapes[f"{layer}.mlp.gate.weight"] = (count, width)
            for j in range(count):
                mlp(f"{layer}.mlp.experts.{j}", config["expert_intermediate_size"])
        else:
            mlp(f"{layer}.mlp", config["dense_intermediate_size"])
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    for key in drop:
        del config[key]
    return _write(folder, config, shapes, ("configuration_lladamoe.py", "modeling_lladamoe.py"), seed)


def write_llada2(folder, *, seed=0, drop=(), experts=None, **changes):
    """Write a LLaDA2 checkpoint; ``changes`` are keys of config.json, ``drop`` are keys to leave out.

    ``experts`` gives each layer a number of its own, 0 to a dense one, which config.json says as after expert pruning.
    """
    config = {
        "architectures": ["LLaDA2MoeModelLM"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
            "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
            "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
        },
        "block_length": 4,
        "embedding_dropout": 0.0,
        "eos_token_id": 1,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 72,
        "mask_token_id": 2,
        "max_position_embeddings": 128,
        "model_type": "llada2_moe",
        "moe_intermediate_size": 32,
        "moe_router_enable_expert_bias": True,
        "n_group": 4,
        "norm_head": False,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_shared_experts": 1,
        "output_dropout": 0.0,
        "pad_token_id": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 600000,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "topk_group": 2,
        "transformers_version": "4.53.2",
        "use_bias": False,
        "use_cache": False,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "use_sliding_window": False,
        "vocab_size": 88,
    }
    config.update(changes)
    width, head = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.word_embeddings.weight": (config["vocab_size"], width), "model.norm.weight": (width,)}

    def mlp(name, channels):
        shapes[f"{name}.gate_proj.weight"] = (channels, width)
        shapes[f"{name}.up_proj.weight"] = (channels, width)
        shapes[f"{name}.down_proj.weight"] = (width, channels)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        rows = (heads + 2 * kv_heads) * head
        shapes[f"{layer}.attention.query_key_value.weight"] = (rows, width)
        shapes[f"{layer}.attention.dense.weight"] = (width, heads * head)
        if config["use_qkv_bias"]:
            shapes[f"{layer}.attention.query_key_value.bias"] = (rows,)
        if config["use_bias"]:
            shapes[f"{layer}.attention.dense.bias"] = (width,)
        for norm in ("query_layernorm", "key_layernorm"):
            shapes[f"{layer}.attention.{norm}.weight"] = (head,)
        if i < config["first_k_dense_replace"]:
            mlp(f"{layer}.mlp", config["intermediate_size"])
        else:
            count = experts[i] if experts else config["num_experts"]
            shapes[f"{layer}.mlp.gate.weight"] = (count, width)
            # Standard deviation 0.1, of the size of differences between the sigmoid scores: it changes choices.
            shapes[f"{layer}.mlp.gate.expert_bias"] = (count,)
            for j in range(count):
                mlp(f"{layer}.mlp.experts.{j}", config["moe_intermediate_size"])
            if config["num_shared_experts"]:
                mlp(f"{layer}.mlp.shared_experts", config["num_shared_experts"] * config["moe_intermediate_size"])
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    if experts:
        sizes = {"attention_heads": heads, "key_value_heads": kv_heads}
        dense = {"mlp_channels": config["intermediate_size"], **sizes}
        routed = {"mlp_channels": config["moe_intermediate_size"], **sizes}
        config["sinkprune_block_sizes"] = [{**routed, "experts": count} if count else dense for count in experts]
        config["hidden_act"] += " with sinkprune_block_sizes (load it with sinkprune-plugin)"
    for key in drop:
        del config[key]
    return _write(folder, config, shapes, ("configuration_llada2_moe.py", "modeling_llada2_moe.py"), seed)


def write_dream_tokenizer(folder):
    """The files of the official repository: no tokenizer.json, and a Python file named by auto_map."""
    alphabet = ["<|endoftext|>", "<|mask|>", "a", "b", "c", "Ġ", "ab", "Ġa"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(alphabet)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n")
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {
            "0": {"content": "<|endoftext|>", **special},
            "1": {"content": "<|mask|>", **special},
        },
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "DreamTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_dream.py").write_text(f"open({str(folder / TRACE)!r}, 'w').write(__name__)\n")

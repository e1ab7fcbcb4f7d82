"""The plainest forward passes of the networks, written from the tensors' names alone: the tests' reference.

Nothing of the package is imported here. Rotation is multiplication by exp(i · angle) of the complex numbers whose real
and imaginary parts lie half a head apart; attention is an explicit softmax.
"""

import torch

__all__ = ["plain_dream", "plain_llada", "plain_llada_moe"]


def _linear(tensors, name, x):
    y = x @ tensors[f"{name}.weight"].float().T
    bias = tensors.get(f"{name}.bias")
    return y if bias is None else y + bias.float()


def _rms_norm(tensors, name, x, eps):
    x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    if f"{name}.weight" in tensors:
        x = x * tensors[f"{name}.weight"].float()
    if f"{name}.bias" in tensors:
        x = x + tensors[f"{name}.bias"].float()
    return x


def _rotate(x, theta, positions):
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = positions.float()[:, None, :, None] * frequency
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


def _attention(q, k, v, heads, kv_heads, theta, valid, positions):
    def split(x, n):
        return x.reshape(*x.shape[:2], n, -1).permute(0, 2, 1, 3)

    q, k, v = split(q, heads), split(k, kv_heads), split(v, kv_heads)
    q, k = _rotate(q, theta, positions), _rotate(k, theta, positions)
    # query head h uses key head h // (heads / kv_heads)
    share = torch.arange(heads) // (heads // kv_heads)
    score = q @ k[:, share].transpose(-1, -2) / q.shape[-1] ** 0.5
    score = score.masked_fill(~valid[:, None, None, :], float("-inf"))
    out = score.softmax(-1) @ v[:, share]
    return out.permute(0, 2, 1, 3).flatten(2)


def _defaults(input_ids, valid, positions):
    valid = torch.ones_like(input_ids, dtype=torch.bool) if valid is None else valid.bool()
    positions = torch.arange(input_ids.shape[1])[None] if positions is None else positions
    return valid, positions


def plain_llada(tensors, config, input_ids, valid=None, positions=None):
    """(B, T) ids → (B, T, V) float32 logits.

    ``config`` is the parsed config.json; biases are applied where the tensors have them.
    """
    valid, positions = _defaults(input_ids, valid, positions)
    heads, theta, eps = config["n_heads"], config["rope_theta"], config["rms_norm_eps"]
    kv_heads = config["n_kv_heads"] or (1 if config.get("multi_query_attention") else heads)
    act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.relu}
    root = "model.transformer"
    x = tensors[f"{root}.wte.weight"].float()[input_ids]
    for i in range(config["n_layers"]):
        block = f"{root}.blocks.{i}"
        y = _rms_norm(tensors, f"{block}.attn_norm", x, eps)
        q, k, v = (_linear(tensors, f"{block}.{n}_proj", y) for n in "qkv")
        heads_out = _attention(q, k, v, heads, kv_heads, theta, valid, positions)
        x = x + _linear(tensors, f"{block}.attn_out", heads_out)
        y = _rms_norm(tensors, f"{block}.ff_norm", x, eps)
        gate = act[config["activation_type"]](_linear(tensors, f"{block}.ff_proj", y))
        x = x + _linear(tensors, f"{block}.ff_out", gate * _linear(tensors, f"{block}.up_proj", y))
    x = _rms_norm(tensors, f"{root}.ln_f", x, eps)
    return _linear(tensors, f"{root}.wte" if config["weight_tying"] else f"{root}.ff_out", x)


def plain_dream(tensors, config, input_ids, valid=None, positions=None):
    """(B, T) ids → (B, T, V) float32 logits; ``config`` is the parsed config.json."""
    valid, positions = _defaults(input_ids, valid, positions)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    theta, eps = config["rope_theta"], config["rms_norm_eps"]
    x = tensors["model.embed_tokens.weight"].float()[input_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = _rms_norm(tensors, f"{layer}.input_layernorm", x, eps)
        q, k, v = (_linear(tensors, f"{layer}.self_attn.{n}_proj", y) for n in "qkv")
        heads_out = _attention(q, k, v, heads, kv_heads, theta, valid, positions)
        x = x + _linear(tensors, f"{layer}.self_attn.o_proj", heads_out)
        y = _rms_norm(tensors, f"{layer}.post_attention_layernorm", x, eps)
        gate = torch.nn.functional.silu(_linear(tensors, f"{layer}.mlp.gate_proj", y))
        x = x + _linear(tensors, f"{layer}.mlp.down_proj", gate * _linear(tensors, f"{layer}.mlp.up_proj", y))
    x = _rms_norm(tensors, "model.norm", x, eps)
    return _linear(tensors, "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head", x)


def _gated_mlp(tensors, name, x):
    gate = torch.nn.functional.silu(_linear(tensors, f"{name}.gate_proj", x))
    return _linear(tensors, f"{name}.down_proj", gate * _linear(tensors, f"{name}.up_proj", x))


def plain_llada_moe(tensors, config, input_ids, valid=None, positions=None):
    """(B, T) ids → (B, T, V) float32 logits; every expert sees every token, those not chosen with weight zero."""
    valid, positions = _defaults(input_ids, valid, positions)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    theta, eps = config["rope_theta"], config["rms_norm_eps"]
    x = tensors["model.embed_tokens.weight"].float()[input_ids]

    def head_norm(name, q):
        if f"{name}.weight" not in tensors:
            return q
        return _rms_norm(tensors, name, q.unflatten(-1, (-1, x.shape[-1] // heads)), eps).flatten(-2)

    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = _rms_norm(tensors, f"{layer}.input_layernorm", x, eps)
        q, k, v = (_linear(tensors, f"{layer}.self_attn.{n}_proj", y) for n in "qkv")
        q, k = head_norm(f"{layer}.self_attn.q_norm", q), head_norm(f"{layer}.self_attn.k_norm", k)
        heads_out = _attention(q, k, v, heads, kv_heads, theta, valid, positions)
        x = x + _linear(tensors, f"{layer}.self_attn.o_proj", heads_out)
        y = _rms_norm(tensors, f"{layer}.post_attention_layernorm", x, eps)
        if f"{layer}.mlp.gate.weight" not in tensors:
            x = x + _gated_mlp(tensors, f"{layer}.mlp", y)
            continue
        probability = _linear(tensors, f"{layer}.mlp.gate", y).softmax(-1)
        # The k-th largest probability is the least that is still chosen; ties don't occur in random floats.
        least = probability.sort(-1, descending=True).values[..., config["num_experts_per_tok"] - 1, None]
        weight = probability * (probability >= least)
        for j in range(probability.shape[-1]):
            x = x + weight[..., j, None] * _gated_mlp(tensors, f"{layer}.mlp.experts.{j}", y)
    x = _rms_norm(tensors, "model.norm", x, eps)
    return _linear(tensors, "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head", x)

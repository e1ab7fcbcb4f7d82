"""The plainest forward pass of Nemotron-Labs-Diffusion, written from the tensors' names and the papers' formulas.

Nothing of the package is imported here. Attention goes query by query over the list of keys that it may see.
"""

import math

import torch
from plain_forward import _linear, _rms_norm

__all__ = ["generation_visible", "plain_nemotron_labs"]


def frequencies(width, rope):
    """YaRN, frequency by frequency: unchanged where it turns more than beta_fast times over the original length,
    divided by the factor where it turns less than beta_slow times, and linear in the index between."""
    theta, original = rope["rope_theta"], rope.get("original_max_position_embeddings")
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    if rope["rope_type"] == "default":
        return torch.tensor(plain), 1.0

    def index_of(turns):
        # turns = original / wavelength, wavelength = 2π theta^(2i / width)
        return width / 2 * math.log(original / (2 * math.pi * turns)) / math.log(theta)

    low = max(math.floor(index_of(rope["beta_fast"])), 0)
    high = min(math.ceil(index_of(rope["beta_slow"])), width - 1)
    result = []
    for i, frequency in enumerate(plain):
        share = min(max((i - low) / ((high - low) or 0.001), 0), 1)
        result.append((1 - share) * frequency + share * frequency / rope["factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        numbers = [0.1 * rope[name] * math.log(rope["factor"]) + 1 for name in ("mscale", "mscale_all_dim")]
        magnitude = numbers[0] / numbers[1]
    else:
        magnitude = 0.1 * math.log(rope["factor"]) + 1
    return torch.tensor(result), magnitude


def generation_visible(length, block):
    """Keys that each query may see while the last ``block`` tokens are denoised: a list of lists."""
    begin = length - block
    return [list(range(q + 1)) if q < begin else list(range(length)) for q in range(length)]


def plain_nemotron_labs(tensors, config, input_ids, visible, positions=None):
    """(T,) ids → (T, V) float32 logits; ``visible[q]`` are the keys that query q sees; ``config`` is config.json's."""
    length = len(input_ids)
    positions = torch.arange(length) if positions is None else positions
    heads, kv_heads, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    rope, eps = config["rope_parameters"], config["rms_norm_eps"]
    frequency, magnitude = frequencies(width, rope)
    turn = torch.polar(torch.full((length, width // 2), magnitude), positions[:, None].float() * frequency)
    beta, original = rope.get("llama_4_scaling_beta", 0.0), rope.get("original_max_position_embeddings", 1)
    scale = torch.tensor([1 + beta * math.log(1 + int(p) // original) for p in positions])

    def rotated(x):
        x = x.unflatten(-1, (-1, width)).transpose(0, 1)
        z = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    x = tensors["encoder.embed_tokens.weight"].float()[input_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{i}"
        y = _rms_norm(tensors, f"{layer}.input_layernorm", x, eps)
        q = rotated(_linear(tensors, f"{layer}.self_attn.q_proj", y)) * scale[:, None]
        k = rotated(_linear(tensors, f"{layer}.self_attn.k_proj", y))
        v = _linear(tensors, f"{layer}.self_attn.v_proj", y).unflatten(-1, (-1, width)).transpose(0, 1)
        rows = []
        for query, keys in enumerate(visible):
            parts = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                weights = (k[group, keys] @ q[head, query] / math.sqrt(width)).softmax(0)
                parts.append(weights @ v[group, keys])
            rows.append(torch.cat(parts))
        x = x + _linear(tensors, f"{layer}.self_attn.o_proj", torch.stack(rows))
        y = _rms_norm(tensors, f"{layer}.post_attention_layernorm", x, eps)
        gate = torch.nn.functional.silu(_linear(tensors, f"{layer}.mlp.gate_proj", y))
        x = x + _linear(tensors, f"{layer}.mlp.down_proj", gate * _linear(tensors, f"{layer}.mlp.up_proj", y))
    x = _rms_norm(tensors, "encoder.norm", x, eps)
    return _linear(tensors, "encoder.embed_tokens" if config["tie_word_embeddings"] else "diffusion_head", x)

"""The plainest forward pass of LLaDA2, written from the tensors' names and the papers' formulas.

Nothing of the package is imported here. Attention and routing go token by token.
"""

import torch
from plain_forward import _gated_mlp, _linear, _rms_norm

__all__ = ["attend_visible", "block_visible", "plain_llada2", "rotated"]


def block_visible(length, block):
    """Keys that each query sees: all blocks up to its own, counted from the first token."""
    return [list(range(min((query // block + 1) * block, length))) for query in range(length)]


def rotated(x, width, theta, positions=None):
    """(T, heads, head_dim): the first ``width`` elements of each head turned, pairs half of that apart."""
    half = width // 2
    positions = torch.arange(len(x)) if positions is None else positions
    angle = positions[:, None] * theta ** (-torch.arange(half, dtype=torch.float32) / half)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    z = torch.complex(x[..., :half], x[..., half:width]) * turn
    return torch.cat((z.real, z.imag, x[..., width:]), dim=-1)


def attend_visible(q, k, v, visible):
    """(T, heads, head_dim) queries, (T, kv_heads, head_dim) keys and values → (T, heads · head_dim), one by one."""
    groups = q.shape[1] // k.shape[1]
    rows = []
    for query, keys in enumerate(visible):
        parts = []
        for number in range(q.shape[1]):
            weights = (k[keys, number // groups] @ q[query, number] / q.shape[2] ** 0.5).softmax(0)
            parts.append(weights @ v[keys, number // groups])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def _routed(tensors, mlp, config, token):
    """(d,) → Σ of the chosen experts and the shared one."""
    scores = (tensors[f"{mlp}.gate.weight"].float() @ token).sigmoid()
    biased = scores + tensors[f"{mlp}.gate.expert_bias"]
    share = len(scores) // config["n_group"]
    groups = [range(g * share, (g + 1) * share) for g in range(config["n_group"])]
    rank = [sum(sorted((biased[e].item() for e in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(len(groups)), key=lambda g: -rank[g])[: config["topk_group"]]
    open_to_it = [e for g in best for e in groups[g]]
    chosen = sorted(open_to_it, key=lambda e: -biased[e].item())[: config["num_experts_per_tok"]]
    total = sum(scores[e] for e in chosen) if len(chosen) > 1 else 1.0
    output = sum(
        config["routed_scaling_factor"] * scores[e] / total * _gated_mlp(tensors, f"{mlp}.experts.{e}", token)
        for e in chosen
    )
    shared = f"{mlp}.shared_experts"
    return output + (_gated_mlp(tensors, shared, token) if f"{shared}.up_proj.weight" in tensors else 0)


def plain_llada2(tensors, config, input_ids, visible):
    """(T,) ids → (T, V) float32 logits; ``visible[q]`` are the keys that query q sees; ``config`` is config.json's."""
    heads, kv_heads, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    eps, rotary = config["rms_norm_eps"], int(head * config["partial_rotary_factor"])
    x = tensors["model.word_embeddings.weight"].float()[input_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        y = _rms_norm(tensors, f"{layer}.input_layernorm", x, eps)
        qkv = _linear(tensors, f"{layer}.attention.query_key_value", y).unflatten(-1, (-1, head))
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
        q = rotated(_rms_norm(tensors, f"{layer}.attention.query_layernorm", q, eps), rotary, config["rope_theta"])
        k = rotated(_rms_norm(tensors, f"{layer}.attention.key_layernorm", k, eps), rotary, config["rope_theta"])
        attended = attend_visible(q, k, v, visible)
        x = x + _linear(tensors, f"{layer}.attention.dense", attended)
        y = _rms_norm(tensors, f"{layer}.post_attention_layernorm", x, eps)
        if f"{layer}.mlp.gate.weight" in tensors:
            x = x + torch.stack([_routed(tensors, f"{layer}.mlp", config, token) for token in y])
        else:
            x = x + _gated_mlp(tensors, f"{layer}.mlp", y)
    x = _rms_norm(tensors, "model.norm", x, eps)
    return _linear(tensors, "model.word_embeddings" if config["tie_word_embeddings"] else "lm_head", x)

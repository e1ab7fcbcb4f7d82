"""The plainest forward pass of SDAR, written from the tensors' names and the papers' formulas.

Nothing of the package is imported here.
"""

from plain_forward import _gated_mlp, _linear, _rms_norm
from plain_llada2 import attend_visible, rotated

__all__ = ["plain_sdar"]


def plain_sdar(tensors, config, input_ids, visible, positions=None):
    """(T,) ids → (T, V) float32 logits; ``visible[q]`` are the keys that query q sees; ``config`` is config.json's."""
    head, eps, theta = config["head_dim"], config["rms_norm_eps"], config["rope_theta"]
    x = tensors["model.embed_tokens.weight"].float()[input_ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        attention = f"{layer}.self_attn"
        y = _rms_norm(tensors, f"{layer}.input_layernorm", x, eps)
        q, k, v = (_linear(tensors, f"{attention}.{name}_proj", y).unflatten(-1, (-1, head)) for name in "qkv")
        q = rotated(_rms_norm(tensors, f"{attention}.q_norm", q, eps), head, theta, positions)
        k = rotated(_rms_norm(tensors, f"{attention}.k_norm", k, eps), head, theta, positions)
        x = x + _linear(tensors, f"{attention}.o_proj", attend_visible(q, k, v, visible))
        y = _rms_norm(tensors, f"{layer}.post_attention_layernorm", x, eps)
        x = x + _gated_mlp(tensors, f"{layer}.mlp", y)
    x = _rms_norm(tensors, "model.norm", x, eps)
    return _linear(tensors, "model.embed_tokens" if config["tie_word_embeddings"] else "lm_head", x)

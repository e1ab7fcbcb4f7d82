"""Observing transformers models whose attention goes through its AttentionInterface but not through torch's SDPA."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sinks.attention_mass import report_attention

__all__ = ["intercept_attention_interface"]

# Only the kernel knows how these change the scores.
_UNOBSERVABLE = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q")


@contextmanager
def intercept_attention_interface() -> Iterator[None]:
    """Make eager, flash and flex attention of transformers models visible to :func:`capture_attention_mass`.

    Each implementation in transformers' ``AttentionInterface`` is replaced, through its ``register``, by a wrapper
    that reports queries, keys and mask and then runs the original; on leaving, the originals are restored. SDPA needs
    none of this. ::

        with intercept_attention_interface(), capture_attention_mass() as capture:
            model(input_ids=input_ids)

    :raises UsageError: during the run, where a kernel's argument (soft cap, block mask …) can't be followed
    """
    from transformers import AttentionInterface

    originals = {
        name: function
        for name, function in AttentionInterface._global_mapping.items()
        if name != "sdpa" and not name.startswith("paged|")
    }
    for name, function in originals.items():
        AttentionInterface.register(name, _observed(name, function))
    # Eager attention has no entry of its own: the interface falls back to the function in the model's module, unless
    # something is registered under the name.
    if "eager" not in originals:
        AttentionInterface.register("eager", _observed("eager", _module_eager_attention))
    try:
        yield
    finally:
        AttentionInterface._global_mapping.update(originals)
        if "eager" not in originals:
            AttentionInterface._global_mapping.pop("eager", None)


def _observed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        mask, is_causal = _scores_mask(name, module, query, key, attention_mask, kwargs)
        return report_attention(
            query,
            key,
            attn_mask=mask,
            is_causal=is_causal,
            scale=kwargs.get("scaling"),
            attend=lambda: function(module, query, key, value, attention_mask, *args, **kwargs),
        )

    return attention


def _module_eager_attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    source = sys.modules[type(module).__module__]
    eager = getattr(source, "eager_attention_forward", None)
    if eager is None:
        raise UsageError(
            f"{type(module).__name__} has no eager_attention_forward next to it that could be observed; load the model "
            'with attn_implementation="sdpa"'
        )
    return eager(module, *args, **kwargs)


def _scores_mask(
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: Any,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor | None, bool]:
    """Translate an implementation's mask into the arguments of ``scaled_dot_product_attention``.

    :return: mask that broadcasts to (B, H, Tq, Tk) or None, and whether attention is causal in addition
    """
    unobservable = [option for option in _UNOBSERVABLE if kwargs.get(option) is not None]
    # Eager attention has the window in its mask, the other kernels apply it themselves.
    window = kwargs.get("sliding_window")
    if name != "eager" and window is not None and window < key.shape[2]:
        unobservable.append("sliding_window")
    if not (attention_mask is None or isinstance(attention_mask, torch.Tensor)):
        unobservable.append(type(attention_mask).__name__)
    if unobservable:
        raise UsageError(
            f"{name} attention of {type(module).__name__} uses {', '.join(unobservable)}, which can't be followed from "
            'outside; load the model with attn_implementation="sdpa"'
        )
    # A four-dimensional mask is complete. Without one, eager and flex attention look in both directions.
    if name in ("eager", "flex_attention") or (attention_mask is not None and attention_mask.dim() == 4):
        return attention_mask, False
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if attention_mask is not None:
        # Flash attention gets the (B, T) padding mask of the tokenizer and applies causality itself.
        attention_mask = attention_mask[:, None, None, :].to(device=query.device, dtype=torch.bool)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if is_causal and num_queries != num_keys:
        # These kernels align the triangle with the last key, torch's is_causal with the first.
        triangle = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        triangle = triangle.tril(num_keys - num_queries)
        return triangle if attention_mask is None else attention_mask & triangle, False
    return attention_mask, is_causal

"""Capture of the attention mass of a running model, independent of its modelling code."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.sinks.column_sums import attention_column_sums, uniform_column_sums

__all__ = ["AttentionCapture", "capture_attention_mass", "report_attention"]

_NOTHING_SEEN = (
    "no attention was intercepted: the model doesn't call torch's scaled_dot_product_attention; load it with "
    'attn_implementation="sdpa", or wrap the run in sinkprune_plugin.sinks.intercept_attention_interface() '
    "(a model that computes its own softmax can call sinkprune_plugin.sinks.report_attention)"
)


class AttentionCapture(TorchFunctionMode):
    """What :func:`capture_attention_mass` returns; while it is entered, every attention call adds to the mass."""

    def __init__(
        self, valid: torch.Tensor | None = None, block_size: int | None = None, *, relative: bool = False
    ) -> None:
        super().__init__()
        self._relative = relative
        # Of the last mask: all layers of a model are called with the same one.
        self._uniform: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self._valid = valid
        self._block_size = block_size
        self._layers: list[torch.Tensor] = []
        self._mass: torch.Tensor | None = None
        self._intercepted = False

    @property
    def mass(self) -> torch.Tensor:
        """(B, T) float32: attention mass of each key position, summed over the layers seen since the last reset.

        It can be read between two layers, in a hook, and the tensor that was returned doesn't change later.

        :raises UsageError: if no attention has been intercepted yet
        """
        if self._mass is None:
            raise UsageError(_NOTHING_SEEN)
        return self._mass

    @property
    def layers(self) -> list[torch.Tensor]:
        """One (B, T) float32 tensor for each attention call since the last reset, in the order of the calls."""
        return self._layers

    def reset(self, valid: torch.Tensor | None = None) -> None:
        """Forget the mass, before another forward pass.

        :param valid: (B, T) bool of the next batch; None if it has no padding
        """
        self._valid = valid
        self._layers = []
        self._mass = None
        self._uniform = (None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Intercept every torch function call; torch disables this mode while the method runs."""
        del types
        kwargs = kwargs or {}
        # The model's own call first: if it is wrong, its own error is the one to show.
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._observe(*_sdpa_arguments(*args, **kwargs))
        elif func is report_attention:
            self._observe(*_reported_arguments(*args, **kwargs))
        return result

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        """Stop capturing; unless another error is being raised, raise one if nothing was captured."""
        super().__exit__(exc_type, exc_val, exc_tb)
        if exc_type is None and not self._intercepted:
            raise UsageError(_NOTHING_SEEN)

    def _observe(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> None:
        self._intercepted = True
        shape = (key.shape[0], key.shape[-2])
        if self._mass is not None and self._mass.shape != shape:
            raise UsageError(
                f"an attention call has keys of shape {shape} (batch, tokens) after calls with "
                f"{tuple(self._mass.shape)}: cross-attention or a growing cache can't be added up; capture one forward "
                "pass at a time (use_cache=False, or capture.reset() between passes)"
            )
        valid = None if self._valid is None else self._valid.to(device=query.device, dtype=torch.bool)
        layer = attention_column_sums(
            query,
            key,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            valid=valid,
            block_size=self._block_size,
        )
        if self._relative:
            layer = self._relative_to_uniform(layer, query, attn_mask, valid, is_causal=is_causal)
        self._layers.append(layer)
        # Not in place: what a hook has read stays unchanged. For a model spread over devices, sums are on the first
        # one's device.
        self._mass = layer if self._mass is None else self._mass + layer.to(self._mass.device)

    def _relative_to_uniform(
        self,
        layer: torch.Tensor,
        query: torch.Tensor,
        attn_mask: torch.Tensor | None,
        valid: torch.Tensor | None,
        *,
        is_causal: bool,
    ) -> torch.Tensor:
        if attn_mask is None or self._uniform[0] is not attn_mask:
            keys = layer.shape[-1]
            uniform = uniform_column_sums(query.shape[-2], keys, attn_mask, valid, is_causal=is_causal)
            self._uniform = attn_mask, uniform
        uniform = self._uniform[1]
        return layer if uniform is None else layer / uniform.to(layer.device)


def capture_attention_mass(
    valid: torch.Tensor | None = None, *, block_size: int | None = None, relative: bool = False
) -> AttentionCapture:
    """Capture the attention mass that each key position receives while a model runs.

    Source: "Sink-Aware Pruning for Diffusion Language Models" (arXiv 2602.17664), section 3: attention probabilities
    summed over layers, heads and queries. Every call of ``torch.nn.functional.scaled_dot_product_attention`` on this
    thread is seen, with queries and keys after rotary embedding; the model itself is not changed. ::

        with capture_attention_mass() as capture:
            model(input_ids=input_ids)
        capture.mass  # (B, T) float32

    :param valid: (B, T) bool, False on padding: padding is neither counted as a query nor as a key
    :param block_size: queries computed at once, see :func:`attention_column_sums`; default: by memory
    :param relative: each key's mass over that of uniform attention, see :func:`uniform_column_sums`: the mass itself
        where all queries see all keys, and where they don't, what is left when that alone gives no key more
    :return: context manager with ``mass``, ``layers`` and ``reset()``
    :raises UsageError: on leaving, if no attention was intercepted; during the run, if calls can't be added up
    """
    return AttentionCapture(valid, block_size, relative=relative)


def report_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    attend: Callable[[], Any] | None = None,
) -> Any:
    """Report an attention that doesn't go through torch's own function to the captures around this call.

    For modelling code that computes its softmax by hand: one added line makes the model observable. Without a capture
    it does nothing.

    :param query: (B, H, Tq, D), after rotary embedding
    :param key: (B, Hkv, Tk, D)
    :param attn_mask: as in ``scaled_dot_product_attention``
    :param is_causal: query i sees keys 0 … i
    :param scale: factor on the scores; default 1/√D
    :param attend: computes the attention itself; run with the captures off, so that nothing is counted twice
    :return: what ``attend`` returns; None without it
    """
    if has_torch_function((query, key)):
        return handle_torch_function(
            report_attention,
            (query, key),
            query,
            key,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            attend=attend,
        )
    return None if attend is None else attend()


def _sdpa_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, bool, float | None]:
    """Bind positional and keyword arguments as torch does; grouped heads show in the shapes, dropout isn't mass."""
    del value, dropout_p, enable_gqa
    return query, key, attn_mask, is_causal, scale


def _reported_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    attend: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, bool, float | None]:
    del attend
    return query, key, attn_mask, is_causal, scale

"""Keys and values kept between denoising steps, for any model that calls torch's scaled_dot_product_attention.

It works by interception, like the capture of attention mass: the model's code is unchanged and unaware of the cache.
"""

from types import TracebackType
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sinkprune_plugin.errors import UsageError

__all__ = ["KeyValueCache"]


class KeyValueCache:
    """Keys and values of each attention call of a model, over the positions of one canvas.

    :param length: positions of prompt and canvas, T
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def computing(self, begin: int, end: int, *, visible: int | None = None) -> "_Interception":
        """Context in which the model is called for positions [begin, end) only.

        Attention then covers the kept positions [0, begin), to the query's own [begin, end) and to the kept [end,
        visible). What the query computes is kept.

        :param begin: first position of the input
        :param end: position after its last
        :param visible: position after the last that attention sees; None for ``end``
        :return: the context
        """
        return _Interception(self, begin, end, end if visible is None else visible)

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drop all but some sequences of the batch.

        :param rows: (B',) int64
        """
        self._keys = [keys[rows] for keys in self._keys]
        self._values = [values[rows] for values in self._values]

    def _exchange(self, call: int, new: torch.Tensor, kept: list[torch.Tensor], span: tuple[int, int, int]) -> Any:
        begin, end, visible = span
        if call == len(kept):
            kept.append(new.new_zeros(*new.shape[:2], self._length, new.shape[3]))
        whole = kept[call]
        whole[:, :, begin:end] = new
        return whole[:, :, :visible]


class _Interception(TorchFunctionMode):
    def __init__(self, cache: KeyValueCache, begin: int, end: int, visible: int) -> None:
        super().__init__()
        self._cache = cache
        self._span = (begin, end, visible)
        self._call = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        call = dict(zip(names, args, strict=False)) | kwargs
        call["attn_mask"] = self._mask(call)
        cache = self._cache
        call["key"] = cache._exchange(self._call, call["key"], cache._keys, self._span)
        call["value"] = cache._exchange(self._call, call["value"], cache._values, self._span)
        self._call += 1
        return func(**call)

    def _mask(self, call: dict[str, Any]) -> torch.Tensor | None:
        """The mask over the query's own positions, extended to those that are kept, which it sees all."""
        mask, length = call.get("attn_mask"), call["query"].shape[2]
        if mask is None and not call.get("is_causal"):
            return None
        begin, end, visible = self._span
        own = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.shape[2:] == (length, length)
        if not own or visible != end:
            raise UsageError(
                "keys and values can be kept only where attention has no mask, or one between the tokens of the query; "
                "use cache none"
            )
        assert mask is not None
        return F.pad(mask, (begin, 0), value=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is None and self._call == 0:
            raise UsageError(
                "this model doesn't call scaled_dot_product_attention, so keys and values can't be kept; load it "
                'with attn_implementation="sdpa" or use cache none'
            )

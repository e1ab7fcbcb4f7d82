"""What the weight conversions of one ``from_pretrained`` call share: format, headers, dtypes, and what went wrong."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers.distributed.utils import is_dtensor

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.codecs.format_names import CheckpointFormat
from sinkprune_plugin.formats.files.part_groups import PartGroups
from sinkprune_plugin.formats.files.stored_weights import CODECS

__all__ = ["LoadContext"]

# Quantized values keep their own dtype: casting int8 or fp8 to the model's dtype would drop their scale.
_CASTABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


class LoadContext:
    """What the conversions of one ``from_pretrained`` call share, and what they found wrong.

    :param sparse_format: the format its config.json names
    :param groups: what the checkpoint's headers say
    :param dtype: the model's dtype
    :param dtype_plan: regular expression → dtype, for parameters the model keeps in another dtype
    """

    def __init__(
        self,
        sparse_format: CheckpointFormat,
        groups: PartGroups,
        dtype: torch.dtype | None,
        dtype_plan: Mapping[str, Any],
    ) -> None:
        self.sparse_format = sparse_format
        self.groups = groups
        self.dtype = dtype
        self.errors: list[UsageError] = []
        self._whole: bool | None = None
        self._plan = [(re.compile(pattern.replace("*", ".*")), kept) for pattern, kept in dtype_plan.items()]
        self._files = {name: parts["compressed"].file.name for name, parts in groups.sparse.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoadContext":
        # The loader copies a converter for each tensor; errors must be collected in one place.
        return self

    @property
    def casts(self) -> bool:
        """Whether a plain tensor is stored in another float dtype than the model's."""
        if self.dtype is None and not self._plan:
            return False
        floats = {entry.dtype for entry in self.groups.plain.values()} & set(_SAFETENSORS_DTYPES.values())
        own = {_SAFETENSORS_DTYPES[self.dtype]} if self.dtype in _SAFETENSORS_DTYPES else set()
        return bool(self._plan) or bool(floats - own)

    def refuse_sharded(self, model: Any) -> None:
        """Refuse a model whose parameters are spread over processes: the loader would cut the parts like the weight.

        :raises UsageError: with the remedy
        """
        if self._whole is None:
            self._whole = not any(is_dtensor(weight) for weight in model.parameters())
        if not self._whole:
            raise UsageError(
                f"{self.sparse_format} can't be loaded with tensor parallelism (tp_plan, distributed_config); "
                "convert the checkpoint to dense first, with sinkprune convert --to dense"
            )

    def cast(self, tensor: torch.Tensor, name: str, model: Any) -> torch.Tensor:
        """Bring a tensor to the dtype that the named parameter has or keeps."""
        wanted = next((kept for pattern, kept in self._plan if pattern.search(name)), None)
        if wanted is None:
            wanted = model.get_parameter_or_buffer(name).dtype
        return tensor.to(wanted) if tensor.dtype in _CASTABLE and wanted in _CASTABLE else tensor

    def decompress(self, parts: Mapping[str, torch.Tensor], name: str, model: Any) -> torch.Tensor:
        """One weight from its parts, in the dtype the parameter wants.

        :param parts: local name → tensor
        :param name: the parameter's name in the model
        :param model: the model, on the meta device or not
        :raises UsageError: if the parts don't fit together
        """
        file = self._files.get(name)
        where = f"{name} ({file})" if file else name
        return self.cast(CODECS[self.sparse_format].decompress(parts, name=where), name, model)

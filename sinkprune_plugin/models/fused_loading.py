"""Fused experts in ``from_pretrained``: transformers' weight converters that give each expert its own weights."""

import re
from typing import Any

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform

from sinkprune_plugin.models.catalogue import Experts
from sinkprune_plugin.models.fused_experts import (
    find_fused,
    fused_layouts,
    refuse_unknown,
    split_fused,
    unknown_pattern,
)
from sinkprune_plugin.models.sizes_in_config import sizes_in_config

__all__ = ["ExpertsConverter", "register_fused_experts"]


class _Whole(ConversionOps):
    """No operation; a converter must have one."""

    def convert(self, input_dict: dict[str, Any], **_kwargs: Any) -> dict[str, Any]:
        """See the base class."""
        return input_dict


class ExpertsConverter(WeightConverter):
    """One fused tensor → the weights of all experts; or, for a layout that isn't understood, an error.

    :param source_pattern: regular expression that finds the tensor's name
    :param projection: first Linear whose rows it holds
    :param names: where the family's experts are
    """

    __slots__ = ("names",)

    def __init__(self, source_pattern: str, projection: str, names: Experts) -> None:
        # The loader collects tensors under the name of one parameter that they become.
        super().__init__([source_pattern], [f"{names.experts}.0.{projection}.weight"], [_Whole()])
        self.names = names

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExpertsConverter":
        # The loader makes a copy for each tensor.
        projection = self.target_patterns[0].split(".")[-2]
        return ExpertsConverter(self._original_source_patterns[0], projection, self.names)

    def reverse_transform(self) -> WeightTransform:
        """See the base class: nothing is undone when saving, so files have a module for each expert."""
        return WeightRenaming([r"(?!)"], ["unchanged"])

    @torch.no_grad()
    def convert(self, layer_name: str, model: Any = None, **_kwargs: Any) -> dict[str, torch.Tensor]:
        """See the base class.

        :raises UsageError: for a layout that isn't understood, or a shape that isn't the configuration's
        """
        stored = sorted(self.layer_targets[layer_name])[0]
        (tensor,) = self.materialize_tensors()[self.source_patterns[0]]
        fused = find_fused(stored, self.names)
        if fused is None:
            raise refuse_unknown(stored, tensor.shape, self.names)
        fused.check(tensor.shape, self.names, sizes_in_config(model.config)[fused.block], model.config.hidden_size)
        # In the model's spelling, which may have a prefix that the file lacks.
        experts = layer_name.rpartition(".0.")[0]
        result = {}
        for number, projection, weight in split_fused(tensor, fused.projections):
            name = f"{experts}.{number}.{projection}.weight"
            # A tensor of its own: views would keep all experts in memory when some are removed.
            result[name] = torch.empty_like(weight, dtype=model.get_parameter(name).dtype).copy_(weight)
        return result


def register_fused_experts(model_type: str, names: Experts) -> None:
    """Make transformers' loader understand the fused layouts for one family. Idempotent.

    :param model_type: of the family's models
    :param names: where the family's experts are
    """
    converters = [
        ExpertsConverter(rf"{re.escape(name)}$", projections[0], names)
        for name, projections in fused_layouts(names).items()
    ]
    unknown = ExpertsConverter(unknown_pattern(names), names.gate, names)
    # Anew for each load: a converter remembers whether it was used.
    register_checkpoint_conversion_mapping(model_type, [*converters, unknown], overwrite=True)

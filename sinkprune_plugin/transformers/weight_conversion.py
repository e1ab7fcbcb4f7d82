"""Weight conversions for transformers' loader: from the parts of a sparse weight to the dense weight.

The loader collects the tensors that a :class:`~transformers.core_model_loading.WeightConverter` renames to one
parameter, from whichever shards they lie in, and calls its operations parameter by parameter. So at most one weight at
a time exists both sparse and dense.
"""

import re
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, SkipParameters, WeightConverter

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.formats.files.part_groups import dense_name
from sinkprune_plugin.models.fused_loading import ExpertsConverter
from sinkprune_plugin.transformers.load_context import LoadContext

__all__ = ["add_sparse_conversions"]


class _PartsConverter(WeightConverter):
    """A converter that checks the model before the first tensor is read, when its distribution is known."""

    __slots__ = ("context", "model")

    def __init__(self, source_patterns: list[str], target_pattern: str, context: LoadContext, model: Any) -> None:
        super().__init__(source_patterns, [target_pattern], [DecompressWeight(context)])
        self.context = context
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightConverter:
        # The loader makes a copy for each tensor; what is copied must be without the model.
        return WeightConverter(
            list(self._original_source_patterns), list(self._original_target_patterns), list(self.operations)
        )

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """See the base class."""
        self.context.refuse_sharded(self.model)
        return super().rename_source_key(source_key)


class _MergingConverter(WeightConverter):
    """A model's own converter, with sparse sources: leaves it to the quantizer to raise the recorded errors."""

    __slots__ = ("context",)

    def convert(self, layer_name: str, *args: Any, loading_info: Any = None, **kwargs: Any) -> Any:
        """See the base class."""
        try:
            return super().convert(layer_name, *args, loading_info=loading_info, **kwargs)
        except SkipParameters:
            if self.context.errors and loading_info is not None:
                loading_info.conversion_errors.pop(layer_name, None)
            raise


class DecompressWeight(ConversionOps):
    """The parts of one weight → the weight."""

    def __init__(self, context: LoadContext) -> None:
        self.context = context

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],  # noqa: ARG002 - the loader's signature
        full_layer_name: str = "",
        model: Any = None,
        **_kwargs: Any,
    ) -> dict[str, Any]:
        """See the base class; a bad weight is recorded in the context and left out, hence never loaded."""
        wanted = self.context.sparse_format.parts
        parts = {
            part: input_dict[pattern][0]
            for part, pattern in zip(wanted, source_patterns, strict=True)
            if input_dict.get(pattern)
        }
        try:
            dense = self.context.decompress(parts, full_layer_name, model)
        except UsageError as error:
            # Raised here, the loader would bury it in a table and raise "some issues" instead.
            self.context.errors.append(error)
            return {}
        return {full_layer_name: dense}


class DecompressGroups(ConversionOps):
    """As :class:`DecompressWeight`, for the several weights that a model's own conversion merges (experts, fused QKV).

    :param stems: source pattern of a dense weight → patterns of its parts, in the order of the format's
    """

    def __init__(self, context: LoadContext, stems: dict[str, list[str]]) -> None:
        self.context = context
        self.stems = stems

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],  # noqa: ARG002 - the loader's signature
        target_patterns: list[str],  # noqa: ARG002 - the loader's signature
        full_layer_name: str = "",
        model: Any = None,
        **_kwargs: Any,
    ) -> dict[str, Any]:
        """See the base class."""
        wanted = self.context.sparse_format.parts
        for dense, patterns in self.stems.items():
            groups = [input_dict.pop(pattern, []) for pattern in patterns]
            if not any(groups):
                continue
            try:
                if dense in input_dict or len({len(group) for group in groups}) != 1:
                    raise UsageError(
                        f"{full_layer_name}: some of the weights merged into it are sparse and some dense, "
                        "which can't be told apart while loading; convert the checkpoint to dense first"
                    )
                input_dict[dense] = [
                    self.context.decompress(dict(zip(wanted, one, strict=True)), full_layer_name, model)
                    for one in zip(*groups, strict=True)
                ]
            except UsageError as error:
                self.context.errors.append(error)
                raise
        return input_dict


class CastPlain(ConversionOps):
    """Give a plain tensor the parameter's dtype.

    The loader leaves that to the conversions as soon as a quantizer is in play and the tensor has been renamed.

    :param rename: whether this is the only operation, which must name the target
    """

    def __init__(self, context: LoadContext, rename: bool) -> None:
        self.context = context
        self.rename = rename

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],  # noqa: ARG002 - the loader's signature
        target_patterns: list[str],  # noqa: ARG002 - the loader's signature
        full_layer_name: str = "",
        model: Any = None,
        **_kwargs: Any,
    ) -> dict[str, Any]:
        """See the base class."""
        cast = {}
        for key, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            cast[full_layer_name if self.rename else key] = self.context.cast(tensor, full_layer_name, model)
        return cast


def add_sparse_conversions(
    conversions: list[Any], context: LoadContext, model: Any
) -> tuple[list[Any], dict[int, Any], set[int]]:
    """Extend a model's weight conversions by those of a sparse checkpoint.

    :param conversions: the model's own, in order
    :param context: shared state of this load
    :param model: the model to load into
    :return: the conversions to load with; ``id`` of each rewritten one → the original, to save with; ``id`` of each
        added one, which saving must not invert
    """
    loading: list[Any] = []
    originals: dict[int, Any] = {}
    for conversion in conversions:
        # Fused experts are three-dimensional, hence never sparse, and their converter casts.
        whole = isinstance(conversion, ExpertsConverter) or not isinstance(conversion, WeightConverter)
        rewritten = conversion if whole else _rewrite(conversion, context)
        if rewritten is not conversion:
            originals[id(rewritten)] = conversion
        loading.append(rewritten)
    wanted = context.sparse_format.parts
    added: list[WeightConverter] = []
    if wanted:
        target = dense_name(r"\1", full_names=context.groups.full_names)
        added.append(_PartsConverter([rf"^(.+)\.{part}$" for part in wanted], target, context, model))
    if context.casts:
        added.append(WeightConverter([r"^(.+)$"], [r"\1"], [CastPlain(context, rename=True)]))
    return loading + added, originals, {id(converter) for converter in added}


def _rewrite(conversion: WeightConverter, context: LoadContext) -> WeightConverter:
    """Let a model's own converter accept sparse sources, and cast what it makes."""
    sources: list[str] = []
    stems: dict[str, list[str]] = {}
    groups = context.groups
    owners = [] if groups.full_names else [name.removesuffix(".weight") for name in groups.sparse]
    for pattern in conversion.source_patterns:
        stem = pattern.removesuffix("$").removesuffix(".weight")
        owned = re.compile(stem.replace("*.", r".*\.") + "$")
        if stem == pattern or not any(map(owned.search, owners)):
            sources.append(pattern)
            continue
        dense = f"{stem}.weight$"
        stems[dense] = [rf"{stem}\.{part}$" for part in context.sparse_format.parts]
        sources += [dense, *stems[dense]]
    operations = list(conversion.operations)
    if stems:
        operations.insert(0, DecompressGroups(context, stems))
    if context.casts:
        operations.append(CastPlain(context, rename=False))
    if len(operations) == len(conversion.operations):
        return conversion
    rewritten = _MergingConverter(sources, list(conversion._original_target_patterns), operations)
    rewritten.context = context
    rewritten.scope_prefix = conversion.scope_prefix
    rewritten.base_model_prefix = conversion.base_model_prefix
    return rewritten

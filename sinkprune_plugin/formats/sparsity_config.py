"""What config.json says about sparsity: read in all historic variants, written as compressed-tensors 0.14 did."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sinkprune_plugin._version import __version__
from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats.codecs.format_names import LEGACY_METHOD, QUANT_METHOD, CheckpointFormat, parse_format
from sinkprune_plugin.formats.expert_sparsity import EXPERT_SPARSITY

__all__ = [
    "SparsityConfig",
    "read_sparsity_config",
    "with_digests",
    "with_sparsity",
    "without_own_keys",
    "without_sparsity",
]

_QUANTIZATION = "quantization_config"
_OLDEST = "compression_config"
_SPARSITY = "sparsity_config"
_OWN_VERSION = "sinkprune_version"
_DIGESTS = "sinkprune_sha256"
_OWN_KEYS = (_OWN_VERSION, _DIGESTS)
# The last release of compressed-tensors that wrote these formats; its readers don't look at the value.
_LEGACY_VERSION = "0.14.0"
# Keys next to a sparsity_config that don't mean that the weights are quantized.
_BESIDE = {_SPARSITY, EXPERT_SPARSITY, "quant_method", "version", "transform_config", *_OWN_KEYS}


@dataclass(frozen=True)
class SparsityConfig:
    """How a checkpoint says it is stored.

    :param format: the format
    :param quant_method: the dispatch key in the file, None in the oldest layout
    :param targets: module names or class names that were compressed, None if not said
    :param ignore: the same of those that weren't
    :param global_sparsity: share of zeros in the whole model, informational
    :param quantization: the keys of a quantization under the sparsity; empty if there is none
    :param own: whether this package wrote it, so that all targets are names of modules with parts in the files
    :param digests: file name → SHA-256 of each weight file in hexadecimal digits, None if not said
    """

    format: CheckpointFormat
    quant_method: str | None = None
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None
    global_sparsity: float | None = None
    quantization: Mapping[str, Any] = field(default_factory=dict)
    own: bool = False
    digests: Mapping[str, str] | None = None


def read_sparsity_config(config: Mapping[str, Any]) -> SparsityConfig | None:
    """Find the sparsity in a model's configuration.

    :param config: content of config.json
    :return: what it says; None if the checkpoint isn't sparse
    :raises UsageError: if its content is invalid
    """
    block = _block(config)
    if block is None:
        return None
    method = block.get("quant_method")
    if method not in (None, QUANT_METHOD, LEGACY_METHOD):
        return None
    sparsity = block.get(_SPARSITY)
    if not sparsity and method != QUANT_METHOD:
        return None
    if not isinstance(sparsity, dict):
        raise UsageError(f"{_SPARSITY} in config.json is a {type(sparsity).__name__}, not a mapping: correct it")
    share = sparsity.get("global_sparsity")
    return SparsityConfig(
        format=parse_format(sparsity.get("format"), f"{_SPARSITY}.format in config.json"),
        quant_method=method,
        targets=_names(sparsity, "targets"),
        ignore=_names(sparsity, "ignore"),
        global_sparsity=float(share) if isinstance(share, int | float) and 0 <= share <= 1 else None,
        quantization={key: value for key, value in block.items() if key not in _BESIDE},
        own=method == QUANT_METHOD and _OWN_VERSION in block,
        digests=_read_digests(block),
    )


def with_sparsity(
    config: Mapping[str, Any],
    sparse_format: CheckpointFormat,
    *,
    targets: list[str],
    ignore: list[str],
    global_sparsity: float,
    layout: str,
) -> dict[str, Any]:
    """Add the sparsity to a model's configuration, in place of any it had.

    :param config: content of config.json
    :param sparse_format: a sparse format
    :param targets: names of the compressed modules
    :param ignore: names of modules of the same kind that stay dense
    :param global_sparsity: share of zeros in the whole model
    :param layout: ``sinkprune`` or ``legacy``
    :return: the new content
    :raises UsageError: if it already has another tool's quantization
    """
    new = without_sparsity(config)
    block = new.get(_QUANTIZATION, {})
    method = block.get("quant_method", LEGACY_METHOD)
    if method != LEGACY_METHOD:
        raise UsageError(
            f"config.json has a quantization_config of '{short(method)}'; {sparse_format} goes together with "
            f"{LEGACY_METHOD} only: keep the checkpoint dense"
        )
    block = {
        **block,
        "quant_method": LEGACY_METHOD if layout == "legacy" else QUANT_METHOD,
        _SPARSITY: {
            "format": sparse_format.value,
            "global_sparsity": global_sparsity,
            "ignore": ignore,
            "registry_requires_subclass": False,
            "sparsity_structure": sparse_format.structure,
            "targets": targets,
        },
    }
    if layout == "legacy":
        # Readers take any other key for a quantization, so none of ours is written here.
        block.setdefault("transform_config", {})
        block["version"] = _LEGACY_VERSION
    else:
        block[_OWN_VERSION] = __version__
    return {**new, _QUANTIZATION: block}


def with_digests(config: Mapping[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """Add the digests of the weight files, where the layout has a place for them.

    :param config: content of config.json, with its sparsity
    :param digests: file name → SHA-256 in hexadecimal digits
    :return: the new content; the same in the layout ``legacy`` and for a dense checkpoint
    """
    block = config.get(_QUANTIZATION)
    if not isinstance(block, dict) or block.get("quant_method") != QUANT_METHOD:
        return dict(config)
    return {**config, _QUANTIZATION: {**block, _DIGESTS: dict(digests)}}


def without_own_keys(block: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a ``quantization_config`` that compressed-tensors knows.

    :param block: the content of it
    """
    return {key: value for key, value in block.items() if key not in _OWN_KEYS}


def without_sparsity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Take the sparsity out of a model's configuration; a quantization under it stays.

    :param config: content of config.json
    :return: the new content
    """
    new = dict(config)
    block = _block(config)
    if block is None or block.get("quant_method") not in (None, QUANT_METHOD, LEGACY_METHOD):
        return new
    new.pop(_OLDEST, None)
    new.pop(_QUANTIZATION, None)
    rest = {key: value for key, value in block.items() if key not in (_SPARSITY, EXPERT_SPARSITY, *_OWN_KEYS)}
    if any(key not in _BESIDE for key in rest) or rest.get("transform_config"):
        new[_QUANTIZATION] = {**rest, "quant_method": LEGACY_METHOD}
    return new


def _block(config: Mapping[str, Any]) -> dict[str, Any] | None:
    key = _QUANTIZATION if config.get(_QUANTIZATION) else _OLDEST
    block = config.get(key)
    if not block:
        return None
    if not isinstance(block, dict):
        raise UsageError(f"{key} in config.json is a {type(block).__name__}, not a mapping: correct it")
    return block


def _names(sparsity: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    names = sparsity.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{_SPARSITY}.{key} in config.json isn't a list of names: correct it")
    return tuple(names)


def _read_digests(block: Mapping[str, Any]) -> dict[str, str] | None:
    digests = block.get(_DIGESTS)
    if digests is None:
        return None
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        raise UsageError(f"{_DIGESTS} in config.json isn't a mapping from file names to digests: correct it")
    return digests

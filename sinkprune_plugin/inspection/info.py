"""`sinkprune info`: what is in a checkpoint, from its headers and one tensor at a time."""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from sinkprune_plugin.errors import UsageError, short
from sinkprune_plugin.formats import CheckpointReader, load_sparse_checkpoint
from sinkprune_plugin.formats.codecs.format_names import LEGACY_METHOD, QUANT_METHOD
from sinkprune_plugin.formats.files.safetensors_header import TORCH_DTYPES, TensorSpec
from sinkprune_plugin.formats.files.shard_reader import CONFIG_NAME, read_json
from sinkprune_plugin.formats.files.stored_weights import SparseWeight
from sinkprune_plugin.formats.selection import is_embedding
from sinkprune_plugin.inspection.readers import Reader, Storage, find_readers
from sinkprune_plugin.inspection.structure import ZeroCount, common_structure, count_zeros, structure_of
from sinkprune_plugin.models.catalogue import NATIVE_MODELS
from sinkprune_plugin.models.fused_experts import find_fused
from sinkprune_plugin.models.sizes_in_config import DENSE_KEY, SIZES_KEY, BlockSizes, parse_sizes

__all__ = ["CheckpointInfo", "LayerInfo", "inspect_checkpoint"]

Role = Literal["linear", "embedding", "outside", "router"]

_SCHEMA = 1
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.")
# The first number in a name counts the decoder blocks; later ones count experts.
_IN_A_BLOCK = re.compile(r"(?P<block>(?:.*?\.)??\d+)(?:\.(?P<rest>.*))?")


@dataclass(frozen=True)
class LayerInfo:
    """One weight matrix.

    :param role: ``linear`` in a decoder block, which is what modifiers prune by default; ``embedding``; ``outside``
        for anything else, such as the vocabulary projection
    :param type: module type
    :param block: name of its decoder block, None outside of them
    :param dtype: name in the file's header, such as BF16
    :param shape: (R, C), or (E, R, C) for fused experts
    :param sparse: whether it is stored in parts
    :param count: its zeros
    """

    role: Role
    type: str
    block: str | None
    dtype: str
    shape: tuple[int, ...]
    sparse: bool
    count: ZeroCount


@dataclass
class CheckpointInfo:
    """What a checkpoint holds.

    :param path: checkpoint directory
    :param model_type: ``model_type`` of its config
    :param family: name of the diffusion family, None for other models
    :param storage: how the weights are stored
    :param files: number of weight files
    :param tensors: number of tensors when dense
    :param file_bytes: size of the weight files
    :param stored_bytes: size of the tensors in them
    :param dense_bytes: size of the same tensors stored dense
    :param parameters: number of elements of weights and biases, zeros included
    :param unpruned_parameters: the same before units were removed, as its config says; None if it doesn't
    :param block_sizes: sizes of each decoder block, where its config lists them; None where all are alike
    :param layers: module name → its weight, for each 2-D ``.weight`` and for fused experts
    :param uncounted: tensors that hold weights in a packed form, in which zeros can't be counted
    :param readers: who can load it
    """

    path: str
    model_type: str
    family: str | None
    storage: Storage
    files: int = 0
    tensors: int = 0
    file_bytes: int = 0
    stored_bytes: int = 0
    dense_bytes: int = 0
    parameters: int = 0
    unpruned_parameters: int | None = None
    block_sizes: list[BlockSizes] | None = None
    layers: dict[str, LayerInfo] = field(default_factory=dict)
    uncounted: list[str] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Size of the tensors as stored, as a share of their dense size."""
        return self.stored_bytes / self.dense_bytes if self.dense_bytes else 1.0

    @property
    def linears(self) -> list[LayerInfo]:
        """The weights that modifiers prune by default."""
        return [layer for layer in self.layers.values() if layer.role == "linear"]

    @property
    def types(self) -> dict[str, list[LayerInfo]]:
        """Module type → its linears, in the order in which a block has them."""
        found: dict[str, list[LayerInfo]] = {}
        for layer in self.linears:
            found.setdefault(layer.type, []).append(layer)
        return found

    @property
    def blocks(self) -> dict[str, dict[str, list[LayerInfo]]]:
        """Decoder block → module type → its linears; several where a block has experts."""
        found: dict[str, dict[str, list[LayerInfo]]] = {}
        for layer in self.linears:
            found.setdefault(layer.block or "", {}).setdefault(layer.type, []).append(layer)
        return dict(sorted(found.items(), key=lambda item: _natural_order(item[0])))

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-serialisable values. Keys are added in later releases, none changes its meaning.

        - ``schema``: 1
        - ``path``, ``model_type``, ``family`` (diffusion family or null)
        - ``format``: ``dense``, ``sparse-bitmask`` or ``sparse-24-bitmask``
        - ``layout``: ``sinkprune``, ``legacy``, ``before-0.9`` (of compressed-tensors); null for dense
        - ``quantization``: null, or ``{method, format}``, the quantizer's own (``format`` may be null)
        - ``files``, ``tensors``: numbers of weight files, and of tensors when dense
        - ``file_bytes``, ``stored_bytes`` (tensors without the files' headers), ``dense_bytes``, ``ratio`` (stored to
          dense)
        - ``parameters``: elements of weights and biases; ``unpruned_parameters``: before units were removed, or null
        - ``block_sizes``: null where all decoder blocks are alike, or for each ``mlp_channels``, ``attention_heads``,
          ``key_value_heads``, and ``experts`` where it has some
        - ``total``: a *summary* of all Linears in decoder blocks
        - ``by_type``: module type → summary
        - ``by_block``: decoder block → module type → summary
        - ``by_layer``: module → summary and ``role`` (``linear``, ``embedding``, ``outside``, ``router``), ``type``,
          ``block`` (null outside), ``dtype``, ``shape``, ``sparse`` (stored in parts); all 2-D weights and fused
          experts (3-D), pruned or not
        - ``uncounted``: names of tensors in a packed form, in which zeros can't be counted
        - ``readers``: list of ``{reader, loads, note}`` with ``loads`` one of ``yes``, ``no``, ``untested``

        A *summary* has ``weights`` (elements), ``zeros``, ``sparsity`` (0 to 1), ``structure`` (``N:M``,
        ``unstructured``, ``dense``, ``zero``, or ``mixed`` for several weights with no common structure) and
        ``structures`` (structure → number of weight matrices that have it by themselves).
        """
        storage = self.storage
        quantization = None
        if storage.quantization is not None or storage.quant_method not in (None, LEGACY_METHOD, QUANT_METHOD):
            # With one of our sparse formats, the quantizer is the one whose keys are there.
            method = LEGACY_METHOD if storage.quant_method == QUANT_METHOD else storage.quant_method
            quantization = {"method": method, "format": storage.quantization or None}
        return {
            "schema": _SCHEMA,
            "path": self.path,
            "model_type": self.model_type,
            "family": self.family,
            "format": storage.format.value,
            "layout": storage.layout,
            "quantization": quantization,
            "files": self.files,
            "tensors": self.tensors,
            "file_bytes": self.file_bytes,
            "stored_bytes": self.stored_bytes,
            "dense_bytes": self.dense_bytes,
            "ratio": self.ratio,
            "parameters": self.parameters,
            "unpruned_parameters": self.unpruned_parameters,
            "block_sizes": None if self.block_sizes is None else [sizes.to_json() for sizes in self.block_sizes],
            "total": summary(self.linears),
            "by_type": {name: summary(layers) for name, layers in self.types.items()},
            "by_block": {
                block: {name: summary(layers) for name, layers in types.items()} for block, types in self.blocks.items()
            },
            "by_layer": {name: summary([layer]) | _description(layer) for name, layer in self.layers.items()},
            "uncounted": self.uncounted,
            "readers": [asdict(reader) for reader in self.readers],
        }


def summary(layers: list[LayerInfo]) -> dict[str, Any]:
    """Zeros of some weights together.

    :param layers: the weights
    :return: see :meth:`CheckpointInfo.to_json`
    """
    counts = [layer.count for layer in layers]
    total = ZeroCount.total(counts)
    return {
        "weights": total.weights,
        "zeros": total.zeros,
        "sparsity": total.sparsity,
        "structure": common_structure(counts),
        "structures": dict(Counter(structure_of(count) for count in counts).most_common()),
    }


def _description(layer: LayerInfo) -> dict[str, Any]:
    names = ("role", "type", "block", "dtype", "sparse")
    return {name: getattr(layer, name) for name in names} | {"shape": list(layer.shape)}


def inspect_checkpoint(path: Path) -> CheckpointInfo:
    """Read a checkpoint's config and weights, one tensor in memory at a time.

    :param path: checkpoint directory
    :return: what is in it
    :raises UsageError: if it isn't a readable checkpoint
    """
    config = _read_config(path)
    if not any(path.glob("*.safetensors")):
        raise UsageError(f"{path} has no *.safetensors files; convert the weights to safetensors first")
    try:
        reader = load_sparse_checkpoint(path)
        storage = _storage(reader, config)
        stored = [reader.stored(name) for name in reader]
        info = CheckpointInfo(
            path=str(path),
            model_type=short(config.get("model_type", "unknown")),
            family=_family_name(config),
            storage=storage,
            files=len(reader.files),
            tensors=len(reader),
            file_bytes=sum(file.stat().st_size for file in reader.files),
            stored_bytes=sum(tensor.nbytes for tensor in stored),
            dense_bytes=sum(reader.spec(name).nbytes for name in reader),
            parameters=sum(
                math.prod(reader.spec(name).shape)
                for name in reader
                if name.endswith((".weight", ".bias")) or _fused(name, reader.spec(name)) is not None
            ),
            unpruned_parameters=_unpruned_parameters(config),
            block_sizes=_block_sizes(reader, config),
            readers=find_readers(storage),
        )
        _count_layers(info, reader)
    except UsageError as error:
        raise UsageError(f"{path} can't be read: {error}") from error
    return info


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    try:
        found = file.is_file()
    except OSError as error:
        raise UsageError(f"{short(path)} can't be read: {error.strerror}") from error
    if not found:
        raise UsageError(f"{path} has no {CONFIG_NAME}; name the directory of a checkpoint")
    return read_json(file)


def _storage(reader: CheckpointReader, config: dict[str, Any]) -> Storage:
    block = config.get("quantization_config") or {}
    keys, method = dict(block), block.get("quant_method")
    if reader.sparsity is not None:
        keys, method = dict(reader.sparsity.quantization), reader.sparsity.quant_method
    weights = [stored for name in reader.sparse_names if isinstance(stored := reader.stored(name), SparseWeight)]
    # A quantizer that doesn't name a format still counts.
    quantized = bool(keys) if reader.sparsity is not None else bool(block)
    return Storage(
        format=reader.format,
        quant_method=None if method is None else short(method),
        quantization=short(keys.get("format") or "") if quantized else None,
        full_names=any(weight.parts["compressed"].name == f"{weight.name}.compressed" for weight in weights),
        float8=any(weight.spec.dtype.startswith("F8") for weight in weights),
        diffusion=_family_name(config) is not None,
        block_sizes=config.get(SIZES_KEY) is not None,
    )


def _block_sizes(reader: CheckpointReader, config: dict[str, Any]) -> list[BlockSizes] | None:
    stored = config.get(SIZES_KEY)
    blocks = {_split(name.removesuffix(".weight"))[0] for name in reader} - {None}
    return None if stored is None else parse_sizes(stored, len(blocks))


def _unpruned_parameters(config: dict[str, Any]) -> int | None:
    number = config.get(DENSE_KEY)
    return number if type(number) is int and number > 0 else None


def _count_layers(info: CheckpointInfo, reader: CheckpointReader) -> None:
    wanted, size = {}, 0
    experts: dict[str, int] = {}
    for name in reader:
        spec, module = reader.spec(name), name.removesuffix(".weight")
        layer = _fused(name, spec)
        if layer is not None:
            wanted[name] = name
            experts[layer] = spec.shape[0]
            size += spec.nbytes
        elif name.endswith((".weight_packed", ".qweight")) or (module != name and spec.dtype not in TORCH_DTYPES):
            info.uncounted.append(name)
        elif module != name and len(spec.shape) == 2:
            wanted[module] = name
            size += spec.nbytes
    types = _module_types(wanted)
    routers = _routers({m: reader.spec(name).shape[0] for m, name in wanted.items() if m != name}, experts)
    with tqdm(total=size, desc="counting zeros", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for module, name in sorted(wanted.items(), key=lambda item: _natural_order(item[0])):
            spec = reader.spec(name)
            block = _split(module)[0]
            role: Role = "embedding" if is_embedding(name) else "outside" if block is None else "linear"
            if module in routers:
                role = "router"
            info.layers[module] = LayerInfo(
                role=role,
                type=types[module],
                block=block if role == "linear" else None,
                dtype=spec.dtype,
                shape=spec.shape,
                sparse=name in reader.sparse_names,
                count=count_zeros(reader[name].flatten(0, -2)),
            )
            bar.update(spec.nbytes)


def _fused(name: str, spec: TensorSpec) -> str | None:
    """Name of the layer of experts whose fused weights a tensor holds; None if it holds none."""
    for native in NATIVE_MODELS:
        fused = None if native.experts is None else find_fused(name, native.experts)
        if fused is not None and native.experts is not None and len(spec.shape) == 3 and spec.dtype in TORCH_DTYPES:
            return f"{fused.prefix}{fused.block}.{native.experts.experts.rpartition('.')[0]}"
    return None


def _routers(rows: dict[str, int], fused: dict[str, int]) -> set[str]:
    """Weights beside a list of experts with a row for each, which choose among these: no modifier prunes them."""
    experts: dict[str, set[str]] = {}
    for module in rows:
        if match := _EXPERT.match(module):
            experts.setdefault(match[1], set()).add(match[2])
    counts = {layer: len(numbers) for layer, numbers in experts.items()} | fused
    return {module for module, count in rows.items() if counts.get(module.rpartition(".")[0]) == count}


def _module_types(modules: dict[str, str]) -> dict[str, str]:
    """The last part of a module's name, or everything after the block where several in a block end alike."""
    paths = {module: _path_in_block(module) for module in modules}
    ends = Counter(path.rsplit(".", 1)[-1] for path in set(paths.values()))
    result = {}
    for module, path in paths.items():
        end = path.rsplit(".", 1)[-1]
        # Outside of the blocks the full name is used: LLaDA's vocabulary projection has the name of a block's Linear.
        result[module] = module if _split(module)[0] is None else end if ends[end] == 1 else path
    return result


def _path_in_block(module: str) -> str:
    block, rest = _split(module)
    if block is None:
        # Never equal to the end of a path in a block.
        return f".{module}."
    named = [part for part in rest.split(".") if not part.isdecimal()]
    return ".".join(named) or block.rpartition(".")[0] or block


def _split(module: str) -> tuple[str | None, str]:
    match = _IN_A_BLOCK.fullmatch(module)
    return (None, "") if match is None else (match["block"], match["rest"] or "")


def _natural_order(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _family_name(config: dict[str, Any]) -> str | None:
    from sinkprune_plugin.diffusion import find_family

    family = find_family(config)
    return None if family is None else family.name

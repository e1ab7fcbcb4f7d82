"""`sinkprune info`: what is in a checkpoint, from its headers and one tensor at a time."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open

from sinkprune_plugin.errors import UsageError

__all__ = ["CheckpointInfo", "inspect_checkpoint", "print_info"]


@dataclass
class ModuleSparsity:
    """Zeros of all weights of one module type, or of one layer.

    :param weights: number of weights
    :param zeros: how many of them are zero
    """

    weights: int = 0
    zeros: int = 0

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.weights if self.weights else 0.0


@dataclass
class CheckpointInfo:
    """What a checkpoint holds.

    :param path: checkpoint directory
    :param model_type: ``model_type`` of its config
    :param family: name of the diffusion family, None for other models
    :param format: how the weights are stored
    :param file_bytes: size of the weight files
    :param dense_bytes: size of the same tensors stored dense
    :param by_layer: sparsity of the 2-D weights by module name
    :param by_type: the same by the last part of the module name
    :param readers: who can load it
    """

    path: str
    model_type: str
    family: str | None
    format: str
    file_bytes: int = 0
    dense_bytes: int = 0
    by_layer: dict[str, ModuleSparsity] = field(default_factory=dict)
    by_type: dict[str, ModuleSparsity] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-serialisable values, with the sparsities spelled out."""
        result = asdict(self)
        for group in ("by_layer", "by_type"):
            for name, entry in getattr(self, group).items():
                result[group][name]["sparsity"] = entry.sparsity
        return result


def inspect_checkpoint(path: Path) -> CheckpointInfo:
    """Read a checkpoint's config and weights, one tensor in memory at a time.

    :param path: checkpoint directory
    :return: what is in it
    :raises UsageError: if it isn't a readable checkpoint
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        raise UsageError(f"{path} has no config.json; name the directory of a checkpoint")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{config_file} is not JSON: {error}") from error
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{path} has no *.safetensors files; convert the weights to safetensors first")
    info = CheckpointInfo(
        path=str(path),
        model_type=str(config.get("model_type", "unknown")),
        family=_family_name(config),
        format=_format_name(config),
        readers=["transformers", "llm-compressor", "vLLM (with this package for diffusion models)"],
    )
    for file in files:
        info.file_bytes += file.stat().st_size
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                    _count(info, name, tensors.get_tensor(name))
        except SafetensorError as error:
            raise UsageError(f"{file} can't be read: {error}; copy the file again") from error
    return info


def _count(info: CheckpointInfo, name: str, tensor: torch.Tensor) -> None:
    info.dense_bytes += tensor.numel() * tensor.element_size()
    if tensor.dim() != 2 or not name.endswith(".weight"):
        return
    module = name.removesuffix(".weight")
    zeros = tensor.numel() - int(torch.count_nonzero(tensor))
    info.by_layer[module] = ModuleSparsity(tensor.numel(), zeros)
    group = info.by_type.setdefault(module.rsplit(".", 1)[-1], ModuleSparsity())
    group.weights += tensor.numel()
    group.zeros += zeros


def _family_name(config: dict[str, Any]) -> str | None:
    from sinkprune_plugin.diffusion import families

    model_type = config.get("model_type")
    return next((family.name for family in families() if model_type in family.model_types), None)


def _format_name(config: dict[str, Any]) -> str:
    quantization = config.get("quantization_config")
    return "dense" if not quantization else str(quantization.get("quant_method", "quantized"))


def print_info(info: CheckpointInfo, console: Console) -> None:
    """Print a compact table.

    :param info: what :func:`inspect_checkpoint` found
    :param console: where to print
    """
    table = Table(title=info.path, title_justify="left")
    table.add_column("module type")
    table.add_column("weights", justify="right")
    table.add_column("sparsity", justify="right")
    total = ModuleSparsity()
    for name, entry in sorted(info.by_type.items()):
        table.add_row(name, f"{entry.weights:,}", f"{entry.sparsity:.4f}")
        total.weights += entry.weights
        total.zeros += entry.zeros
    table.add_section()
    table.add_row("all", f"{total.weights:,}", f"{total.sparsity:.4f}")
    console.print(table)
    console.print(
        f"model type {info.model_type}, diffusion family {info.family or 'none'}, format {info.format}, "
        f"{info.file_bytes / 1e6:.2f} MB on disk ({info.dense_bytes / 1e6:.2f} MB dense)"
    )
    console.print(f"loads in: {', '.join(info.readers)}")

"""The dense model's decoder blocks, for a modifier that needs them after they have been pruned."""

import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.offload import disable_onloading
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sinkprune_plugin.errors import UsageError, reason_of
from sinkprune_plugin.formats import load_sparse_checkpoint
from sinkprune_plugin.inputs import check_checkpoint
from sinkprune_plugin.loading import load_config
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.bare_modules import bare_copy
from sinkprune_plugin.termination import removed_on_termination

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KeptWeights", "open_dense_model"]


class KeptWeights(Mapping[str, torch.Tensor]):
    """Full name → weight of the decoder blocks as they are now, on disk, one safetensors file for each block.

    The files are in the directory for temporary files and lose their names as soon as they are open, so that nothing
    is left behind however the process ends; the space is free again when this object is. Processes of one machine share
    them.

    :param blocks_name: full name of the list of decoder blocks
    :param blocks: the decoder blocks; may be offloaded, and one tensor at a time is brought to main memory
    :raises UsageError: if the disk has too little room
    """

    def __init__(self, blocks_name: str, blocks: torch.nn.ModuleList) -> None:
        with disable_onloading():
            self.num_bytes = sum(each.numel() * each.element_size() for block in blocks for each in _tensors(block))
        machines = distributed.gather_objects(socket.gethostname())
        writer = machines.index(machines[distributed.rank()])
        directory: Path | None = None
        try:
            with distributed.failing_together():
                if writer == distributed.rank():
                    directory = _write(blocks_name, blocks, self.num_bytes)
            shared = distributed.gather_objects(directory)[writer]
            with distributed.failing_together():
                self._files = _open(shared, len(blocks))
        finally:
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)
        self._file_of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - not a mapping

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def open_dense_model(
    directory: str | Path, model: "PreTrainedModel"
) -> tuple[Mapping[str, torch.Tensor], list[torch.nn.Module]]:
    """Take the dense model from its checkpoint, whose weights are read when they are needed.

    :param directory: checkpoint directory, dense or sparse
    :param model: the model that was, or will be, pruned from it
    :return: full name → weight, and the dense decoder blocks without weights
    :raises UsageError: if the checkpoint is damaged, or is not that of the model
    """
    from transformers import AutoModelForCausalLM

    check_checkpoint(directory)
    if not Path(directory).is_dir():
        raise UsageError(f"dense_model {directory} is no directory; name the directory of the dense checkpoint")
    reader = load_sparse_checkpoint(directory)
    config = load_config(directory)
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    embedding: Any = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding) + ".weight"
    if name not in reader or not torch.equal(reader[name].to("cpu", model.dtype), embedding.weight.to("cpu")):
        raise UsageError(f"{name} of dense_model {directory} differs; name the model that this one was pruned from")
    _, blocks = find_decoder_blocks(dense)
    return reader, [bare_copy(block) for block in blocks]


def _write(blocks_name: str, blocks: torch.nn.ModuleList, num_bytes: int) -> Path:
    place = Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    remedy = "set TMPDIR to a directory on a larger disk, or name the dense checkpoint as `dense_model`"
    if num_bytes > free:
        raise UsageError(
            f"the dense weights take {num_bytes / 1e9:.1f} GB until they are needed and {place} has {free / 1e9:.1f} "
            f"GB free; {remedy}"
        )
    directory = Path(tempfile.mkdtemp(prefix="sinkprune-dense-weights-"))
    with removed_on_termination(directory):
        try:
            for index, block in enumerate(blocks):
                tensors = _in_main_memory(block, f"{blocks_name}.{index}.")
                save_file(tensors, _file(directory, index))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise UsageError(
                f"the dense weights can't be written to {place} until they are needed: {reason_of(error)}; {remedy}"
            ) from error
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    return directory


def _open(directory: Path, count: int) -> list[Any]:
    # Opening maps the file into memory, from where it is read later.
    return [safe_open(_file(directory, index), framework="pt") for index in range(count)]


def _file(directory: Path, index: int) -> Path:
    return directory / f"block-{index}.safetensors"


def _tensors(block: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from block.parameters()
    yield from block.buffers()


def _in_main_memory(block: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    found = {}
    for path, module in block.named_modules():
        for mapping in (module._parameters, module._buffers):
            for name in mapping:
                with disable_onloading():
                    tensor: Any = mapping[name]
                if tensor is not None and tensor.device.type == "meta":
                    # Offloaded to disk.
                    tensor = mapping[name]
                if tensor is not None:
                    # A copy where tensors share memory, which safetensors refuses.
                    full = f"{prefix}{path}.{name}" if path else prefix + name
                    found[full] = tensor.detach().to("cpu", copy=True).contiguous()
    return found

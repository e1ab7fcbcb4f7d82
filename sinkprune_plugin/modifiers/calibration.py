"""The calibration samples, and the state a model is in while it is calibrated."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from llmcompressor.utils.helpers import DisableQuantization, disable_cache, disable_hf_kernels, eval_context

from sinkprune_plugin.diffusion import DiffusionSpec, check_block_window
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.sample_choice import SampleChoice
from sinkprune_plugin.text_windows import MINIMUM_TOKENS

__all__ = ["CalibrationBatch", "calibration_context", "collect_batches", "deal_out"]


@dataclass(frozen=True)
class CalibrationBatch:
    """Clean calibration samples of equal padded length.

    :param index: position among the batches of this process, for messages
    :param input_ids: (B, T) int64 on CPU
    :param valid: (B, T) bool, False on padding; None if there is none
    """

    index: int
    input_ids: torch.Tensor
    valid: torch.Tensor | None

    def digest(self) -> str:
        """Fingerprint of the token ids, equal in every process that holds the same batch."""
        return hashlib.blake2b(self.input_ids.numpy().tobytes(), digest_size=16).hexdigest()


def collect_batches(
    dataloader: Iterable[Any] | None, seed: int = 0, spec: DiffusionSpec | None = None
) -> list[CalibrationBatch]:
    """Read the calibration samples and split them over processes where all of them hold the same ones.

    :param dataloader: ``state.data.calib``: batches with ``input_ids`` (B, T) and perhaps ``attention_mask``
    :param seed: the recipe's ``seed``, which decides what a loader that shuffles yields
    :param spec: the model's diffusion spec; samples for a model that denoises block by block are cut to whole blocks
    :return: this process's batches, without samples that are too short
    :raises UsageError: if there is no data, all samples are too short, a process is left without samples, or all are
        windows of one length that the model's blocks don't divide
    """
    if dataloader is None:
        raise UsageError(
            "sink-aware pruning needs calibration data and got none; pass `dataset=` to oneshot() (text or input_ids)"
        )
    block = None if spec is None else spec.block_length
    choice = SampleChoice(seed, MINIMUM_TOKENS if block is None else 2 * block)
    read = (_read_batch(index, batch, choice) for index, batch in enumerate(choice.batches(dataloader)))
    batches = [batch for batch in read if len(batch.input_ids)]
    choice.report(sum(len(batch.input_ids) for batch in batches))
    if spec is not None and block is not None:
        lengths = {batch.input_ids.shape[1] for batch in batches}
        if len(lengths) == 1 and all(batch.valid is None for batch in batches):
            check_block_window(lengths.pop(), spec)
        batches = [_whole_blocks(batch, block) for batch in batches]
    digests = distributed.gather_objects([batch.digest() for batch in batches])
    if len(digests) > 1 and all(other == digests[0] for other in digests):
        batches = batches[distributed.rank() :: distributed.world_size()]
    if not batches:
        raise UsageError(
            f"the calibration data has no samples for process {distributed.rank()} of {distributed.world_size()}; "
            "pass at least one sample for each process"
        )
    return batches


def _whole_blocks(batch: CalibrationBatch, block: int) -> CalibrationBatch:
    """Cut samples of different lengths to whole blocks, so that none ends with a part of one."""
    valid = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.valid is None else batch.valid
    valid = valid & (valid.cumsum(dim=1) <= valid.sum(dim=1, keepdim=True) // block * block)
    end = int(valid.any(dim=0).nonzero()[-1]) + 1
    input_ids, valid = batch.input_ids[:, :end], valid[:, :end]
    return CalibrationBatch(batch.index, input_ids, None if bool(valid.all()) else valid)


def deal_out(batches: list[CalibrationBatch]) -> list[CalibrationBatch]:
    """Order the batches of all processes by their content alone, and deal them out in turn.

    llm-compressor gives each process a part of the samples in one piece. Where the order of samples matters, the result
    would then depend on the number of processes.

    :param batches: this process's batches
    :return: the batches that are this process's now
    """
    everywhere = [batch for theirs in distributed.gather_objects(batches) for batch in theirs]
    everywhere.sort(key=lambda batch: batch.digest())
    return everywhere[distributed.rank() :: distributed.world_size()]


def _read_batch(index: int, batch: Any, choice: SampleChoice) -> CalibrationBatch:
    if not hasattr(batch, "keys") or "input_ids" not in batch:
        raise UsageError(
            f"calibration batch {index} is a {type(batch).__name__} without `input_ids`; the data loader must yield "
            "dictionaries with `input_ids` (B, T)"
        )
    input_ids = torch.as_tensor(batch["input_ids"]).to(device="cpu", dtype=torch.int64)
    if input_ids.dim() == 1:
        input_ids = input_ids.unsqueeze(0)
    valid = torch.ones_like(input_ids, dtype=torch.bool)
    if batch.get("attention_mask") is not None:
        valid = torch.as_tensor(batch["attention_mask"]).to(device="cpu").bool().reshape(input_ids.shape)
    kept = torch.tensor([choice.keeps(length) for length in valid.sum(dim=1).tolist()], dtype=torch.bool)
    input_ids, valid = input_ids[kept], valid[kept]
    return CalibrationBatch(index, input_ids, None if bool(valid.all()) else valid)


@contextlib.contextmanager
def calibration_context(model: torch.nn.Module) -> Iterator[None]:
    """Everything that must be off in a calibration pass: gradients, cache, dropout, fake quantization.

    llm-compressor's own ``calibration_forward_context`` is close but forces eager attention, which can't be observed.

    :param model: model to run
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(disable_cache(model))
        stack.enter_context(eval_context(model))
        stack.enter_context(disable_hf_kernels(model))
        stack.enter_context(DisableQuantization(model))
        yield

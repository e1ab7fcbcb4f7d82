"""Noisy passes over the model: calibration samples, their corruption along the trajectory, and sink bookkeeping."""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from llmcompressor.utils.helpers import (
    DisableQuantization,
    disable_cache,
    disable_hf_kernels,
    disable_lm_head,
    eval_context,
)

from sinkprune_plugin.devices import input_device
from sinkprune_plugin.diffusion import DiffusionSpec, corrupt, sample_generator
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.sample_choice import SampleChoice

__all__ = [
    "CalibrationBatch",
    "CorruptionSource",
    "SinkTally",
    "TrajectoryCorruption",
    "calibration_context",
    "collect_batches",
    "forward",
]


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


class CorruptionSource(Protocol):
    """Where the noise of a calibration pass comes from."""

    def __call__(self, batch: CalibrationBatch, step_index: int, timestep: float) -> torch.Tensor:
        """Corrupt a batch.

        :param batch: clean samples
        :param step_index: index of the timestep on the grid
        :param timestep: t in (0, 1]
        :return: (B, T) int64 corrupted token ids on CPU
        """
        ...


@dataclass(frozen=True)
class TrajectoryCorruption:
    """The family's forward process (paper section 3.1), seeded by the sample's own content.

    The noise of a sample at a timestep depends on ``seed``, the timestep and the sample alone, so batch size, order
    and the number of processes don't change the statistics.

    :param spec: family and mask token of the model
    :param seed: the recipe's ``seed``
    :param noise_eps: floor of the mask probability
    """

    spec: DiffusionSpec
    seed: int
    noise_eps: float

    def __call__(self, batch: CalibrationBatch, step_index: int, timestep: float) -> torch.Tensor:
        """Corrupt a batch; see :class:`CorruptionSource`."""
        rows = batch.input_ids if batch.valid is None else _real_tokens(batch)
        generators = [sample_generator(self.seed, step_index, row) for row in rows]
        corruption = corrupt(
            batch.input_ids,
            timestep,
            self.spec,
            noise_eps=self.noise_eps,
            generators=generators,
            attention_mask=batch.valid,
        )
        return corruption.noisy_ids


def _real_tokens(batch: CalibrationBatch) -> list[torch.Tensor]:
    assert batch.valid is not None
    return [row[valid] for row, valid in zip(batch.input_ids, batch.valid, strict=True)]


def collect_batches(dataloader: Iterable[Any] | None, seed: int = 0) -> list[CalibrationBatch]:
    """Read the calibration samples and split them over processes where all of them hold the same ones.

    :param dataloader: ``state.data.calib``: batches with ``input_ids`` (B, T) and perhaps ``attention_mask``
    :param seed: the recipe's ``seed``, which decides what a loader that shuffles yields
    :return: this process's batches, without samples that are too short
    :raises UsageError: if there is no data, all samples are too short or a process is left without samples
    """
    if dataloader is None:
        raise UsageError(
            "sink-aware pruning needs calibration data and got none; pass `dataset=` to oneshot() (text or input_ids)"
        )
    choice = SampleChoice(seed)
    read = (_read_batch(index, batch, choice) for index, batch in enumerate(choice.batches(dataloader)))
    batches = [batch for batch in read if len(batch.input_ids)]
    choice.report(sum(len(batch.input_ids) for batch in batches))
    digests = distributed.gather_objects([batch.digest() for batch in batches])
    if len(digests) > 1 and all(other == digests[0] for other in digests):
        batches = batches[distributed.rank() :: distributed.world_size()]
    if not batches:
        raise UsageError(
            f"the calibration data has no samples for process {distributed.rank()} of {distributed.world_size()}; "
            "pass at least one sample for each process"
        )
    return batches


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
def calibration_context(model: torch.nn.Module, *, head_is_target: bool) -> Iterator[None]:
    """Everything a calibration pass must hold off: gradients, cache, dropout, fake quantization, the costly logits.

    llm-compressor's own ``calibration_forward_context`` is close but forces eager attention, which can't be observed.

    :param model: model to run
    :param head_is_target: keep the vocabulary projection working because it is to be pruned itself
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(disable_cache(model))
        stack.enter_context(eval_context(model))
        stack.enter_context(disable_hf_kernels(model))
        stack.enter_context(DisableQuantization(model))
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if isinstance(head, torch.nn.Linear) and not head_is_target:
            stack.enter_context(disable_lm_head(model))
        yield


def forward(model: torch.nn.Module, input_ids: torch.Tensor, valid: torch.Tensor | None) -> None:
    """Run the model for its side effects on hooks.

    :param model: model to run
    :param input_ids: (B, T) int64
    :param valid: (B, T) bool, False on padding; None if there is none
    """
    device = input_device(model)
    # No mask where there is no padding: attention without a mask is the faster kernel.
    mask = None if valid is None else valid.to(device=device, dtype=torch.int64)
    model(input_ids=input_ids.to(device), attention_mask=mask)


@dataclass
class SinkTally:
    """Running numbers for the summary line: sinks at each timestep and how many of them are transient.

    A position is a sink where its soft mask exceeds one half; it is transient in a sample if the mean of its mask
    over the timesteps stays below ``persistence``.
    """

    persistence: float
    samples: int = 0
    sinks: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    ever: int = 0
    transient: int = 0

    def add(self, masks: torch.Tensor) -> None:
        """Count the sinks of a batch.

        :param masks: (B, S, T) float32 soft masks
        """
        is_sink = masks > 0.5
        counts = is_sink.sum(dim=(0, 2)).to(device="cpu", dtype=torch.float64)
        self.sinks = counts if self.samples == 0 else self.sinks + counts
        self.samples += masks.shape[0]
        ever = is_sink.any(dim=1)
        self.ever += int(ever.sum())
        self.transient += int((ever & (masks.mean(dim=1) < self.persistence)).sum())

    def reduce(self) -> None:
        """Sum over processes, in place."""
        parts = distributed.gather_objects((self.samples, self.sinks, self.ever, self.transient))
        self.samples = sum(part[0] for part in parts)
        self.sinks = torch.stack([part[1] for part in parts]).sum(dim=0)
        self.ever = sum(part[2] for part in parts)
        self.transient = sum(part[3] for part in parts)

    @property
    def sinks_per_timestep(self) -> list[float]:
        """Mean number of sinks of a sample at each timestep."""
        return (self.sinks / max(self.samples, 1)).tolist()

    @property
    def transient_share(self) -> float:
        """Share of the positions that are ever a sink which are transient; 0 if there are no sinks."""
        return self.transient / self.ever if self.ever else 0.0

"""Finding the sinks of a model: one sweep of corrupted passes with the attention watched, and a tally of the result."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.passes import CalibrationPass, OnloadedBlock, PassEngine, Watch
from sinkprune_plugin.sinks import AttentionCapture, capture_attention_mass

__all__ = ["SinkTally", "sweep_attention"]


def sweep_attention(
    engine: PassEngine, passes: Sequence[CalibrationPass], block_runs: int, *, title: str, watch: Watch | None = None
) -> list[torch.Tensor]:
    """Attention mass of every pass, summed over the decoder blocks, relative to that of uniform attention.

    :param engine: the engine
    :param passes: the passes
    :param block_runs: see :meth:`PassEngine.sweep`
    :param title: name of the progress bar
    :param watch: context that is entered around each pass as well
    :return: one (B, T) float32 mass for each pass, on the device of the blocks
    :raises UsageError: if no attention can be observed, or a mass isn't finite
    """
    masses: dict[int, torch.Tensor] = {}

    with capture_attention_mass(relative=True) as capture:

        @contextlib.contextmanager
        def both(number: int, each: CalibrationPass) -> Iterator[None]:
            capture.reset(each.valid)
            with contextlib.nullcontext() if watch is None else watch(number, each):
                yield
            _add_mass(masses, number, capture)

        def visit(block: OnloadedBlock) -> None:
            block.run(both, advance=True)

        engine.sweep(passes, visit, title=title, block_runs=block_runs)
    _require_finite(masses, passes)
    return [masses[number] for number in range(len(passes))]


def _add_mass(masses: dict[int, torch.Tensor], number: int, capture: AttentionCapture) -> None:
    if not capture.layers:
        # A block without attention, in a model that mixes kinds of blocks.
        return
    mass = capture.mass
    # Where a model is spread over devices, the sums are on the first block's device.
    masses[number] = masses[number] + mass.to(masses[number].device) if number in masses else mass


def _require_finite(masses: dict[int, torch.Tensor], passes: Sequence[CalibrationPass]) -> None:
    finite = torch.stack([mass.isfinite().all() for mass in masses.values()])
    # The one point where the host waits for the device.
    for number, good in zip(masses, finite.tolist(), strict=True):
        if not good:
            raise UsageError(
                f"the attention mass of {passes[number].source} is not finite; check the checkpoint, or load it with "
                "dtype float32"
            )


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
        """Mean number of sinks per sample at each timestep."""
        return (self.sinks / max(self.samples, 1)).tolist()

    @property
    def transient_share(self) -> float:
        """Share of transient positions among those that are ever a sink; 0 if there are no sinks."""
        return self.transient / self.ever if self.ever else 0.0

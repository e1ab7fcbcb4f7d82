"""How sinks move over the steps: the evidence for the claim that a diffusion LM's sinks are transient."""

from dataclasses import dataclass

import torch

from sinkprune_plugin.errors import UsageError

__all__ = ["SinkDynamics", "sink_dynamics"]

# A soft mask above one half is a sink: its mass lies above the threshold.
_IS_SINK = 0.5


@dataclass(frozen=True)
class SinkDynamics:
    """Movement and weight of the sinks over S steps, averaged over N samples.

    :param sinks_per_timestep: (S,) mean number of sinks per sample
    :param sink_mass_share: (S,) mean share of the attention mass that the sinks receive, in [0, 1]
    :param dominant_mass_share: (S,) mean share of the attention mass that the strongest position receives
    :param dominant_positions: (N, S) index of the strongest position
    :param dominant_variance: variance over the steps of the strongest position divided by T², mean over the samples;
        0 for a sink that never moves, 1/12 = 0.083 for one that jumps uniformly over the sequence
    :param dominant_moves: share of pairs of neighbouring steps between which the strongest position changes
    :param sinks_ever: mean number of positions per sample that are a sink in at least one step
    :param persistence: mean over those positions of the mean over the steps of their soft mask, in [0, 1]
    :param transient_share: share of those positions whose persistence is below ``sink_persistence``
    """

    sinks_per_timestep: tuple[float, ...]
    sink_mass_share: tuple[float, ...]
    dominant_mass_share: tuple[float, ...]
    dominant_positions: tuple[tuple[int, ...], ...]
    dominant_variance: float
    dominant_moves: float
    sinks_ever: float
    persistence: float
    transient_share: float


def sink_dynamics(
    mass: torch.Tensor,
    masks: torch.Tensor,
    sink_persistence: float = 0.5,
    present: torch.Tensor | None = None,
) -> SinkDynamics:
    """Summarise where the sinks of some samples are at each step.

    Source: "Sink-Aware Pruning for Diffusion Language Models" (arXiv 2602.17664), section 3, whose evidence is the
    variance of the dominant sink's position over the denoising steps. Persistence, concentration and the shares are
    this project's additions.

    :param mass: (N, S, T) attention mass
    :param masks: (N, S, T) soft sink masks
    :param sink_persistence: a position whose persistence is at least this is stable; in (0, 1]
    :param present: (S, T) bool, steps at which a position exists (growing prefixes); default: always. A position's
        persistence is taken over the steps at which it exists.
    :return: the summary
    :raises UsageError: if shapes or the number are wrong
    """
    if mass.dim() != 3 or mass.shape != masks.shape or 0 in mass.shape:
        raise UsageError(
            f"mass {tuple(mass.shape)} and masks {tuple(masks.shape)} must both be (samples, timesteps, tokens) with "
            "at least one of each"
        )
    if not 0 < sink_persistence <= 1:
        raise UsageError(f"sink_persistence is {sink_persistence}; it must be in (0, 1]")
    tokens = mass.shape[2]
    # In double precision: shares and variances of small samples are reported with several digits.
    mass, masks = mass.double(), masks.double()
    if present is None:
        present = torch.ones(mass.shape[1:], dtype=torch.bool, device=mass.device)
    present = present.to(mass.device)
    is_sink = (masks > _IS_SINK) & present
    total = mass.sum(dim=2)
    dominant = mass.argmax(dim=2)
    moves = (dominant.diff(dim=1) != 0).double()
    persistence = (masks * present).sum(dim=1) / present.sum(dim=0).clamp(min=1)
    ever = is_sink.any(dim=1)
    found = persistence[ever]
    return SinkDynamics(
        sinks_per_timestep=_over_samples(is_sink.sum(dim=2)),
        sink_mass_share=_over_samples((mass * is_sink).sum(dim=2) / total),
        dominant_mass_share=_over_samples(mass.amax(dim=2) / total),
        dominant_positions=tuple(tuple(row) for row in dominant.tolist()),
        dominant_variance=(dominant.double() / tokens).var(dim=1, correction=0).mean().item(),
        dominant_moves=moves.mean().item() if moves.numel() else 0.0,
        sinks_ever=ever.sum(dim=1).double().mean().item(),
        persistence=found.mean().item() if len(found) else 0.0,
        transient_share=(found < sink_persistence).double().mean().item() if len(found) else 0.0,
    )


def _over_samples(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(values.double().mean(dim=0).tolist())

"""What the study runs: methods, patterns, seeds, one-factor sweeps, controls and ideas."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sinkprune_plugin.modifiers.oneshot_flow import stock_modifier
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier

SEEDS = (0, 1, 2)
# Pattern → sparsity, mask structure.
PATTERNS = {
    "50 %": (0.5, "0:0"),
    "60 %": (0.6, "0:0"),
    "75 %": (0.75, "0:0"),
    "2:4": (0.5, "2:4"),
    "4:8": (0.5, "4:8"),
}
# No position is this many standard deviations above the mean: the soft mask is 0 everywhere.
NO_MASK = 1e6


@dataclass(frozen=True)
class Cell:
    """One pruning and its evaluation.

    :param group: ``grid``, ``controls``, ``ideas`` or the name of a sweep
    :param method: a key of :func:`methods`, :func:`controls` or :func:`ideas`
    :param pattern: see :data:`PATTERNS`
    :param seed: of calibration windows and corruption
    :param value: what is swept, as text; empty in the grid
    """

    group: str
    method: str
    pattern: str
    seed: int
    value: str = ""

    @property
    def key(self) -> str:
        """Name of the cell in the results."""
        return "/".join((self.group, self.method, self.pattern, str(self.seed), self.value))


Maker = Callable[[float, str, int], Any]


def _wanda(**fields: Any) -> Maker:
    return lambda sparsity, structure, seed: SinkAwareWandaModifier(
        sparsity=sparsity, mask_structure=structure, seed=seed, **fields
    )


def _sparsegpt(**fields: Any) -> Maker:
    return lambda sparsity, structure, seed: SinkAwareSparseGPTModifier(
        sparsity=sparsity, mask_structure=structure, seed=seed, **fields
    )


def methods() -> dict[str, Maker | None]:
    """Method → its modifier; None for those without one."""
    return {
        "magnitude": None,
        "Wanda": lambda sparsity, structure, _: stock_modifier("WandaPruningModifier", sparsity, structure),
        "Wanda, corrupted, no mask": _wanda(sink_std=NO_MASK),
        "sink-aware Wanda": _wanda(),
        "sink-aware Wanda, transient": _wanda(sink_scope="transient"),
        "sink-aware Wanda, 1/t": _wanda(timestep_weighting="inverse"),
        "sink-aware Wanda, 1/t²": _wanda(timestep_weighting="inverse_square"),
        "sink-aware Wanda, propagated": _wanda(propagate_error=True),
        "sink-aware Wanda, propagated, 1/t²": _wanda(propagate_error=True, timestep_weighting="inverse_square"),
        "SparseGPT": lambda sparsity, structure, _: stock_modifier("SparseGPTModifier", sparsity, structure),
        "SparseGPT, corrupted, no mask": _sparsegpt(sink_std=NO_MASK),
        "sink-aware SparseGPT, clean": _sparsegpt(calibrate_on="clean"),
        "sink-aware SparseGPT": _sparsegpt(),
    }


def controls() -> dict[str, Maker]:
    """Method → its modifier, for comparisons in which one thing alone changes.

    Stock and sink-aware methods differ in more than inputs and mask: stock Wanda propagates, and stock SparseGPT is
    another implementation.
    """
    return {
        "Wanda, corrupted, no mask, propagated": _wanda(sink_std=NO_MASK, propagate_error=True),
        "Wanda, corrupted, no mask, propagated, 1/t²": _wanda(
            sink_std=NO_MASK, propagate_error=True, timestep_weighting="inverse_square"
        ),
        "our SparseGPT, clean, no mask": _sparsegpt(calibrate_on="clean", sink_std=NO_MASK),
    }


def ideas() -> dict[str, Maker]:
    """Method → its modifier, for what is no option or no default yet."""
    found: dict[str, Maker] = {
        "sink-aware SparseGPT, 1/t": _sparsegpt(timestep_weighting="inverse"),
        "sink-aware SparseGPT, transient": _sparsegpt(sink_scope="transient"),
    }
    for scale in (0.1, 0.001):
        found[f"sink-aware SparseGPT, mask rows × {scale}"] = _scaled_mask_rows(SinkAwareSparseGPTModifier, scale)
        found[f"sink-aware Wanda, propagated, 1/t², mask rows × {scale}"] = _scaled_mask_rows(
            SinkAwareWandaModifier, scale, propagate_error=True, timestep_weighting="inverse_square"
        )
    return found


def _scaled_mask_rows(modifier: type, scale: float, **fields: Any) -> Maker:
    class ScaledMaskRows(modifier):
        """Rows of mask tokens count less in the statistics; possible from outside where pruning is block by block."""

        def _prune_block_by_block(self, model: Any, runner: Any, passes: list[Any]) -> None:
            mask_id = self._corruption.spec.mask_token_id
            scaled = [
                (batch, ids, weights * torch.where(ids == mask_id, scale, 1.0).to(weights.device))
                for batch, ids, weights in passes
            ]
            super()._prune_block_by_block(model, runner, scaled)

    return lambda sparsity, structure, seed: ScaledMaskRows(
        sparsity=sparsity, mask_structure=structure, seed=seed, **fields
    )


# Sweep → values of its one factor. Windows change the data, the others a field.
SWEEPS: dict[str, tuple[Any, ...]] = {
    "windows": (4, 16, 64),
    "sample_interval": (25, 10, 5),
    "sink_std": (1.0, 2.0, 3.0),
}
SWEPT = {"sink-aware Wanda": _wanda, "sink-aware SparseGPT": _sparsegpt}
SWEPT_PATTERNS = ("60 %", "2:4")
# Of controls and ideas.
FEWER_PATTERNS = ("60 %", "75 %", "2:4")


def cells() -> list[Cell]:
    """All cells, those that the conclusions rest on first."""
    grid = [Cell("grid", method, pattern, seed) for seed in SEEDS for pattern in PATTERNS for method in methods()]
    sweeps = [
        Cell(sweep, method, pattern, 0, str(value))
        for sweep, values in SWEEPS.items()
        for pattern in SWEPT_PATTERNS
        for method in SWEPT
        for value in values
    ]
    control = [
        Cell("controls", method, pattern, seed) for seed in SEEDS for pattern in FEWER_PATTERNS for method in controls()
    ]
    idea = [Cell("ideas", method, pattern, 0) for pattern in FEWER_PATTERNS for method in ideas()]
    return [Cell("grid", "dense", "", 0), *grid, *sweeps, *control, *idea]

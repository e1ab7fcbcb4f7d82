"""What the study runs: methods, patterns, seeds, one-factor sweeps and controls."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
# The control for weighted timesteps, in all patterns.
SUM_OF_SQUARES = "sink-aware Wanda, sum of squares"
# No position is this many standard deviations above the mean: the soft mask is 0 everywhere.
NO_MASK = 1e6


@dataclass(frozen=True)
class Cell:
    """One pruning and its evaluation.

    :param group: ``grid``, ``controls`` or the name of a sweep
    :param method: a key of :func:`methods` or :func:`controls`
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
    """Method → its modifier, for comparisons in which only one thing changes.

    Stock and sink-aware methods differ in more than inputs and mask: stock Wanda propagates, and stock SparseGPT is
    another implementation. Weighted timesteps need sums of squares, where the published statistic sums norms.
    """
    return {
        SUM_OF_SQUARES: _wanda(norm_aggregation="sum_of_squares"),
        "Wanda, corrupted, no mask, propagated": _wanda(sink_std=NO_MASK, propagate_error=True),
        "Wanda, corrupted, no mask, propagated, 1/t²": _wanda(
            sink_std=NO_MASK, propagate_error=True, timestep_weighting="inverse_square"
        ),
        "our SparseGPT, clean, no mask": _sparsegpt(calibrate_on="clean", sink_std=NO_MASK),
    }


# Sweep → values of its one factor in addition to the grid's (16, 5 and 2). Windows change the data, the others a field.
SWEEPS: dict[str, tuple[Any, ...]] = {
    "windows": (4, 64),
    "sample_interval": (25, 10),
    "sink_std": (1.0, 3.0),
}
SWEPT = {"sink-aware Wanda": _wanda, "sink-aware SparseGPT": _sparsegpt}
SWEPT_PATTERNS = ("60 %", "2:4")
# Of the other controls.
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
        Cell("controls", method, pattern, seed)
        for seed in SEEDS
        for pattern in PATTERNS
        for method in controls()
        if method == SUM_OF_SQUARES or pattern in FEWER_PATTERNS
    ]
    return [Cell("grid", "dense", "", 0), *grid, *sweeps, *control]

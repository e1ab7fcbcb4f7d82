"""What the study runs: models, methods, patterns, seeds, changes of one field, sweeps and controls."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from study_cache import CachedADMM, CachedSparseGPT, CachedWanda
from study_sinks import NO_MASK, mask_model_cells, sink_cells, sink_variants

from sinkprune_plugin.modifiers.oneshot_flow import stock_modifier

SEEDS = (0, 1, 2)
# The embedded model, and three that tools/ make (see docs/study.md), given with --model. The last two, the embedded
# model trained further on longer windows and a wider one, are for the experiments with the sink mask alone.
EMBEDDED, SECOND, LONG, WIDE = "tiny-llada", "tiny-gqa", "tiny-long", "tiny-wide"
MODELS = (EMBEDDED, SECOND)
MASK_MODELS = (LONG, WIDE)
ALL_MODELS = (*MODELS, *MASK_MODELS)
# Pattern → sparsity, mask structure; the last two outside the grid.
PATTERNS = {
    "50 %": (0.5, "0:0"),
    "60 %": (0.6, "0:0"),
    "75 %": (0.75, "0:0"),
    "2:4": (0.5, "2:4"),
    "4:8": (0.5, "4:8"),
    "85 %": (0.85, "0:0"),
    "90 %": (0.9, "0:0"),
}
GRID_PATTERNS = ("50 %", "60 %", "75 %", "2:4", "4:8")
# Of the one-field changes.
CHANGE_PATTERNS = ("75 %", "2:4")
# The control for weighted timesteps, in all patterns.
SUM_OF_SQUARES = "sink-aware Wanda, sum of squares"
# The names of the methods that the page compares first.
ALPS, OURS = "ALPS-like, clean", "sink-aware ADMM"
RECONSTRUCTED = "sink-aware Wanda, reconstruct"
SECOND_METHODS = (
    "magnitude",
    "Wanda",
    "Wanda, corrupted, no mask",
    "sink-aware Wanda",
    RECONSTRUCTED,
    "SparseGPT",
    "SparseGPT, corrupted, no mask",
    "sink-aware SparseGPT",
    ALPS,
    OURS,
)
MAIN = ("Wanda", RECONSTRUCTED, "SparseGPT", "sink-aware SparseGPT", ALPS, OURS)


@dataclass(frozen=True)
class Cell:
    """One pruning and its evaluation.

    :param group: ``grid``, ``controls``, ``changes``, ``sinks`` or the name of a sweep
    :param method: a key of :func:`makers`
    :param pattern: see :data:`PATTERNS`
    :param seed: of calibration windows and corruption
    :param value: what is swept, as text; empty in the grid
    :param model: one of :data:`ALL_MODELS`
    """

    group: str
    method: str
    pattern: str
    seed: int
    value: str = ""
    model: str = EMBEDDED

    @property
    def key(self) -> str:
        """Name of the cell in the results."""
        return "/".join((self.model, self.group, self.method, self.pattern, str(self.seed), self.value))


Maker = Callable[[float, str, int], Any]


def _maker(kind: type, **fields: Any) -> Maker:
    return lambda sparsity, structure, seed: kind(sparsity=sparsity, mask_structure=structure, seed=seed, **fields)


def _wanda(**fields: Any) -> Maker:
    return _maker(CachedWanda, **fields)


def _sparsegpt(**fields: Any) -> Maker:
    return _maker(CachedSparseGPT, **fields)


def _admm(**fields: Any) -> Maker:
    return _maker(CachedADMM, **fields)


def makers() -> dict[str, Maker | None]:
    """Every method of the study."""
    return methods() | controls() | changes() | sink_variants()


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
        RECONSTRUCTED: _wanda(reconstruct=True),
        # As ALPS calibrates: clean inputs of the model as pruned so far, its own output as the target, a block at once.
        ALPS: _admm(calibrate_on="clean", sink_std=NO_MASK, target="current", within_block="parallel"),
        OURS: _admm(),
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


def changes() -> dict[str, Maker]:
    """What is changed in the sink-aware ADMM modifier, one field each; the solver is another modifier's."""
    return {
        "clean inputs instead of the trajectory": _admm(calibrate_on="clean"),
        "SparseGPT's solver": _sparsegpt(target="dense", within_block="sequential"),
        "current output as the target": _admm(target="current"),
        "Linears of a block at once": _admm(within_block="parallel", target="dense"),
        "no sink mask": _admm(sink_std=NO_MASK),
        "transient sinks only": _admm(sink_scope="transient"),
        "timesteps weighted 1/t": _admm(timestep_weighting="inverse"),
        "early blocks sparser": _admm(allocation="early_sparser"),
        "late blocks sparser": _admm(allocation="late_sparser"),
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
    """All cells."""
    return [*_earlier_cells(), *_later_cells()]


def _earlier_cells() -> list[Cell]:
    """Wanda and SparseGPT on the embedded model."""
    earlier = [method for method in methods() if method not in (RECONSTRUCTED, ALPS, OURS)]
    grid = [Cell("grid", method, pattern, seed) for seed in SEEDS for pattern in GRID_PATTERNS for method in earlier]
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
        for pattern in GRID_PATTERNS
        for method in controls()
        if method == SUM_OF_SQUARES or pattern in FEWER_PATTERNS
    ]
    return [Cell("grid", "dense", "", 0), *grid, *sweeps, *control]


def _later_cells() -> list[Cell]:
    """The solver of masks and weights together, on both models, those first that the conclusions rest on."""
    found = [Cell("grid", "dense", "", 0, model=SECOND)]
    for model in MODELS:
        new = (RECONSTRUCTED, ALPS, OURS) if model == EMBEDDED else SECOND_METHODS
        found += [
            Cell("grid", method, pattern, seed, model=model)
            for pattern in GRID_PATTERNS
            for method in new
            for seed in SEEDS
        ]
        found += [
            Cell("changes", change, pattern, seed, model=model)
            for pattern in CHANGE_PATTERNS
            for change in changes()
            for seed in SEEDS
            # One sparsity is spread over the blocks only where the pattern doesn't fix it.
            if pattern != "2:4" or "sparser" not in change
        ]
        found += [
            Cell("sinks", method, pattern, seed, model=model) for method, pattern in sink_cells() for seed in SEEDS
        ]
    for model in MASK_MODELS:
        found.append(Cell("grid", "dense", "", 0, model=model))
        # All of a seed before the next one: what is left over then is whole seeds.
        found += [
            Cell("sinks", method, pattern, seed, model=model)
            for seed in SEEDS
            for method, pattern in mask_model_cells()
        ]
    return found

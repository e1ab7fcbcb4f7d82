"""Where the sink mask might help: experiments that are no fields of the product."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from pydantic import PrivateAttr, model_validator
from study_cache import CachedADMM, CachedSparseGPT, CachedWanda, DenseRun, dense_runs

from sinkprune_plugin.modifiers.base import SinkAwareModifierBase
from sinkprune_plugin.modifiers.passes import CalibrationPass, PassEngine, Watch
from sinkprune_plugin.sinks import soft_sink_mask

__all__ = [
    "KINDS",
    "NO_MASK",
    "NO_MASK_NAME",
    "SINK_PATTERNS",
    "WHERES",
    "mask_model_cells",
    "masks_of",
    "share_meters",
    "sink_cells",
    "sink_variants",
]

# No position is this many standard deviations above the mean: the soft mask is 0 everywhere.
NO_MASK = 1e6
STD = 2.0
Where = Literal["model", "layer", "short values", "long inputs", "random"]
# What is masked → how it is found. All thresholds are two standard deviations of a window's positions.
WHERES: dict[str, Where] = {
    "sinks of each layer": "layer",
    "short values": "short values",
    "long inputs": "long inputs",
    "random positions": "random",
}
LOW_NOISE = 0.3
NO_MASK_NAME, MODEL_SINKS = "no mask", "sinks of the model"


class _Somewhere(SinkAwareModifierBase):
    """Masks positions that are found in another way than by the model's attention mass.

    :param where: how
    :param low_noise: calibrate at t ≤ 0.3 only
    """

    where: Where = "model"
    low_noise: bool = False

    _seen: DenseRun = PrivateAttr()
    _sinks_of_model: list[torch.Tensor] = PrivateAttr(default_factory=list)
    # Passes that each input has been observed in: always all of them, in order.
    _observed: dict[str, int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _leave_out_noise(self) -> "_Somewhere":
        if self.low_noise:
            self._grid = tuple(t for t in self._grid if t <= LOW_NOISE + 1e-9)
        return self

    def _find_sinks(
        self, engine: PassEngine, passes: Sequence[CalibrationPass], watch: Watch | None = None
    ) -> list[torch.Tensor]:
        self._seen = dense_runs.of(self, engine, passes)
        masks = super()._find_sinks(engine, passes, watch)
        steps = len(self._grid)
        self._sinks_of_model = [masks[number // steps][:, number % steps] for number in range(len(passes))]
        # Other masks differ between Linears and are applied where these are observed.
        return masks if self.where == "model" else [torch.zeros_like(mask) for mask in masks]

    def _observe(self, leader: str, x: torch.Tensor, each: CalibrationPass) -> None:
        number = self._observed.get(leader, 0)
        self._observed[leader] = number + 1
        if self.where != "model":
            each = replace(each, row_weights=each.row_weights * (1 - self._mask(leader, number)))
        super()._observe(leader, x, each)  # type: ignore[safe-super]

    def _mask(self, leader: str, number: int) -> torch.Tensor:
        """(B, T) mask of one Linear in one pass, 1 at the positions to leave out."""
        if self.where == "model":
            return self._sinks_of_model[number]
        block = cast(int, next(target.block for target in self._targets if target.name == leader))
        if self.where == "layer":
            return soft_sink_mask(self._seen.masses[number][block], STD, self.sink_alpha)
        if self.where == "short values":
            return _above(-self._seen.value_norms[number][block])
        if self.where == "long inputs":
            return _above(self._seen.inputs[leader][number].norm(dim=-1))
        mask = self._sinks_of_model[number]
        generator = torch.Generator().manual_seed(number)
        return torch.stack([row[torch.randperm(len(row), generator=generator)] for row in mask])


class _OnlyShares(_Somewhere, CachedADMM):
    """Prunes nothing and measures what a mask takes out."""

    _shares: dict[str, float] = PrivateAttr(default_factory=dict)

    def _prune_in_one_sweep(
        self, engine: PassEngine, passes: Sequence[CalibrationPass], *, propagate: bool, two_streams: bool = False
    ) -> None:
        del engine, passes, propagate, two_streams
        taken: dict[str, list[float]] = {}
        for leader, inputs in self._seen.inputs.items():
            sums = taken.setdefault(leader.rsplit(".", 1)[-1], [0.0, 0.0])
            rows = taken.setdefault("positions", [0.0, 0.0])
            for number, x in enumerate(inputs):
                squares = x.square().sum(dim=-1)
                mask = self._mask(leader, number)
                sums[0] += float((mask * squares).sum())
                sums[1] += float(squares.sum())
                rows[0] += float(mask.sum())
                rows[1] += mask.numel()
        # The summary says how many of the weights are zero.
        self._weights = 1
        self._shares = {name: masked / total for name, (masked, total) in taken.items()}


def share_meters() -> dict[str, Callable[[], _OnlyShares]]:
    """Mask → a modifier that measures, instead of pruning, which share of positions and of Σ x² the mask takes out."""
    wheres: dict[str, Where] = {MODEL_SINKS: "model", **WHERES}
    return {label: functools.partial(_OnlyShares, sparsity=0.5, where=where) for label, where in wheres.items()}


def _above(values: torch.Tensor) -> torch.Tensor:
    limit = values.mean(dim=-1, keepdim=True) + STD * values.std(dim=-1, keepdim=True, correction=0)
    return (values > limit).to(torch.float32)


class SomewhereADMM(_Somewhere, CachedADMM):
    """ADMM with another mask."""


class SomewhereSparseGPT(_Somewhere, CachedSparseGPT):
    """SparseGPT with another mask."""


class SomewhereWanda(_Somewhere, CachedWanda):
    """Wanda with another mask."""


SINK_PATTERNS = ("75 %", "2:4", "85 %")
KINDS = {"Wanda": SomewhereWanda, "SparseGPT": SomewhereSparseGPT, "ADMM": SomewhereADMM}


def masks_of() -> list[tuple[str, str]]:
    """Every mask, and what it is compared with: the same calibration without one."""
    low = "low noise, "
    pairs = [(label, NO_MASK_NAME) for label in (MODEL_SINKS, *WHERES)]
    return [*pairs, (low + MODEL_SINKS, low + NO_MASK_NAME)]


def sink_variants() -> dict[str, Callable[[float, str, int], Any]]:
    """Method → its modifier: every solver with every mask, with none, and both at low noise only."""

    def maker(kind: type, **fields: Any) -> Callable[[float, str, int], Any]:
        return lambda sparsity, structure, seed: kind(sparsity=sparsity, mask_structure=structure, seed=seed, **fields)

    made = {}
    for name, kind in KINDS.items():
        made[f"{name}, {NO_MASK_NAME}"] = maker(kind, sink_std=NO_MASK)
        made[f"{name}, {MODEL_SINKS}"] = maker(kind)
        made |= {f"{name}, {label}": maker(kind, where=where) for label, where in WHERES.items()}
        made[f"{name}, low noise, {NO_MASK_NAME}"] = maker(kind, sink_std=NO_MASK, low_noise=True)
        made[f"{name}, low noise, {MODEL_SINKS}"] = maker(kind, low_noise=True)
    return made


def sink_cells() -> list[tuple[str, str]]:
    """Method and pattern of the experiments, those first that could tell most."""
    pair = (NO_MASK_NAME, MODEL_SINKS)
    found = [(f"{kind}, {mask}", "85 %") for kind in KINDS for mask in pair]
    # The pairs with sparsities of the grid are in it.
    found += [(f"{kind}, {mask}", "75 %") for kind in KINDS for mask in WHERES]
    found += [(f"{kind}, low noise, {mask}", "75 %") for kind in KINDS for mask in pair]
    found += [(f"{kind}, {mask}", "2:4") for kind in KINDS for mask in WHERES]
    return found


def mask_model_cells() -> list[tuple[str, str]]:
    """Method and pattern of the experiments on the models with longer windows and with wider blocks."""
    masks = (NO_MASK_NAME, MODEL_SINKS, *WHERES)
    found = [(f"{kind}, {mask}", "75 %") for kind in KINDS for mask in masks]
    return found + [(f"{kind}, {mask}", "2:4") for kind in KINDS for mask in masks[:2]]

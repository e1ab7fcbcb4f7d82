"""One run of the dense model for all cells with the same calibration data.

Sinks and the dense model's inputs depend on model, data and timesteps, not on how it is pruned, so the cells share
them. tests/tools/test_study.py checks that the weights are those of the plain modifiers, bit by bit.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import PrivateAttr

from sinkprune_plugin.modifiers.admm import SinkAwareADMMModifier
from sinkprune_plugin.modifiers.base import SinkAwareModifierBase
from sinkprune_plugin.modifiers.hessian_base import HessianModifierBase
from sinkprune_plugin.modifiers.input_observer import InputObserver
from sinkprune_plugin.modifiers.passes import CalibrationPass, OnloadedBlock, PassEngine, Watch
from sinkprune_plugin.modifiers.sparsegpt import SinkAwareSparseGPTModifier
from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.modifiers.trajectory import without_sinks
from sinkprune_plugin.modifiers.wanda import SinkAwareWandaModifier
from sinkprune_plugin.sinks import capture_attention_mass, soft_sink_mask, transient_sink_mask

# Not a base class at run time: its fields' defaults would come before those of the modifiers.
if TYPE_CHECKING:
    _Base = HessianModifierBase
else:
    _Base = object

__all__ = ["CachedADMM", "CachedSparseGPT", "CachedWanda", "DenseRun", "dense_runs"]


@dataclass
class DenseRun:
    """What the dense model did in every pass.

    :param leaders: target → the first target with the same input
    :param inputs: leader → its (B, T, C) input in each pass
    :param masses: for each pass (L, B, T) float32, attention mass by block
    :param value_norms: for each pass (L, B, T) float32, length of the values by block
    """

    leaders: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    masses: list[torch.Tensor] = field(default_factory=list)
    value_norms: list[torch.Tensor] = field(default_factory=list)


class DenseRuns:
    """The runs of this process; their inputs are in files, which are unlinked at once."""

    def __init__(self) -> None:
        # Name of the calibration data that is in use; None: nothing is shared.
        self.data: Any = None
        self._runs: dict[Any, DenseRun] = {}

    def of(self, modifier: SinkAwareModifierBase, engine: PassEngine, passes: Sequence[CalibrationPass]) -> DenseRun:
        """The run of these passes.

        :param modifier: a modifier before it prunes
        :param engine: its engine
        :param passes: its passes; only their number of them and the modifier's timesteps tell them apart
        """
        key = (self.data, modifier._grid, modifier.noise_eps, len(passes))
        if key not in self._runs:
            self._runs[key] = _run_dense(modifier, engine, passes)
        return self._runs[key]


dense_runs = DenseRuns()


def _run_dense(modifier: SinkAwareModifierBase, engine: PassEngine, passes: Sequence[CalibrationPass]) -> DenseRun:
    run = DenseRun()
    masses: list[list[torch.Tensor]] = [[] for _ in passes]
    norms: list[list[torch.Tensor]] = [[] for _ in passes]

    with capture_attention_mass() as capture:

        def visit(block: OnloadedBlock) -> None:
            targets = [target for target in modifier._targets if target.block == block.index]
            observer = InputObserver(targets, lambda name, x, _: run.inputs.setdefault(name, []).append(_in_file(x)))
            now = [0]

            @contextlib.contextmanager
            def watch(number: int, each: CalibrationPass) -> Iterator[None]:
                now[0] = number
                capture.reset()
                with observer.watching(number, each):
                    yield
                masses[number].append(capture.mass)

            def values(_module: Any, _args: Any, output: torch.Tensor) -> None:
                norms[now[0]].append(output.norm(dim=-1))

            handles = observer.attach(modifier.register_hook)
            handles |= {
                modifier.register_hook(target.module, values, "forward")
                for target in targets
                if target.name.endswith("v_proj")
            }
            block.run(watch, advance=True)
            modifier.remove_hooks(handles)
            run.leaders |= observer.leaders

        engine.sweep(passes, visit, title="dense run", block_runs=0)
    run.masses, run.value_norms = [torch.stack(each) for each in masses], [torch.stack(each) for each in norms]
    return run


def _in_file(x: torch.Tensor) -> torch.Tensor:
    # Mapped, so that the system may write it back when memory is short.
    with tempfile.TemporaryDirectory(prefix="study-") as directory:
        mapped = torch.from_file(str(Path(directory) / "x"), shared=True, size=x.numel(), dtype=x.dtype)
    return mapped.view(x.shape).copy_(x)


def _sinks(modifier: SinkAwareModifierBase, run: DenseRun) -> list[torch.Tensor]:
    """As ``SinkAwareModifierBase._find_sinks``, on masses that are there."""
    steps = len(modifier._grid)
    masks = []
    for first in range(0, len(run.masses), steps):
        # Block by block, as the sweep adds them.
        mass = torch.stack([_added(each) for each in run.masses[first : first + steps]], dim=1)
        mask = soft_sink_mask(mass, modifier.sink_std, modifier.sink_alpha)
        modifier._tally.add(mask)
        masks.append(
            transient_sink_mask(mask, modifier.sink_persistence) if modifier.sink_scope == "transient" else mask
        )
    return masks


def _added(layers: torch.Tensor) -> torch.Tensor:
    total = layers[0]
    for layer in layers[1:]:
        total = total + layer
    return total


class _OnDenseRun(_Base):
    """Takes sinks and dense inputs from the shared run; no model itself, which would bring its own defaults along."""

    _run: DenseRun | None
    _number: int

    def _find_sinks(
        self, engine: PassEngine, passes: Sequence[CalibrationPass], watch: Watch | None = None
    ) -> list[torch.Tensor]:
        del watch
        return _sinks(self, dense_runs.of(self, engine, passes))

    def _prune_in_one_sweep(
        self, engine: PassEngine, passes: Sequence[CalibrationPass], *, propagate: bool, two_streams: bool = False
    ) -> None:
        self._run = dense_runs.of(self, engine, passes) if two_streams else None
        super()._prune_in_one_sweep(engine, passes, propagate=propagate)

    def _prune_block(
        self, block: OnloadedBlock, targets: Sequence[PruningTarget], *, advance_dense: bool, last: bool
    ) -> None:
        assert not advance_dense
        for group in self._groups(block, targets):
            self._observe_and_prune(group, lambda watch: block.run(self._numbered(watch)), stop=True)
        if not last:
            block.run(advance=True)

    def _numbered(self, watch: Watch) -> Watch:
        @contextlib.contextmanager
        def numbered(number: int, each: CalibrationPass) -> Iterator[None]:
            self._number = number
            with watch(number, each):
                yield

        return numbered

    def _observe(self, leader: str, x: torch.Tensor, each: CalibrationPass) -> None:
        if self._run is not None:
            self._dense_inputs[leader] = self._run.inputs[leader][self._number], None
        super()._observe(leader, x, each)


class CachedADMM(_OnDenseRun, SinkAwareADMMModifier):
    """The modifier, on the shared run."""

    _run: DenseRun | None = PrivateAttr(default=None)
    _number: int = PrivateAttr(default=0)


class CachedSparseGPT(_OnDenseRun, SinkAwareSparseGPTModifier):
    """The modifier, on the shared run."""

    _run: DenseRun | None = PrivateAttr(default=None)
    _number: int = PrivateAttr(default=0)


class CachedWanda(SinkAwareWandaModifier):
    """The modifier, on the shared run where errors aren't propagated."""

    def _find_sinks(
        self, engine: PassEngine, passes: Sequence[CalibrationPass], watch: Watch | None = None
    ) -> list[torch.Tensor]:
        del watch
        return _sinks(self, dense_runs.of(self, engine, passes))

    def _prune_on_kept_inputs(self, engine: PassEngine, passes: Sequence[CalibrationPass]) -> None:
        run = dense_runs.of(self, engine, passes)
        masks = self._find_sinks(engine, passes)
        weighted = without_sinks(passes, masks, self._grid, self.timestep_weighting)
        for leader, inputs in run.inputs.items():
            for x, each in zip(inputs, weighted, strict=True):
                self._observe(leader, x, each)
        self._finite.require()
        self._prune(self._targets, run.leaders)

"""Expert pruning as an llm-compressor modifier: whole experts go, and a smaller mixture stays."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import align_module_device, disable_onloading
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import PrivateAttr

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.decoder_blocks import find_decoder_blocks
from sinkprune_plugin.models.expert_lists import (
    check_expert_modules,
    experts_of,
    keep_experts,
    note_kept_experts,
    set_expert_counts,
)
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.base import SinkAwareModifierBase
from sinkprune_plugin.modifiers.expert_allocation import ExpertAllocation
from sinkprune_plugin.modifiers.expert_choice import ExpertChoice
from sinkprune_plugin.modifiers.passes import CalibrationPass, OnloadedBlock, PassEngine
from sinkprune_plugin.modifiers.recipe_order import earlier_modifiers
from sinkprune_plugin.modifiers.routing import RoutedLayer, find_routed_layers
from sinkprune_plugin.modifiers.run_estimate import SweepPlan
from sinkprune_plugin.modifiers.targets import PRUNABLE_DTYPES
from sinkprune_plugin.modifiers.trajectory import clean_pass, spec_of, without_sinks
from sinkprune_plugin.pruning.experts import RoutedSums, WeightSums, weight_importance

__all__ = ["ExpertPruningModifier"]


class ExpertPruningModifier(ExpertAllocation):
    """Remove whole experts from a mixture-of-experts diffusion LM.

    Scores: AIMER (arXiv 2603.18492) and the norm, which need the weights alone; REAP (arXiv 2510.13999) and the
    frequency of choice, which need tokens, here along the denoising trajectory and without attention sinks (arXiv
    2602.17664). All are taken from the dense model, before any expert goes.

    Sample yaml:

    ```yaml
    prune_stage:
      prune_modifiers:
        ExpertPruningModifier:
          experts: 0.25
          score: aimer
    ```

    Lifecycle:

    - on_initialize: check that the routers can do with what stays
    - on_calibration_start:
        - score the experts; for ``reap`` and ``frequency`` find the sinks, and sum over the tokens of each expert
        - for ``allocation: search`` try how many of each block are to go
        - take the others out, with their rows of the router, and write the numbers into the model's configuration
    - on_finalize: remove hooks

    Further fields: those of :class:`SinkAwareFields` about timesteps, sinks, ``seed`` and ``hidden_states``, which the
    scores without calibration don't read unless there is a search, and ``allocation_spread``, ``allocation_note``,
    ``search_budget`` and ``search_directory``.

    :param experts: experts to remove from each decoder block: a share in [0, 1) or a number, or a list with one of them
        for each block, 0 in blocks without experts
    :param score: ``aimer``, ``magnitude``, ``reap`` or ``frequency``; see :mod:`sinkprune_plugin.pruning.experts`
    :param allocation: ``uniform``: as many from each block; all others remove as many in all. ``early_sparser`` and
        ``late_sparser``: the share falls or rises linearly over the blocks by twice ``allocation_spread``; ``error``:
        those that cost the least anywhere, the experts with the smallest share of the score of their block, or with
        the highest AIMER of all; ``search``: the numbers with the least distance to the dense model's predictions
    :param calibrate_on: ``corrupted``: the tokens of all timesteps, without sinks; ``clean``: clean samples in which
        all tokens count alike, as REAP is published
    """

    _earlier: list[Modifier] = PrivateAttr(default_factory=list)
    _summary: str = PrivateAttr(default="")

    # ---- lifecycle

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check everything that can be checked before the first pass.

        :param state: session state with the model and, in ``data.calib``, the calibration loader
        :return: True
        :raises UsageError: if the model has no experts, its routers can't do with what stays, or there is no data and
            the score needs some
        """
        self._earlier = earlier_modifiers(self)
        if self.needs_data:
            return super().on_initialize(state, **kwargs)
        distributed.use_own_device()
        self._find_targets(state.model)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Score the experts, with calibration passes if the score needs them, and remove the others.

        :param state: session state
        :param event: the event that started calibration
        :raises UsageError: see :class:`CalibratingModifierBase`
        """
        if self.needs_data:
            super().on_calibration_start(state, event, **kwargs)
        elif not self._done:
            started = time.monotonic()
            self._find_targets(state.model)
            self._remove(state.model, self._weight_importances(state.model))
            self._done = True
            self._log_summary(time.monotonic() - started)

    def _find_targets(self, model: torch.nn.Module) -> None:
        config: Any = model.config
        self._choice = ExpertChoice(config, self.experts, self.allocation, self.allocation_spread)
        check_expert_modules(model)
        _, self._blocks = find_decoder_blocks(model)
        for index in self._choice.layers if self.score_needs_data else ():
            if len(list(find_routed_layers("", self._blocks[index]))) != 1:
                raise UsageError(
                    f"the routing of decoder block {index} of {type(model).__name__} can't be observed, which score "
                    f"{self.score} needs; use score aimer"
                )
        with disable_onloading():
            for name, parameter in _expert_lists(model, self._blocks, self._choice.layers):
                if parameter.dtype not in PRUNABLE_DTYPES:
                    raise UsageError(f"{name} has {parameter.dtype} weights; remove experts before quantizing")

    # ---- scores

    def _weight_importances(self, model: torch.nn.Module) -> dict[int, torch.Tensor]:
        path = experts_of(model.config).experts
        importances = {}
        for index in self._choice.layers:
            sums = []
            experts = self._blocks[index].get_submodule(path)
            assert isinstance(experts, torch.nn.ModuleList)  # check_expert_modules
            for expert in experts:
                sums.append(WeightSums())
                for module in expert.modules():
                    if isinstance(module, torch.nn.Linear):
                        with align_module_device(module):
                            sums[-1].add(module.weight)
            importances[index] = weight_importance(sums, self.score, f"decoder block {index}")
        return importances

    def _calibrate_and_prune(self, engine: PassEngine) -> None:
        model = engine.model
        importances = self._routed_importances(engine) if self.score_needs_data else self._weight_importances(model)
        if self.allocation == "search":
            self._remove(model, importances, *self._search_counts(engine, importances))
        else:
            self._remove(model, importances)

    def _routed_importances(self, engine: PassEngine) -> dict[int, torch.Tensor]:
        if self.calibrate_on == "clean":
            passes = [clean_pass(batch, spec_of(self._corruption)) for batch in self._batches]
        else:
            noisy = self._corrupted_passes()
            passes = without_sinks(noisy, self._find_sinks(engine, noisy), self._grid, self.timestep_weighting)
        sums = {index: RoutedSums(layer.experts) for index, layer in self._choice.layers.items()}

        def visit(block: OnloadedBlock) -> None:
            module = self._blocks[block.index]
            layers = list(find_routed_layers(f"{block.index}", module)) if block.index in sums else []
            handles: set[Any] = set()
            watch = _OutputWatch()
            for layer in layers:
                handles |= watch.attach(layer, sums[block.index], self.register_hook)
            with distributed.failing_together():
                block.run(watch.watching, advance=block.index + 1 < len(self._blocks))
            self.remove_hooks(handles)

        title = self._title("scoring experts")
        engine.sweep(passes, visit, title=title, block_runs=len(passes) * len(self._blocks))
        importances = {}
        for index, each in sums.items():
            distributed.sum_everywhere(each.outputs)
            distributed.sum_everywhere(each.tokens)
            importances[index] = each.importance(self.score)
        return importances

    def _sweeps(self, clean: SweepPlan, noisy: SweepPlan) -> tuple[SweepPlan, ...]:
        if not self.score_needs_data:
            return ()
        return (clean,) if self.calibrate_on == "clean" else (noisy, noisy)

    def _statistics_bytes(self, noisy: SweepPlan) -> int:
        del noisy
        return 16 * sum(layer.experts for layer in self._choice.layers.values())

    # ---- removal

    def _remove(
        self,
        model: torch.nn.Module,
        importances: Mapping[int, torch.Tensor],
        removed: Mapping[int, int] | None = None,
        note: str | None = None,
    ) -> None:
        config: Any = model.config
        layers = self._choice.layers
        kept = self._choice.kept(importances, self.score, removed)
        removed = {index: layers[index].experts - len(numbers) for index, numbers in kept.items()}
        line = self.settle(removed, self._choice.blocks, note)
        if line is not None:
            logger.info(line)
        with disable_onloading():
            before = sum(parameter.numel() for parameter in model.parameters())
        for index, numbers in kept.items():
            keep_experts(model, index, numbers)
        note_kept_experts(config, kept)
        set_expert_counts(config, {index: len(numbers) for index, numbers in kept.items()})
        for modifier in self._earlier:
            if isinstance(modifier, SinkAwareModifierBase):
                modifier._kept_zeros.follow(model)
        with disable_onloading():
            after = sum(parameter.numel() for parameter in model.parameters())
        self._summary = described(self._choice, kept, self.score, before, after)

    def _log_summary(self, seconds: float) -> None:
        logger.info(f"{type(self).__name__}: {self._summary}, {seconds:.1f} s")


class _OutputWatch:
    """Adds the outputs of experts to the sums of their layer, while a pass is being run."""

    def __init__(self) -> None:
        self._pass: CalibrationPass | None = None

    @contextlib.contextmanager
    def watching(self, _number: int, each: CalibrationPass) -> Iterator[None]:
        self._pass = each
        try:
            yield
        finally:
            self._pass = None

    def attach(self, layer: RoutedLayer, sums: RoutedSums, register_hook: Any) -> set[Any]:
        handles = {layer.attach(register_hook)}
        for number, expert in enumerate(layer.experts):
            handles.add(register_hook(expert, partial(self._note, layer, sums, number), "forward"))
        return handles

    def _note(
        self,
        layer: RoutedLayer,
        sums: RoutedSums,
        number: int,
        _module: torch.nn.Module,
        _args: Any,
        output: torch.Tensor,
    ) -> None:
        if self._pass is None:
            return
        rows, router_weights = layer.rows_of(number)
        weights = self._pass.row_weights.to(rows.device).flatten()[rows] * self._pass.square_scale
        sums.add(number, layer.routed(number, output), router_weights, weights)


def described(choice: ExpertChoice, kept: Mapping[int, Sequence[int]], score: str, before: int, after: int) -> str:
    """The summary of a removal.

    :param choice: what was asked for
    :param kept: number of the block → experts that stay
    :param score: how they were chosen
    :param before: parameters before it
    :param after: parameters after it
    """
    counts = [len(numbers) for numbers in kept.values()]
    of = max(layer.experts for layer in choice.layers.values())
    stay = f"{counts[0]}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return (
        f"{stay} of {of} experts stay in each of {len(kept)} blocks ({score}), {before / 1e6:.1f} → "
        f"{after / 1e6:.1f} M parameters"
    )


def _expert_lists(
    model: torch.nn.Module, blocks: torch.nn.ModuleList, indices: Mapping[int, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    path = experts_of(model.config).experts
    for index in indices:
        for name, parameter in blocks[index].get_submodule(path).named_parameters():
            yield f"decoder block {index}: {path}.{name}", parameter

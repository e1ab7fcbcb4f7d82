"""What the modifiers that prune Linears share: statistics of their inputs, and the way from these to new weights."""

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from compressed_tensors.offload import align_module_device, get_execution_device
from llmcompressor.core import State
from llmcompressor.utils.metric_logging import CompressionLogger
from loguru import logger
from pydantic import Field, PrivateAttr

from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.block_sparsities import in_text, resolve_blocks
from sinkprune_plugin.modifiers.calibrating_base import CalibratingModifierBase
from sinkprune_plugin.modifiers.input_observer import InputObserver
from sinkprune_plugin.modifiers.kept_zeros import KeptZeros
from sinkprune_plugin.modifiers.passes import CalibrationPass, OnloadedBlock, PassEngine, Watch
from sinkprune_plugin.modifiers.recipe_order import blocks_at_its_turn, later_modifiers
from sinkprune_plugin.modifiers.routing import ExpertKey
from sinkprune_plugin.modifiers.run_estimate import SweepPlan
from sinkprune_plugin.modifiers.targets import PruningTarget, require_prunable_dtype, resolve_targets, solving_cost

__all__ = ["SinkAwareModifierBase"]

# From a weight (rows, C) and a sparsity to the pruned weight and its loss.
Solver = Callable[[torch.Tensor, float], tuple[torch.Tensor, float | None]]


class SinkAwareModifierBase(CalibratingModifierBase):
    """Abstract base of the modifiers that prune Linears.

    In the statistics of an expert's Linears only the tokens count that its router sends there, each times the router's
    weight, whether or not llm-compressor was told to calibrate all experts.

    Further fields: see :class:`SinkAwareFields`.

    :param min_expert_tokens: an expert that gets fewer tokens than this in the whole calibration has statistics of all
        tokens instead, as if each of them had been sent to it with a router's weight of 1
    """

    # Whether zeros in the weights are the result, which later modifiers must leave alone.
    _leaves_zeros: ClassVar[bool] = True

    min_expert_tokens: int = Field(default=128, ge=0)

    _kept_zeros: KeptZeros = PrivateAttr()
    # Experts that got too few tokens.
    _fed_experts: set[ExpertKey] = PrivateAttr(default_factory=set)
    _zeros: int = PrivateAttr(default=0)
    _weights: int = PrivateAttr(default=0)
    _block_sparsities: list[float] | None = PrivateAttr(default=None)

    # ---- lifecycle

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check everything that can be checked before the first pass.

        :param state: session state with the model and, in ``data.calib``, the calibration loader
        :return: True
        :raises UsageError: if the model, the targets or the data don't fit
        """
        self._kept_zeros = KeptZeros(type(self).__name__, later_modifiers(self) if self._leaves_zeros else [])
        super().on_initialize(state, **kwargs)
        for target in self._targets:
            require_prunable_dtype(target)
            self._structure.check_columns(target.name, target.module.in_features)
        if self.sparsity is not None:
            blocks = blocks_at_its_turn(self, len(self._blocks))
            left = [target for target in self._targets if target.block is None or target.block < blocks]
            values = resolve_blocks(self.sparsity, self.allocation, self.allocation_spread, left, blocks)
            if isinstance(self.allocation, str) and values is not None and isinstance(self.sparsity, float):
                self._settle(values, self.allocation)
            self._block_sparsities = values
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """See :class:`CalibratingModifierBase`; zeros that later modifiers filled are reported."""
        self._kept_zeros.finish()
        return super().on_finalize(state, **kwargs)

    def _find_targets(self, model: torch.nn.Module) -> None:
        """Set the Linears to prune and the decoder blocks; refuses a model that has none."""
        self._targets, self._blocks = resolve_targets(model, list(self.targets), self.ignore, routed=True)

    def _settle(self, values: list[float], note: str) -> None:
        """Take sparsities of the blocks that an allocation led to, also into the saved recipe.

        :param values: one for each block
        :param note: how they came about
        """
        # Plain assignment would run validation again.
        self.__dict__.update(allocation=values, allocation_note=note)
        self._block_sparsities = values
        logger.info(f"{type(self).__name__}: sparsity by block {in_text(values)} ({note})")

    # ---- for the subclasses

    @abstractmethod
    def _observe(self, leader: str, x: torch.Tensor, each: CalibrationPass) -> None:
        """Add one input to the statistics.

        :param leader: name of the target that the input belongs to
        :param x: (B, T, C) input
        :param each: the pass that it comes from, with the token weights
        """

    @abstractmethod
    def _take_statistics(self, leader: str) -> list[torch.Tensor]:
        """Hand over the complete statistics of this process, to be summed over the processes.

        :param leader: name under which they were gathered
        :return: statistics that are sums over tokens
        """

    @abstractmethod
    def _solver(self, leader: str, statistics: list[torch.Tensor], device: torch.device) -> Solver:
        """Prepare what all targets with one input share.

        :param leader: name of the first of them
        :param statistics: sums over all processes; may be overwritten
        :param device: device on which to solve
        :return: function from a weight (rows, C) and a sparsity to the pruned weight in the same dtype, and its loss
            if there is one
        """

    # ---- statistics, solver, weights

    def _prune_in_one_sweep(
        self, engine: PassEngine, passes: Sequence[CalibrationPass], *, propagate: bool, two_streams: bool = False
    ) -> None:
        """Block by block: gather statistics, prune, pass the outputs on; then the targets outside of the blocks.

        :param engine: the engine
        :param passes: passes with their final token weights
        :param propagate: pass on the outputs of the pruned block; otherwise those of the dense one, which saves a run
        :param two_streams: see :meth:`PassEngine.sweep`
        """
        outside = [target for target in self._targets if target.block is None]

        def visit(block: OnloadedBlock) -> None:
            targets = [target for target in self._targets if target.block == block.index]
            last = block.index + 1 == len(self._blocks) and not outside
            self._prune_block(block, targets, advance_dense=not propagate, last=last)

        nothing = SweepPlan(0, 0)
        runs_per_block = self._sweeps(nothing, nothing)[-1].runs_per_block
        engine.sweep(
            passes,
            visit,
            title=self._title("pruning blocks"),
            block_runs=runs_per_block * len(self._blocks) * len(passes),
            two_streams=two_streams,
        )
        if outside:
            self._observe_and_prune(
                outside, lambda watch: engine.run_head(watch, title=self._title("pruning outside the blocks"))
            )

    def _prune_block(
        self, block: OnloadedBlock, targets: Sequence[PruningTarget], *, advance_dense: bool, last: bool
    ) -> None:
        """Prune a block and pass its outputs on.

        :param block: the block
        :param targets: targets in it, perhaps none
        :param advance_dense: pass on the outputs of the dense block, which saves a run, not of the pruned one
        :param last: its outputs aren't needed
        """
        # Experts may need another run before the outputs are passed on.
        later = advance_dense and any(target.expert for target in targets)
        if targets:
            self._observe_and_prune(
                targets,
                lambda watch: block.run(watch, advance=advance_dense and not later),
                before_pruning=(lambda _targets: block.run(advance=True)) if later and not last else None,
                stop=not advance_dense,
            )
        if not block.advanced and not last:
            with distributed.failing_together():
                block.run(advance=True)

    def _observe_and_prune(
        self,
        targets: Sequence[PruningTarget],
        run: Callable[[Watch], None],
        before_pruning: Callable[[Sequence[PruningTarget]], None] | None = None,
        *,
        stop: bool = False,
        dense: InputObserver | None = None,
    ) -> None:
        observer = InputObserver(targets, self._observe, stop=stop)
        with distributed.failing_together():
            handles = observer.attach(self.register_hook)
            run(observer.watching)
        self._feed_experts(observer, targets, run, dense)
        with distributed.failing_together():
            self.remove_hooks(handles)
            observer.require_reached()
            self._finite.require()
        if before_pruning is not None:
            before_pruning(targets)
        self._prune(targets, observer.leaders)

    def _feed_experts(
        self,
        observer: InputObserver,
        targets: Sequence[PruningTarget],
        run: Callable[[Watch], None],
        dense: InputObserver | None,
    ) -> None:
        """Replace the statistics of experts that got too few tokens; the run's watch is still attached.

        Experts that got tokens in other processes only have statistics without any here afterwards.
        """
        if not observer.tokens_of_experts:
            return
        everywhere = distributed.gather_objects((observer.tokens_of_experts, observer.leaders))
        # Without any token there are no statistics at all.
        floor = max(self.min_expert_tokens, 1)
        hungry = {key for key in everywhere[0][0] if sum(tokens[key] for tokens, _ in everywhere) < floor}
        if hungry:
            self._fed_experts |= hungry
            with distributed.failing_together():
                for target in targets:
                    if target.expert and target.expert.key in hungry and observer.leads(target.name):
                        self._take_statistics(target.name)
                with (
                    observer.all_tokens(hungry),
                    contextlib.nullcontext() if dense is None else dense.all_tokens(hungry),
                ):
                    run(observer.watching)
        with distributed.failing_together():
            observer.note_unreached({name: leader for _, leaders in everywhere for name, leader in leaders.items()})

    def _prune(self, targets: Sequence[PruningTarget], leaders: dict[str, str]) -> None:
        """Prune targets whose statistics are complete.

        :param targets: the targets
        :param leaders: target name → name under which its statistics were gathered
        """
        served, owners, statistics = self._summed_statistics(targets, leaders)
        solved: dict[str, torch.Tensor] = {}
        with distributed.failing_together(), torch.no_grad():
            for leader, group in served.items():
                mine = statistics.pop(leader)
                if owners[leader] == distributed.rank():
                    device = torch.device(get_execution_device(group[0].module))
                    solver = self._solver(leader, mine, device)
                    del mine
                    solved |= {target.name: self._solved(target, solver) for target in group}
        for leader, group in served.items():
            for target in group:
                weight = solved.pop(target.name, None)
                weight = distributed.replace_weight(target.module, weight, owners[leader])
                self._kept_zeros.remember(target.name, target.module, weight)
                self._zeros += int((weight == 0).sum())
                self._weights += weight.numel()

    def _summed_statistics(
        self, targets: Sequence[PruningTarget], leaders: dict[str, str]
    ) -> tuple[dict[str, list[PruningTarget]], dict[str, int], dict[str, list[torch.Tensor]]]:
        """Sum complete statistics; by leader: targets, the process that solves for them, and the sums, which it has."""
        served = {leader: [t for t in targets if leaders[t.name] == leader] for leader in sorted(set(leaders.values()))}
        owners = distributed.assign_owners(list(served), lambda leader: solving_cost(served[leader]))
        # All sums first, so that the processes then solve in parallel.
        statistics = {leader: self._take_statistics(leader) for leader in served}
        for leader in served:
            for tensor in statistics[leader]:
                distributed.reduce_to_owner(tensor, owners[leader])
        return served, owners, statistics

    def _solved(self, target: PruningTarget, solver: Solver) -> torch.Tensor:
        """Prune one weight, and log time and loss as llm-compressor does."""
        with align_module_device(target.module), CompressionLogger(target.module) as metrics:
            pruned, loss = solver(target.module.weight.detach(), self._sparsity_of(target))
            metrics.set_results(name=type(self).__name__, loss=loss)
        return pruned

    def _sparsity_of(self, target: PruningTarget) -> float:
        if self._block_sparsities is not None:
            assert target.block is not None  # resolve_blocks refuses others
            return self._block_sparsities[target.block]
        assert isinstance(self.sparsity, float)
        return self.sparsity

    def _log_summary(self, seconds: float) -> None:
        self._tally.reduce()
        counts = self._tally.sinks_per_timestep
        logger.info(
            f"{type(self).__name__}: {len(self._targets)} modules at sparsity {self._zeros / self._weights:.4f}, "
            f"{min(counts):.1f} to {max(counts):.1f} sinks per timestep, "
            f"{100 * self._tally.transient_share:.0f} % of them transient, {seconds:.1f} s"
        )
        if self._fed_experts:
            logger.info(
                f"{type(self).__name__}: {len(self._fed_experts)} experts got fewer than "
                f"{max(self.min_expert_tokens, 1)} tokens and have statistics of all tokens; more samples, or a lower "
                "min_expert_tokens, change that"
            )

"""What the searches for sparsities and for widths share: statistics of all Linears on the dense model's inputs."""

from collections.abc import Callable, Sequence

import torch

from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.base import SinkAwareModifierBase
from sinkprune_plugin.modifiers.block_sparsities import targets_by_block
from sinkprune_plugin.modifiers.input_observer import InputObserver
from sinkprune_plugin.modifiers.passes import CalibrationPass, OnloadedBlock, PassEngine
from sinkprune_plugin.modifiers.search_base import SearchBase
from sinkprune_plugin.modifiers.targets import PruningTarget

__all__ = ["SearchingModifierBase"]

# Receives the name under which statistics were gathered, the targets that share them, and their sums.
ReceiveStatistics = Callable[[str, Sequence[PruningTarget], list[torch.Tensor]], None]


class SearchingModifierBase(SearchBase, SinkAwareModifierBase):
    """Abstract base of the modifiers that solve Linears at several levels, for ``allocation: error`` and ``search``."""

    def _sweep_statistics(
        self,
        engine: PassEngine,
        passes: Sequence[CalibrationPass],
        targets: Callable[[int], Sequence[PruningTarget]],
        receive: ReceiveStatistics,
        after_block: Callable[[], None] = lambda: None,
    ) -> None:
        """Gather statistics on the dense model's inputs, in one sweep; weights stay as they are.

        :param engine: the engine
        :param passes: passes with their final token weights
        :param targets: index of a block → targets to gather them for
        :param receive: gets those of an input, summed, on the process that solves for its targets
        :param after_block: called in every process when it has got all of a block
        """

        def visit(block: OnloadedBlock) -> None:
            wanted = targets(block.index)
            groups = self._level_groups(wanted)
            for number, group in enumerate(groups):
                # Experts may need another run before the outputs are passed on.
                advance = number + 1 == len(groups) and not any(target.expert for target in group)
                self._gather_and_receive(block, group, receive, advance=advance)
            if not block.advanced:
                with distributed.failing_together():
                    block.run(advance=True)
            after_block()

        of_blocks = targets_by_block(self._targets)
        runs = sum(self._level_runs(of_blocks.get(index, [])) for index in range(len(self._blocks)))
        engine.sweep(passes, visit, title=self._title("levels of every block"), block_runs=len(passes) * runs)

    def _gather_and_receive(
        self, block: OnloadedBlock, group: Sequence[PruningTarget], receive: ReceiveStatistics, *, advance: bool
    ) -> None:
        observer = InputObserver(group, self._observe)
        with distributed.failing_together():
            handles = observer.attach(self.register_hook)
            block.run(observer.watching, advance=advance)
        self._feed_experts(observer, group, block.run, None)
        with distributed.failing_together():
            self.remove_hooks(handles)
            observer.require_reached()
            self._finite.require()
        served, owners, statistics = self._summed_statistics(group, observer.leaders)
        with distributed.failing_together(), torch.no_grad():
            for leader, targets in served.items():
                mine = statistics.pop(leader)
                if owners[leader] == distributed.rank():
                    receive(leader, targets, mine)

    def _level_groups(self, targets: Sequence[PruningTarget]) -> list[list[PruningTarget]]:
        """Targets of a block whose statistics are held at once: those of experts, then the others.

        :param targets: perhaps none
        """
        parts = ([target for target in targets if bool(target.expert) == routed] for routed in (True, False))
        return [part for part in parts if part]

    def _level_runs(self, targets: Sequence[PruningTarget]) -> int:
        """Runs of a block on all passes, without those that experts with too few tokens take."""
        groups = self._level_groups(targets)
        return max(len(groups) + bool(groups and groups[-1][0].expert), 1)

"""What the searches for sparsities and for widths share: statistics of all Linears on the dense model's inputs."""

from collections.abc import Callable, Sequence

import torch

from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.base import SinkAwareModifierBase
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
            observer = InputObserver(wanted, self._observe)
            with distributed.failing_together():
                handles = observer.attach(self.register_hook)
                block.run(observer.watching, advance=True)
                self.remove_hooks(handles)
                observer.require_reached()
                self._finite.require()
            served, owners, statistics = self._summed_statistics(wanted, observer.leaders)
            with distributed.failing_together(), torch.no_grad():
                for leader, group in served.items():
                    mine = statistics.pop(leader)
                    if owners[leader] == distributed.rank():
                        receive(leader, group, mine)
            after_block()

        engine.sweep(
            passes, visit, title=self._title("levels of every block"), block_runs=len(passes) * len(self._blocks)
        )

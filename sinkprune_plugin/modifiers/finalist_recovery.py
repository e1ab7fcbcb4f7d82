"""Training-aware choice: a search's finalists are recovered for a few steps before they are measured.

What is best as it was put together needn't be best after recovery. DarwinLM (arXiv 2502.07780) therefore trains the
candidates of a round a little before it compares them; here those of the last stage, and block by block: each block's
surviving weights are fitted to the dense block's outputs, as blockwise recovery does (:mod:`block_recovery`). That
takes the memory of one block, and no trained weight has to be kept: a block is fitted on the way through the model.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sinkprune_plugin.diffusion import DiffusionSpec
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.bare_modules import bare_copy
from sinkprune_plugin.modifiers.block_fit import FitOptions, fit_weights
from sinkprune_plugin.modifiers.block_influence import skipped
from sinkprune_plugin.modifiers.block_recovery import BlockExample
from sinkprune_plugin.modifiers.calibration import CalibrationBatch
from sinkprune_plugin.modifiers.fit_plan import FitPlan, PassId
from sinkprune_plugin.modifiers.passes import BlockCall, CalibrationPass, OnloadedBlock
from sinkprune_plugin.modifiers.prediction_distance import scored_passes
from sinkprune_plugin.modifiers.replaced_forward import forward_replaced, linear_with
from sinkprune_plugin.modifiers.trajectory import CorruptionSource

__all__ = ["STEP_PASSES", "BlockWeights", "FinalistRecovery"]

# Passes of a step, over all processes.
STEP_PASSES = 8

# Index of a decoder block → weights of Linears that differ from the dense ones, in their shape; None: it is left out.
BlockWeights = Callable[[int], Mapping[torch.nn.Linear, torch.Tensor] | None]


class FinalistRecovery:
    """Recovers candidates, each for the same steps on the same passes, so that they can be compared.

    :param blocks: the dense model's decoder blocks
    :param batches: clean samples of this process
    :param grid: timesteps
    :param corruption: source of the noise, another one than that of what is measured
    :param spec: family and mask token
    :param noise_eps: floor of the mask probability
    :param steps: the recipe's ``search_recovery_steps``
    """

    def __init__(
        self,
        blocks: torch.nn.ModuleList,
        batches: Sequence[CalibrationBatch],
        grid: Sequence[float],
        corruption: CorruptionSource,
        spec: DiffusionSpec,
        noise_eps: float,
        steps: int,
    ) -> None:
        self._blocks = blocks
        # In their order any stretch has windows and timesteps mixed.
        self._passes = [one.each for one in scored_passes(batches, grid, corruption, spec, noise_eps)]
        self._steps = steps
        weights = [float(each.row_weights.sum()) for each in self._passes]
        self._weights = distributed.gather_objects(weights)

    def of(self, weights: BlockWeights, number: int) -> "FinalistFit":
        """The recovery of one candidate.

        :param weights: the candidate
        :param number: number of the round; other rounds take other passes, where not all of them are taken
        :return: what :meth:`PredictionDistance.measure_fitted` takes
        """
        taken = self._steps * STEP_PASSES
        turns = [divmod(index, len(self._weights)) for index in range(number * taken, (number + 1) * taken)]
        order = [(rank, turn % len(self._weights[rank])) for turn, rank in turns]
        places = [sorted({each for owner, each in order if owner == rank}) for rank in range(len(self._weights))]
        position = {(rank, each): place for rank, mine in enumerate(places) for place, each in enumerate(mine)}
        steps = [order[begin : begin + STEP_PASSES] for begin in range(0, taken, STEP_PASSES)]
        return FinalistFit(
            self._blocks,
            weights,
            [self._passes[each] for each in places[distributed.rank()]],
            [[(rank, position[rank, each]) for rank, each in step] for step in steps],
            {(rank, place): self._weights[rank][each] for (rank, each), place in position.items()},
        )


class FinalistFit:
    """Fits a candidate's blocks, from the first to the last, as the visitor of a sweep of two streams.

    :param blocks: the dense model's decoder blocks
    :param weights: the candidate
    :param passes: this process's passes to fit on
    :param steps: passes of each step, over all processes, by rank and position in ``passes``
    :param pass_weights: sum of the token weights of each
    """

    def __init__(
        self,
        blocks: torch.nn.ModuleList,
        weights: BlockWeights,
        passes: Sequence[CalibrationPass],
        steps: Sequence[Sequence[PassId]],
        pass_weights: Mapping[PassId, float],
    ) -> None:
        self.passes = passes
        self._blocks = blocks
        self._candidate = weights
        self._steps = steps
        self._pass_weights = pass_weights

    def visit(self, block: OnloadedBlock, passes: Sequence[CalibrationPass]) -> None:
        """Run the dense block, fit the candidate's block to it, and pass both outputs on.

        :param block: the block, with the dense model's weights
        :param passes: all passes of the sweep, this one's at the end
        """
        module = self._blocks[block.index]
        with distributed.failing_together():
            block.advance_dense(lambda call: _called(module, call))
            given = self._candidate(block.index)
        if given is None:
            # The next block is fitted to outputs that this one had a part in.
            with distributed.failing_together():
                block.run(lambda *_: skipped(module), advance=True)
            return
        fitted = self._fit(block, module, given, passes)
        replaced = [(linear, linear_with(weight, linear)) for linear, weight in fitted.items()]
        with distributed.failing_together(), forward_replaced(replaced):
            block.run(advance=True)

    def _fit(
        self,
        block: OnloadedBlock,
        module: torch.nn.Module,
        given: Mapping[torch.nn.Linear, torch.Tensor],
        passes: Sequence[CalibrationPass],
    ) -> dict[torch.nn.Linear, torch.Tensor]:
        # Onloaded once; they stay until the sweep leaves the block.
        own = {name: each.detach() for name, each in [*module.named_parameters(), *module.named_buffers()]}
        linears = {
            f"{name}.weight": child for name, child in module.named_modules() if isinstance(child, torch.nn.Linear)
        }
        start = {name: given.get(linear, own[name]) for name, linear in linears.items()}
        first = len(passes) - len(self.passes)
        plan = FitPlan(tuple(tuple((rank, first + place) for rank, place in step) for step in self._steps), ())
        _, fitted = fit_weights(
            block.index,
            BlockExample(block, bare_copy(module), own, passes),
            start,
            frozenset(start),
            plan,
            {(rank, first + place): weight for (rank, place), weight in self._pass_weights.items()},
            FitOptions(held_out=0.0, judged=False),
            _nothing,
        )
        return {linears[name]: weight for name, weight in fitted.items()}


def _called(module: torch.nn.Module, call: BlockCall) -> Any:
    return module(call.hidden, *call.args, **call.kwargs)


def _nothing() -> None:
    """The search has a bar of its own."""

"""Blockwise recovery: after pruning, each decoder block is fitted to the dense model's hidden states, one by one."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.decoder_blocks import block_linears, find_decoder_blocks
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.bare_modules import bare_copy, compute_with
from sinkprune_plugin.modifiers.block_fit import BlockFit, FitOptions, fit_weights
from sinkprune_plugin.modifiers.calibration import calibration_context
from sinkprune_plugin.modifiers.fit_groups import TrainedWeight, fit_groups
from sinkprune_plugin.modifiers.fit_plan import FitPlan, PassId, plan_fit
from sinkprune_plugin.modifiers.hidden_states import Place
from sinkprune_plugin.modifiers.passes import BlockCall, CalibrationPass, OnloadedBlock, PassEngine
from sinkprune_plugin.modifiers.routing import expert_places

__all__ = ["BlockExample", "fit_blocks"]


def fit_blocks(
    model: torch.nn.Module,
    dense_weights: Mapping[str, torch.Tensor],
    passes: Sequence[CalibrationPass],
    timesteps: int,
    options: FitOptions | None = None,
    *,
    dense_blocks: Sequence[torch.nn.Module] | None = None,
    origins: Sequence[int] | None = None,
    linears: Collection[str] | None = None,
    hidden_states: Place = "memory",
    title: str = "recovering blocks",
    progress: bool = True,
) -> list[BlockFit]:
    """Fit the surviving weights of each decoder block of a pruned model, in place, first to last.

    The inputs are those that the pruned and already fitted blocks before it give, the target is what the dense block
    gives for the dense model's inputs in the same pass (as in "BRECQ", arXiv 2102.05426, and BESA, arXiv 2402.16880,
    which reconstruct blocks). No gradient passes from block to block, and one block at a time is trained: the memory is
    that of one block (:func:`block_fit.state_bytes`) and of the hidden states of both models.

    A routed expert is trained on the tokens that the pruned block's router sends to it; routers stay as they are.
    Experts whose states don't fit ``FitOptions.expert_state_gb`` are fitted group by group, each group on all passes
    with the others as they are by then.

    Zeros of the trained Linears stay as they are, bit for bit. With ``torch.distributed`` each process gives its own
    passes, and the gradients are summed.

    :param model: the pruned model; may be offloaded with compressed-tensors' caches
    :param dense_weights: full name → dense weight, read block by block: a mapping of
        ``formats.load_sparse_checkpoint`` will do
    :param passes: this process's passes, those of one window (or batch) one after the other
    :param timesteps: passes of a window, as many for each
    :param options: how each block is fitted
    :param dense_blocks: the dense model's blocks where their shapes differ (structured pruning), perhaps on the meta
        device or as :func:`bare_copy` gives them; None: as the pruned model's
    :param origins: number of each pruned block among the dense ones, rising, where whole blocks were removed; a block
        is then fitted to what the dense model gives up to the next one that is left. None: none was removed
    :param linears: full names of the Linears to train; None: all in the blocks
    :param hidden_states: where they wait between two blocks
    :param title: name of the progress bar
    :param progress: show it
    :return: one result for each block that has something to train
    :raises UsageError: if a dense weight is missing or has another shape, the model can't be run block by block, or the
        hidden states don't fit
    """
    options = options or FitOptions()
    blocks_name, blocks = find_decoder_blocks(model)
    plan, pass_weights = _plan(passes, timesteps, options)
    recovery = _Recovery(
        blocks_name,
        blocks,
        dense_weights,
        [bare_copy(block) for block in dense_blocks or blocks],
        origins if origins is not None else range(len(dense_blocks or blocks)),
        frozenset(linears if linears is not None else block_linears(model)),
        passes,
        plan,
        pass_weights,
        options,
    )
    recovery.check_dense_weights()
    engine = PassEngine(model, blocks, hidden_states=hidden_states, progress=progress)
    with calibration_context(model):
        engine.sweep(
            passes,
            recovery.visit,
            title=title,
            block_runs=sum(block_runs(plan, len(passes), options, groups) for groups in recovery.groups_of_blocks()),
            two_streams=True,
        )
    return recovery.results


def block_runs(plan: FitPlan, num_passes: int, options: FitOptions, groups: int = 1) -> int:
    """Runs of one block on one of this process's passes, at most: by both models, and in training and judging.

    :param plan: steps of all processes
    :param num_passes: passes of this process
    :param options: how the block is fitted
    :param groups: groups of its weights that are fitted one after the other
    :return: their number
    """
    mine = distributed.rank()
    trained = sum(rank == mine for step in plan.steps for rank, _ in step)
    judged = (
        sum(rank == mine for rank, _ in plan.held_out) * (1 + options.evaluations) if plan.held_out else 2 * num_passes
    )
    return 2 * num_passes + groups * (trained + judged)


def _plan(
    passes: Sequence[CalibrationPass], timesteps: int, options: FitOptions
) -> tuple[FitPlan, dict[PassId, float]]:
    if len(passes) % timesteps:
        raise ValueError(f"{len(passes)} passes are no multiple of {timesteps} timesteps")
    mine = [each.square_scale * float(each.row_weights.sum()) for each in passes]
    everywhere = distributed.gather_objects((mine, max(each.shape[0] for each in passes)))
    plan = plan_fit(
        [len(weights) // timesteps for weights, _ in everywhere],
        timesteps,
        step_passes=max(1, options.step_windows // max(windows for _, windows in everywhere)),
        epochs=options.epochs,
        held_out=options.held_out,
        seed=options.seed,
    )
    weights = {
        (rank, number): weight for rank, (theirs, _) in enumerate(everywhere) for number, weight in enumerate(theirs)
    }
    return plan, weights


class _Recovery:
    """What all blocks share; the visitor of the sweep."""

    def __init__(
        self,
        blocks_name: str,
        blocks: torch.nn.ModuleList,
        dense_weights: Mapping[str, torch.Tensor],
        dense_blocks: Sequence[torch.nn.Module],
        origins: Sequence[int],
        linears: frozenset[str],
        passes: Sequence[CalibrationPass],
        plan: FitPlan,
        pass_weights: Mapping[PassId, float],
        options: FitOptions,
    ) -> None:
        self.results: list[BlockFit] = []
        self._name = blocks_name
        self._blocks = blocks
        self._dense_weights = dense_weights
        self._dense_blocks = dense_blocks
        self._origins = origins
        self._linears = linears
        self._passes = passes
        self._plan = plan
        self._pass_weights = pass_weights
        self._options = options

    def check_dense_weights(self) -> None:
        """Refuse a mapping that lacks weights, before any work."""
        if len(self._origins) != len(self._blocks) or self._origins[-1] >= len(self._dense_blocks):
            raise UsageError(
                f"the dense model has {len(self._dense_blocks)} decoder blocks and the pruned one {len(self._blocks)}; "
                "name the model that it was pruned from"
            )
        for index, block in enumerate(self._dense_blocks):
            for name, _ in block.named_parameters(prefix=f"{self._name}.{index}"):
                if name not in self._dense_weights:
                    raise UsageError(f"the dense model has no {name}; name the model that this one was pruned from")

    def visit(self, block: OnloadedBlock) -> None:
        """Run the dense block, fit the pruned one to it, pass both outputs on."""
        module = self._blocks[block.index]
        # Onloaded once; they stay until the sweep leaves the block.
        own = {name: each.detach() for name, each in [*module.named_parameters(), *module.named_buffers()]}
        self._run_dense(block, own)
        groups = self._groups(block.index)
        if groups:
            self._fit(block, module, own, groups)
        if block.index + 1 < len(self._blocks):
            with distributed.failing_together():
                block.run(advance=True)

    def groups_of_blocks(self) -> list[int]:
        """Groups of weights that each block is fitted in."""
        # Only sizes are read, which must not onload weights.
        with disable_onloading():
            return [len(self._groups(index)) for index in range(len(self._blocks))]

    def _fit(
        self,
        block: OnloadedBlock,
        module: torch.nn.Module,
        own: Mapping[str, torch.Tensor],
        groups: Sequence[Sequence[TrainedWeight]],
    ) -> None:
        fitted: dict[str, torch.Tensor] = {}
        results = []
        for group in groups:
            # With what the groups before have come to.
            current = {**own, **fitted}
            names = [weight.name for weight in group]
            result, found = fit_weights(
                block.index,
                BlockExample(block, bare_copy(module), current, self._passes),
                {name: own[name] for name in names},
                frozenset(name for name in names if own[name].dim() > 1),
                self._plan,
                self._pass_weights,
                self._options,
                block.progress,
            )
            results.append(result)
            fitted |= found
        for name, weight in fitted.items():
            owner, _, attribute = name.rpartition(".")
            distributed.replace_weight(module.get_submodule(owner), weight, 0, attribute)
        self.results.append(_as_one(results))

    def _run_dense(self, block: OnloadedBlock, own: Mapping[str, torch.Tensor]) -> None:
        """Run the dense blocks up to the next one that is left, one at a time."""
        first = 0 if block.index == 0 else self._origins[block.index]
        last = block.index + 1 == len(self._blocks)
        for index in range(first, len(self._dense_blocks) if last else self._origins[block.index + 1]):
            bare = self._dense_blocks[index]
            with distributed.failing_together():
                tensors = self._dense_tensors(bare, index, own)
                block.advance_dense(partial(_compute, bare, tensors))

    def _dense_tensors(
        self, bare: torch.nn.Module, index: int, own: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        like = next(iter(own.values()))
        tensors = {}
        for name, meta in [*bare.named_parameters(), *bare.named_buffers()]:
            full = f"{self._name}.{index}.{name}"
            if full in self._dense_weights:
                tensor = self._dense_weights[full]
                if tensor.shape != meta.shape:
                    raise UsageError(
                        f"{full} is {list(tensor.shape)} in the dense weights, where {list(meta.shape)} is expected; "
                        "name the model that this one was pruned from"
                    )
                tensors[name] = tensor.to(like.device, meta.dtype)
            else:
                # Buffers that no checkpoint has, such as tables.
                tensors[name] = own[name]
        return tensors

    def _groups(self, index: int) -> list[list[TrainedWeight]]:
        """What is trained of a block, in groups that are fitted one after the other."""
        module, prefix = self._blocks[index], f"{self._name}.{index}."
        places = expert_places("", module)
        weights = []
        for name, child in module.named_modules():
            linear = isinstance(child, torch.nn.Linear)
            if not ((linear and prefix + name in self._linears) or (self._options.train_norms and _is_norm(child))):
                continue
            place = places.get(id(child))
            # Not the scales of a quantizer that follows in the recipe.
            for attribute in ("weight", "bias"):
                tensor = getattr(child, attribute, None)
                if tensor is not None:
                    expert = None if place is None else place.key
                    weights.append(TrainedWeight(f"{name}.{attribute}", tensor.numel(), tensor.dtype, expert))
        return fit_groups(weights, self._options.expert_state_gb * 1e9)


def _as_one(results: Sequence[BlockFit]) -> BlockFit:
    """What became of a block that was fitted in groups."""
    first, last = results[0], results[-1]
    return replace(
        last,
        before=first.before,
        kept_step=sum(result.kept_step for result in results),
        steps=sum(result.steps for result in results),
        diverged=any(result.diverged for result in results),
    )


def _is_norm(module: torch.nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def _compute(bare: torch.nn.Module, tensors: Mapping[str, torch.Tensor], call: BlockCall) -> Any:
    return compute_with(bare, tensors, call.hidden, *call.args, **call.kwargs)


class BlockExample:
    """The passes of a sweep as :func:`fit_weights` wants them.

    :param block: the block, its dense outputs passed on already
    :param bare: the same without weights
    :param own: its parameters and buffers
    :param passes: all passes of the sweep
    """

    def __init__(
        self,
        block: OnloadedBlock,
        bare: torch.nn.Module,
        own: Mapping[str, torch.Tensor],
        passes: Sequence[CalibrationPass],
    ) -> None:
        self._block = block
        self._bare = bare
        self._own = own
        self._passes = passes

    def predict(self, number: int, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See :class:`FitExample`."""
        call = self._block.call(number)
        output = _compute(self._bare, {**self._own, **tensors}, call)
        return output[0] if isinstance(output, tuple) else output

    def target(self, number: int) -> torch.Tensor:
        """See :class:`FitExample`."""
        return self._block.dense_output(number)

    def token_weights(self, number: int) -> torch.Tensor:
        """See :class:`FitExample`."""
        each = self._passes[number]
        return each.row_weights * each.square_scale

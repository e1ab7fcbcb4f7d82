"""Structured pruning as an llm-compressor modifier: whole units go, and a smaller dense model stays."""

import contextlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from compressed_tensors.offload import disable_onloading
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import PrivateAttr

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.models.block_sizes import block_sizes, units_of
from sinkprune_plugin.models.unit_linears import experts_in_block, unit_linears
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.base import Solver
from sinkprune_plugin.modifiers.block_influence import blocks_that_stay, least_influential, skipped
from sinkprune_plugin.modifiers.passes import OnloadedBlock, PassEngine
from sinkprune_plugin.modifiers.recipe_neighbours import check_later_modifiers, remove_units
from sinkprune_plugin.modifiers.recipe_order import earlier_modifiers, later_modifiers
from sinkprune_plugin.modifiers.run_estimate import SweepPlan
from sinkprune_plugin.modifiers.structured_allocation import StructuredAllocation
from sinkprune_plugin.modifiers.structured_fields import Amounts
from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.modifiers.unit_targets import FIELDS, UnitTarget, resolve_units
from sinkprune_plugin.pruning.hessian import prepare_hessian
from sinkprune_plugin.pruning.unit_removal import choose_units, without_columns
from sinkprune_plugin.pruning.units import Amount

__all__ = ["SinkAwareStructuredModifier"]


class SinkAwareStructuredModifier(StructuredAllocation):
    """Remove MLP channels, attention heads and decoder blocks from a diffusion LM, with statistics without sinks.

    The result is a smaller dense model. Which units go and how the rest is adapted is optimal brain surgeon for groups
    (ZipLM, arXiv 2302.04089) on second moments of the inputs along the denoising trajectory, without attention sinks
    (arXiv 2602.17664). The search over widths is that of DarwinLM (arXiv 2502.07780). The structured protocol of arXiv
    2602.17664 is unpublished; this is another one.

    Sample yaml:

    ```yaml
    prune_stage:
      prune_modifiers:
        SinkAwareStructuredModifier:
          mlp_channels: 0.5
    ```

    Lifecycle:

    - on_initialize: find the units, check every field and what the modifiers that follow need
    - on_calibration_start:
        - choose the blocks to remove: those whose absence changes the predictions along the trajectory least
        - find the sinks
        - unless ``allocation: uniform``: gather the second moments of the dense model, and choose the widths
        - block by block: choose units, adapt what stays, pass the outputs on
        - slice the Linears, take the blocks out, write the sizes into the model's configuration
    - on_finalize: remove hooks

    Further fields: see :class:`HessianModifierBase` and :class:`SinkAwareFields`; of the latter ``sparsity``,
    ``mask_structure`` and ``targets`` don't exist here.

    :param mlp_channels: channels to remove from the gated MLP, or from the expert that all tokens go to: a share in
        [0, 1) or a number, for all blocks or one for each
    :param expert_channels: channels to remove from each routed expert, likewise; all experts of a block lose as many,
        each those that it needs least
    :param attention_heads: query heads to remove, likewise; with grouped-query attention whole groups go
    :param blocks: decoder blocks to remove, a share or a number
    :param granularity: ``{channels: 64, heads: 1}``: widths that stay are multiples of it. By default channels have 64
        from 4096 on, else 8
    :param score: ``obs``: one unit at a time, each with the least rise of the output error if what stays is adapted;
        ``wanda`` and ``magnitude``: all at once, by ‖W_:j‖² H_jj or ‖W_:j‖² of the columns of the Linear that reads the
        unit
    :param compensate: adapt what stays by least squares, also after the latter two scores
    :param allocation: ``uniform``: the same share in every block; ``error``: the same rise of the output error for one
        more unit in every block; ``search``: evolutionary search, fitness is the divergence from the dense model's
        predictions along the trajectory
    :param target: whose outputs what stays should reproduce, ``dense`` or ``current``; see :class:`HessianModifierBase`
    :param preserve_sparsity_mask: single weights that are zero already stay zero while others adapt
    :param budget: with ``allocation: search``, ratio of dense to pruned such as ``1.5x``, in place of shares
    :param budget_of: ``latency`` of a denoising step, measured on this machine; ``parameters`` or ``flops``
    :param latency_batch_size: sequences in the forward passes that are timed
    :param levels: widths of each kind of units that a search may choose from
    :param search_budget: forward tokens that the choice of blocks and the search may spend, each
    """

    # Its zeros are taken out.
    _leaves_zeros: ClassVar[bool] = False

    # By the Linear that reads the units: units that stay, ascending.
    _kept: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
    _blocks_left: int = PrivateAttr(default=0)
    _earlier: list[Modifier] = PrivateAttr(default_factory=list)
    _later: list[Modifier] = PrivateAttr(default_factory=list)
    _summary: str = PrivateAttr(default="")

    # ---- lifecycle

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check everything that can be checked before the first pass.

        :param state: session state with the model and, in ``data.calib``, the calibration loader
        :return: True
        :raises UsageError: if the model, the units, the data or the modifiers that follow don't fit
        """
        super().on_initialize(state, **kwargs)
        # While a modifier runs, the recipe has no other.
        self._earlier, self._later = earlier_modifiers(self), later_modifiers(self)
        known = self.allocation == "uniform"
        widths = {unit.name: self._widths[unit.name] if known else unit.group.step for unit in self._units}
        check_later_modifiers(self._later, self._units, widths, self._blocks_left)
        return True

    def _find_targets(self, model: torch.nn.Module) -> None:
        units, self._blocks = resolve_units(model, self.ignore, self.granularity)
        for name in FIELDS.values():
            amount = getattr(self, name)
            if isinstance(amount, list) and len(amount) != len(self._blocks):
                raise UsageError(
                    f"{name} has {len(amount)} values, but the model has {len(self._blocks)} decoder blocks; give one "
                    "value, or one value for each block"
                )
        self._refuse_missing_units(model)
        # Where nothing of a kind goes, its Linears are left alone.
        budgeted = [] if self._ratio is None else [unit for unit in units if unit.kind != "expert_channels"]
        self._units = budgeted or [unit for unit in units if self._amount(unit)]
        self._widths = {unit.name: unit.group.kept(self._amount(unit)) for unit in self._units}
        self._targets = [unit.target for unit in self._units]
        self._blocks_left = blocks_that_stay(self.blocks, len(self._blocks))

    def _refuse_missing_units(self, model: torch.nn.Module) -> None:
        """Refuse amounts for blocks that have no such units, and budgets whose costs aren't known."""
        routed = [experts_in_block(block, model.config) is not None for block in self._blocks]
        names = units_of(model)
        without = [index for index, block in enumerate(self._blocks) if "channels" not in unit_linears(block, names)]
        amounts = self.mlp_channels if isinstance(self.mlp_channels, list) else []
        wrong = [index for index in without if amounts and amounts[index]]
        if wrong or (not amounts and self.mlp_channels and len(without) == len(self._blocks)):
            where = f"decoder block {wrong[0]}" if wrong else "every decoder block"
            raise UsageError(
                f"mlp_channels: {where} has routed experts only; give 0 there, and `expert_channels` for theirs, or "
                "remove whole experts with ExpertPruningModifier"
            )
        amounts = self.expert_channels if isinstance(self.expert_channels, list) else []
        wrong = [index for index, amount in enumerate(amounts) if amount and not routed[index]]
        if wrong or (not amounts and self.expert_channels and not any(routed)):
            where = f"decoder block {wrong[0]}" if wrong else f"{type(model).__name__}"
            raise UsageError(f"expert_channels: {where} has no routed experts; give 0 there, and `mlp_channels`")
        if any(routed) and self._ratio is not None and self.budget_of != "parameters":
            raise UsageError(
                f"budget_of {self.budget_of} isn't known for routed experts, of which each token takes a few; use "
                "`budget_of: parameters`, or give shares instead of a budget"
            )

    @property
    def blocks_left(self) -> int:
        """Decoder blocks that stay, known from its initialization on."""
        return self._blocks_left

    def _amount(self, unit: UnitTarget) -> Amount:
        amount: Amounts = getattr(self, FIELDS[unit.kind])
        return amount[unit.block] if isinstance(amount, list) else amount

    # ---- what a run takes

    def _sweeps(self, clean: SweepPlan, noisy: SweepPlan) -> tuple[SweepPlan, ...]:
        return super()._sweeps(clean, noisy) if self._targets else (noisy,)

    def _statistics_bytes(self, noisy: SweepPlan) -> int:
        return super()._statistics_bytes(noisy) if self._targets else 0

    # ---- calibration

    def _calibrate_and_prune(self, engine: PassEngine) -> None:
        before = _described(engine.model)
        number = len(self._blocks) - self._blocks_left
        if number:
            title = self._title("choosing blocks")
            self._gone = least_influential(
                self._distance(engine), self._blocks, number, self.search_budget, title=title
            )
        if self._targets:
            passes = self._weighted_passes(engine)
            if self.allocation != "uniform":
                self._choose_widths(engine, passes)
            # A block that goes has nothing to be adapted.
            self._targets = [target for target in self._targets if target.block not in self._gone]
            self._prune_in_one_sweep(engine, passes, propagate=True, two_streams=self.target == "dense")
        remove_units(engine.model, self._units, self._kept, self._gone, earlier=self._earlier, later=self._later)
        self._summary = f"{before} → {_described(engine.model)}"

    def _prune_block(
        self, block: OnloadedBlock, targets: Sequence[PruningTarget], *, advance_dense: bool, last: bool
    ) -> None:
        if block.index not in self._gone:
            super()._prune_block(block, targets, advance_dense=advance_dense, last=last)
            return
        module = self._blocks[block.index]
        dense = _whole if self.target == "dense" else None
        block.run(lambda *_pass: skipped(module), dense=dense, advance=True)

    def _prune(self, targets: Sequence[PruningTarget], leaders: dict[str, str]) -> None:
        super()._prune(targets, leaders)
        for target in targets:
            # Whoever solved knows them.
            found = distributed.gather_objects(self._kept.get(target.name))
            self._kept[target.name] = next(units for units in found if units is not None)

    def _solver(self, leader: str, statistics: list[torch.Tensor], device: torch.device) -> Solver:
        H, drift = self._second_moments(statistics, device)
        hessian = prepare_hessian(H, self.dampening_frac, leader, drift=drift, invertible=self.score == "obs")
        self._report_dampening(leader, hessian.dampening_frac)
        group = next(unit.group for unit in self._units if unit.name == leader)

        def solve(W: torch.Tensor, _sparsity: float) -> tuple[torch.Tensor, float]:
            kept = choose_units(W, hessian, group, self._widths[leader], self.score)
            self._kept[leader] = kept
            columns = group.columns(kept)
            # Columns that go are zero for now: the block computes what the smaller one will.
            return without_columns(W, columns, hessian, compensate=self.compensate, fixed_zeros=self._fixed_zeros(W))

        return solve

    def _sparsity_of(self, target: PruningTarget) -> float:
        group = next(unit.group for unit in self._units if unit.target is target)
        return 1.0 - self._widths[target.name] / group.total

    def _log_summary(self, seconds: float) -> None:
        logger.info(f"{type(self).__name__}: {self._summary}, {seconds:.1f} s")


def _whole(*_pass: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _described(model: torch.nn.Module) -> str:
    sizes = block_sizes(model)
    # None where all of a mixture's experts are routed.
    channels = [each.common_channels for each in sizes if each.common_channels]
    heads = [each.attention_heads for each in sizes]
    with disable_onloading():
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    what = f"{_range(channels)} channels and {_range(heads)} heads" if channels else f"{_range(heads)} heads"
    experts = [each.mlp_channels for each in sizes if each.experts]
    what += f", experts of {_range(experts)} channels" if experts else ""
    return f"{len(sizes)} blocks of {what}, {parameters:.1f} M parameters"


def _range(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"

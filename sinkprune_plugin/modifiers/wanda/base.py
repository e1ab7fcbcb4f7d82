"""Sink-aware Wanda as an llm-compressor modifier."""

import torch
from loguru import logger
from pydantic import PrivateAttr

from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.base import SinkAwareModifierBase
from sinkprune_plugin.modifiers.block_runner import BlockRunner
from sinkprune_plugin.modifiers.calibration import CalibrationBatch, forward
from sinkprune_plugin.modifiers.input_observer import InputObserver
from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.modifiers.wanda.wanda_sparsify import (
    NEGLIGIBLE_MASK,
    InputStatistics,
    observe_input,
    sparsify_weight,
    weighted_square_sums,
)

__all__ = ["SinkAwareWandaModifier"]

# Memory for the rows that are set aside in one pass. Fixed rather than a share of what is free: the number of rows
# decides the order of float operations, and the same recipe has to give the same mask on every machine.
SET_ASIDE_BYTES = 2 * 2**30
SET_ASIDE_MINIMUM = 32


class SinkAwareWandaModifier(SinkAwareModifierBase):
    """Prune a diffusion LM with Wanda on activation norms that leave out attention sinks.

    Paper: Sink-Aware Pruning for Diffusion Language Models, https://arxiv.org/abs/2602.17664

    Sample yaml:

    ```yaml
    prune_stage:
      prune_modifiers:
        SinkAwareWandaModifier:
          sparsity: 0.5
          mask_structure: "2:4"
          targets: ["Linear"]
          sink_scope: all
    ```

    Lifecycle:

    - on_initialize: resolve family and targets, validate
    - on_calibration_start
        - for every sample and timestep: corrupt, run the model once, gather attention mass and sums of squares,
          correct them with the soft sink mask once it is known
        - sum over ranks, prune all targets
        - with ``propagate_error``: find the sinks first, then gather and prune block by block
    - on_finalize: remove hooks

    Further fields: see :class:`SinkAwareModifierBase`. With ``timestep_weighting: uniform`` the activation norm of a
    feature is the published sum of norms over samples and timesteps; ``inverse`` and ``inverse_square`` take the root
    of the weighted sum of squares.

    :param propagate_error: block by block, so that later blocks are scored on the outputs of pruned ones; False scores
        every layer on the dense model, as published
    """

    propagate_error: bool = False

    # By leader, over samples and timesteps: Σ ‖(1 − m) ⊙ X_j‖ as published; Σ ‖…‖² / t^p where timesteps are weighted.
    _norms: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
    _passes: int = PrivateAttr(default=0)
    _reruns: int = PrivateAttr(default=0)

    def _calibrate_and_prune(self, model: torch.nn.Module) -> None:
        if self.propagate_error:
            runner = BlockRunner(self._blocks)
            masks = self._soft_masks(model, runner)
            passes = [
                (
                    batch,
                    self._noisy_ids(batch, step_index, timestep),
                    self._row_scale(timestep) * self._token_weights(mask[:, step_index], batch),
                )
                for batch, mask in zip(self._batches, masks, strict=True)
                for step_index, timestep in enumerate(self._grid)
            ]
            self._prune_block_by_block(model, runner, passes)
        else:
            leaders = self._one_pass_norms(model)
            self._prune(self._targets, leaders)

    # ---- one pass: the mask corrects the statistics afterwards

    def _one_pass_norms(self, model: torch.nn.Module) -> dict[str, str]:
        one_pass = _OnePass(self, model)
        handles = one_pass.observer.attach(self.register_hook)
        for batch in self._progress(self._batches, "calibrating"):
            waiting: list[dict[str, InputStatistics]] = []
            masks: list[torch.Tensor] = []
            for step_index, timestep in enumerate(self._grid):
                noisy_ids = self._noisy_ids(batch, step_index, timestep)
                statistics, mass = one_pass.run(noisy_ids, batch)
                mask = self._mask_of(mass, batch)
                self._passes += 1
                if not all(entry.covers(mask) for entry in statistics.values()):
                    # Now the sinks are known, so the second run sets aside exactly them.
                    self._reruns += 1
                    statistics, _ = one_pass.run(noisy_ids, batch, chooser=mask)
                masks.append(mask)
                if self.sink_scope == "all":
                    self._add_norms(statistics, mask, timestep, batch)
                else:
                    valid = batch.valid if batch.valid is None else batch.valid.to(mask.device)
                    waiting.append({name: entry.keep_only(mask, valid) for name, entry in statistics.items()})
            stacked = torch.stack(masks, dim=1)
            self._tally.add(stacked)
            # Which sinks persist is known only after the last timestep.
            in_scope = self._in_scope(stacked)
            for step_index, statistics in enumerate(waiting):
                self._add_norms(statistics, in_scope[:, step_index], self._grid[step_index], batch)
        self.remove_hooks(handles)
        self._require_reached(one_pass.observer)
        if self._reruns:
            logger.info(
                f"SinkAwareWandaModifier: {self._reruns} of {self._passes} passes were run again because a sink was "
                "not among the rows set aside"
            )
        return one_pass.observer.leaders

    def _add_norms(
        self,
        statistics: dict[str, InputStatistics],
        mask: torch.Tensor,
        timestep: float,
        batch: CalibrationBatch,
    ) -> None:
        weights = self._row_scale(timestep) * self._token_weights(mask, batch)
        for leader, entry in statistics.items():
            self._add(leader, entry.square_sums(weights), batch)

    # ---- block by block: the mask is known before

    def _observe_weighted(self, leader: str, x: torch.Tensor, weights: torch.Tensor, batch: CalibrationBatch) -> None:
        self._add(leader, weighted_square_sums(x, weights), batch)

    @property
    def _sums_norms(self) -> bool:
        """The published statistic is a sum of norms; weights 1/t and 1/t² are defined on sums of squares."""
        return self.timestep_weighting == "uniform"

    def _add(self, leader: str, square_sums: torch.Tensor, batch: CalibrationBatch) -> None:
        """Add the statistics of a batch.

        :param leader: name of the target
        :param square_sums: (B, C) float32, one vector a sample
        :param batch: where they come from
        """
        if not bool(torch.isfinite(square_sums).all()):
            raise UsageError(
                f"the input of {leader} in calibration batch {batch.index} has NaN or Inf; check the checkpoint or "
                "load it with dtype float32"
            )
        # Sums of thousands of terms, kept in float64 on the host: equal for one and for many processes.
        terms = square_sums.sqrt() if self._sums_norms else square_sums
        total = terms.to(device="cpu", dtype=torch.float64).sum(dim=0)
        self._norms[leader] = self._norms[leader] + total if leader in self._norms else total

    def _prune(self, targets: list[PruningTarget], leaders: dict[str, str]) -> None:
        used = sorted({leaders[target.name] for target in targets})
        distributed.sum_over_ranks(self._norms[leader] for leader in used)
        for target in targets:
            norms = self._norms[leaders[target.name]]
            norms = norms if self._sums_norms else norms.sqrt()
            sparsity = self._sparsity_of(target)
            self._replace_weight(
                target,
                lambda W, norms=norms, s=sparsity: (sparsify_weight(W, norms, s, self._structure), None),
            )
        for leader in used:
            del self._norms[leader]

    def _extra_summary(self) -> str:
        return "" if self.propagate_error else f"{self._reruns} of {self._passes} passes run again, "


class _OnePass:
    """One forward pass that yields attention mass and, for each distinct Linear input, its statistics."""

    def __init__(self, modifier: SinkAwareWandaModifier, model: torch.nn.Module) -> None:
        self.observer = InputObserver(modifier._targets, self._on_input)
        self._modifier = modifier
        self._model = model

    def run(
        self, noisy_ids: torch.Tensor, batch: CalibrationBatch, chooser: torch.Tensor | None = None
    ) -> tuple[dict[str, InputStatistics], torch.Tensor]:
        """Run the model.

        :param noisy_ids: (B, T) int64
        :param batch: the clean samples
        :param chooser: (B, T) final sink mask, if it is known already; otherwise the running mass chooses
        :return: statistics by leader, and the attention mass (B, T) float32 (empty if ``chooser`` was given)
        """
        self._statistics: dict[str, InputStatistics] = {}
        self._early: list[tuple[str, torch.Tensor]] = []
        self._batch = batch
        self._chooser = chooser
        self._rows = self._affordable_rows(len(noisy_ids))
        self.observer.begin(*noisy_ids.shape)
        if chooser is not None:
            self._rows = int((chooser > NEGLIGIBLE_MASK).sum(dim=1).max())
            forward(self._model, noisy_ids, batch.valid)
            mass = chooser
        else:
            with self._modifier._capture(self._model, batch) as self._capture:
                forward(self._model, noisy_ids, batch.valid)
            mass = self._capture.mass
        self._settle_early(mass)
        self.observer.end()
        return self._statistics, mass

    def _affordable_rows(self, batch_size: int) -> int:
        """Positions whose rows fit the budget, over all targets; Linears that share an input are counted each."""
        row_bytes = sum(
            target.module.in_features * target.module.weight.element_size() for target in self._modifier._targets
        )
        return max(SET_ASIDE_MINIMUM, SET_ASIDE_BYTES // (batch_size * row_bytes))

    def _on_input(self, leader: str, x: torch.Tensor) -> None:
        if self._chooser is not None:
            # A copy: the first run may have failed because the model writes into its inputs.
            self._keep(leader, x.clone(), self._chooser)
        elif self._capture.layers:
            mass = self._capture.mass
            self._settle_early(mass)
            self._keep(leader, x, mass)
        else:
            # Before the first attention call nothing is known of the sinks, so this input waits for it.
            self._early.append((leader, x))

    def _settle_early(self, mass: torch.Tensor) -> None:
        for leader, x in self._early:
            self._keep(leader, x, mass)
        self._early.clear()

    def _keep(self, leader: str, x: torch.Tensor, mass: torch.Tensor) -> None:
        valid = self._batch.valid
        if valid is not None:
            valid = valid.to(x.device)
        self._statistics[leader] = observe_input(x, mass.to(x.device), valid, self._rows)

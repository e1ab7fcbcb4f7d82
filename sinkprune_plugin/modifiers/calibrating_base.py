"""What all calibrating modifiers share: lifecycle, the passes along the trajectory, and the sinks in them."""

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from compressed_tensors.offload import disable_onloading
from llmcompressor.core import Event, State
from loguru import logger
from pydantic import PrivateAttr

from sinkprune_plugin.diffusion import resolve_diffusion
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.calibration import CalibrationBatch, calibration_context, collect_batches
from sinkprune_plugin.modifiers.fields import SinkAwareFields
from sinkprune_plugin.modifiers.finite_check import FiniteCheck
from sinkprune_plugin.modifiers.hidden_states import check_room
from sinkprune_plugin.modifiers.passes import CalibrationPass, PassEngine, Watch
from sinkprune_plugin.modifiers.run_estimate import RunEstimate, SweepPlan, brought_in_bytes, hidden_state_bytes
from sinkprune_plugin.modifiers.saving import choose_save_format, chosen_save_format
from sinkprune_plugin.modifiers.sink_sweep import SinkTally, sweep_attention
from sinkprune_plugin.modifiers.targets import PruningTarget
from sinkprune_plugin.modifiers.trajectory import (
    CorruptionSource,
    TrajectoryCorruption,
    corrupted_passes,
    spec_of,
    window_copies,
)
from sinkprune_plugin.sinks import soft_sink_mask, transient_sink_mask

__all__ = ["CalibratingModifierBase"]


class CalibratingModifierBase(SinkAwareFields):
    """Abstract base of the modifiers that calibrate along the denoising trajectory.

    The calibration of a diffusion LM is not one pass over clean data but passes over corrupted data at several
    timesteps, with the sinks known only after the last layer. So the modifier tells the pipeline that it needs no data
    pass and runs its own passes at calibration start, over the loader in ``state.data.calib``.

    Fields: see :class:`SinkAwareFields`.
    """

    makes_smaller: ClassVar[bool] = False
    """Whether modules are removed, so that the result has no zeros of its own."""

    # Linears whose weights change, if these are what is pruned.
    _targets: list[PruningTarget] = PrivateAttr(default_factory=list)
    _blocks: torch.nn.ModuleList = PrivateAttr()
    _batches: list[CalibrationBatch] = PrivateAttr(default_factory=list)
    _corruption: CorruptionSource | None = PrivateAttr(default=None)
    _tally: SinkTally = PrivateAttr()
    _finite: FiniteCheck = PrivateAttr(default_factory=FiniteCheck)
    _done: bool = PrivateAttr(default=False)

    # ---- lifecycle

    def on_initialize(self, state: State, **_kwargs: Any) -> bool:
        """Find what is to be pruned, and check that there is data.

        :param state: session state with the model and, in ``data.calib``, the calibration loader
        :return: True
        :raises UsageError: if the model or the targets don't fit, or there is no data
        """
        model = state.model
        distributed.use_own_device()
        if self._corruption is None:
            spec = resolve_diffusion(model.config, mask_token_id=self.mask_token_id)
            self._corruption = TrajectoryCorruption(spec, self.seed, self.noise_eps)
        self._find_targets(model)
        if state.data.calib is None:
            collect_batches(None)
        return True

    def on_calibration_start(self, state: State, event: Event, **_kwargs: Any) -> None:  # noqa: ARG002
        """Run all calibration passes and prune.

        :param state: session state
        :param event: the event that started calibration
        :raises UsageError: if the data is unusable, attention can't be observed, a target is never reached,
            activations aren't finite, or the hidden states don't fit
        """
        if self._done:
            return
        started = time.monotonic()
        # An earlier modifier of the recipe may have removed blocks.
        self._find_targets(state.model)
        self._batches = collect_batches(state.data.calib, self.seed, spec_of(self._corruption))
        self._tally = SinkTally(self.sink_persistence)
        engine = PassEngine(
            state.model, self._blocks, hidden_states=self.hidden_states, progress=distributed.rank() == 0
        )
        tokens = sum(batch.input_ids.numel() for batch in self._batches)
        estimate = self.estimate(state.model, len(self._batches), tokens)
        logger.info(f"{type(self).__name__}: {estimate}")
        self._check_room(state.model, estimate)
        try:
            with calibration_context(state.model):
                self._calibrate_and_prune(engine)
        finally:
            self.remove_hooks()
        self._done = True
        self._log_summary(time.monotonic() - started)
        self._batches = []

    def estimate(self, model: torch.nn.Module, num_batches: int, tokens: int) -> RunEstimate:
        """What a calibration will take; nothing is run, so the model may be on the meta device.

        :param model: model to prune
        :param num_batches: batches of samples
        :param tokens: tokens of all samples, padding included
        :return: the estimate
        :raises UsageError: if the targets don't fit the model
        """
        if not self._targets:
            self._find_targets(model)
        clean, copies = SweepPlan(num_batches, tokens), window_copies(self._corruption)
        noisy = SweepPlan(num_batches * len(self._grid), tokens * len(self._grid) * copies)
        sweeps = self._sweeps(clean, noisy)
        # Only the sizes of weights are read, which must not onload them.
        with disable_onloading():
            return RunEstimate(
                sweeps,
                len(self._blocks),
                hidden_bytes=hidden_state_bytes(
                    model, max((sweep.tokens * sweep.streams for sweep in sweeps), default=0)
                ),
                statistics_bytes=self._statistics_bytes(noisy),
                brought_in_bytes=brought_in_bytes(model, self._blocks, len(sweeps)),
            )

    def _check_room(self, model: torch.nn.Module, estimate: RunEstimate) -> None:  # noqa: ARG002
        # Before the first pass.
        check_room(estimate.hidden_bytes, self.hidden_states)

    def on_finalize(self, state: State, **_kwargs: Any) -> bool:
        """Drop hooks and references, and settle what saving the model will write.

        :param state: session state
        :return: True
        :raises UsageError: if calibration never started, so that nothing was pruned
        """
        self.remove_hooks()
        if not self._done:
            raise UsageError(
                f"{type(self).__name__} pruned nothing because the pipeline never started calibration; run it through "
                "oneshot() with the default pipeline"
            )
        self._targets = []
        if self.makes_smaller and "save_format" not in self.model_fields_set:
            # A smaller model is dense; what another modifier of the recipe made sparse is saved as that one said.
            self.__dict__["save_format"] = chosen_save_format(state.model) or "dense"
        choose_save_format(state.model, self.save_format)
        return True

    # ---- for the subclasses

    @abstractmethod
    def _find_targets(self, model: torch.nn.Module) -> None:
        """Set what is pruned and the decoder blocks; refuses a model that has none."""

    @abstractmethod
    def _log_summary(self, seconds: float) -> None:
        """Log one line about what was done.

        :param seconds: that it took
        """

    @abstractmethod
    def _calibrate_and_prune(self, engine: PassEngine) -> None:
        """Find the sinks, gather statistics and prune every target."""

    @abstractmethod
    def _sweeps(self, clean: SweepPlan, noisy: SweepPlan) -> tuple[SweepPlan, ...]:
        """What :meth:`_calibrate_and_prune` will do.

        :param clean: one sweep of the clean samples
        :param noisy: one sweep of the samples at every timestep
        :return: the sweeps, in order
        """

    @abstractmethod
    def _statistics_bytes(self, noisy: SweepPlan) -> int:
        """Most bytes of statistics that are held at once, on the device."""

    # ---- sinks

    def _find_sinks(
        self, engine: PassEngine, passes: Sequence[CalibrationPass], watch: Watch | None = None
    ) -> list[torch.Tensor]:
        """Sinks of the unpruned model for every batch and timestep.

        :param engine: the engine
        :param passes: the corrupted passes, all timesteps of a batch one after the other
        :param watch: context that is entered around each pass
        :return: one (B, S, T) float32 mask for each batch, 0 where ``sink_scope`` spares the position
        """
        with distributed.failing_together():
            masses = sweep_attention(
                engine, passes, len(passes) * len(self._blocks), title=self._title("finding sinks"), watch=watch
            )
        masks = []
        for first in range(0, len(passes), len(self._grid)):
            mass = torch.stack(masses[first : first + len(self._grid)], dim=1)
            # Of the pass, which may hold clean context as well.
            valid = passes[first].valid
            valid = None if valid is None else valid.to(mass.device).unsqueeze(1).expand_as(mass)
            mask = soft_sink_mask(mass, self.sink_std, self.sink_alpha, valid=valid)
            self._tally.add(mask)
            masks.append(transient_sink_mask(mask, self.sink_persistence) if self.sink_scope == "transient" else mask)
        return masks

    def _corrupted_passes(self) -> list[CalibrationPass]:
        assert self._corruption is not None  # set in on_initialize
        return corrupted_passes(self._batches, self._grid, self._corruption)

    def _title(self, what: str) -> str:
        return f"{type(self).__name__}: {what}"

"""What both sink-aware modifiers share: fields, validation, lifecycle and the block-by-block pass."""

import time
from abc import abstractmethod
from typing import Any, Literal

import torch
import tqdm
from compressed_tensors.utils import align_module_device, update_offload_parameter
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.utils.metric_logging import CompressionLogger
from loguru import logger
from pydantic import Field, PrivateAttr, field_validator, model_validator

from sinkprune_plugin.devices import input_device
from sinkprune_plugin.diffusion import resolve_diffusion, timestep_grid, timestep_row_scale
from sinkprune_plugin.errors import UsageError
from sinkprune_plugin.modifiers import distributed
from sinkprune_plugin.modifiers.block_runner import BlockRunner
from sinkprune_plugin.modifiers.calibration import (
    CalibrationBatch,
    CorruptionSource,
    SinkTally,
    TrajectoryCorruption,
    calibration_context,
    collect_batches,
    forward,
)
from sinkprune_plugin.modifiers.input_observer import InputObserver
from sinkprune_plugin.modifiers.kept_zeros import KeptZeros
from sinkprune_plugin.modifiers.mask_structure import MaskStructure, parse_mask_structure, resolve_sparsity
from sinkprune_plugin.modifiers.saving import choose_save_format
from sinkprune_plugin.modifiers.targets import PruningTarget, resolve_targets
from sinkprune_plugin.sinks import capture_attention_mass, soft_sink_mask, transient_sink_mask

__all__ = ["SinkAwareModifierBase"]

PRUNABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Fields of llm-compressor's own pruning modifiers that have no meaning here, each with the way out.
REFUSED_FIELDS = {
    "sparsity_profile": "OWL derives layer sparsities from clean activations, which the corrupted passes don't have; "
    "give `sparsity` a list with one value for each decoder block",
    "owl_m": "OWL is not supported; give `sparsity` a list with one value for each decoder block",
    "owl_lmbda": "OWL is not supported; give `sparsity` a list with one value for each decoder block",
    "sequential_update": "it is deprecated; `propagate_error` says whether later blocks see pruned outputs",
    "preserve_sparsity_mask": "existing zeros are not pinned; prune the dense model at the final sparsity",
}


class SinkAwareModifierBase(Modifier):
    """Abstract base of the sink-aware modifiers.

    The calibration of a diffusion LM is not one pass over clean data but passes over corrupted data at several
    timesteps, with the sinks known only after the last layer. So the modifier tells the pipeline that it needs no data
    pass and runs its own passes at calibration start, over the loader in ``state.data.calib``.

    :param sparsity: share of zeros in (0, 1), one value or one for each decoder block; may be left out for N:M
    :param mask_structure: ``"0:0"`` for unstructured, ``"N:M"`` for N zeros in every M consecutive input columns
    :param targets: module class names, names or ``re:`` patterns; class names reach into decoder blocks only
    :param ignore: the same, for modules to leave alone
    :param diffusion_steps: S, steps of the denoising grid
    :param sample_interval: calibrate at every k-th step of the grid
    :param noise_eps: floor of the mask probability, p = (1 − eps) t + eps
    :param sink_std: standard deviations above the mean attention mass at which a sink begins
    :param sink_alpha: steepness of the soft sink mask, per unit of attention mass
    :param sink_scope: ``all`` suppresses every sink found at a timestep, ``transient`` spares persistent positions
    :param sink_persistence: mean mask over the timesteps from which a position counts as persistent
    :param timestep_weighting: weight of a timestep's rows in sums of squares: 1, 1/t or 1/t²
    :param mask_token_id: mask token, where neither config nor family tells it
    :param seed: seed of the corruption, and of the choice among the samples of a loader that shuffles
    :param save_format: what ``save_pretrained`` writes from now on: ``auto`` takes sparse-24-bitmask where every target
        is 2:4, else sparse-bitmask where that is smaller, else dense
    """

    # Left out of saved recipes: it tells the pipeline something, not the user.
    requires_calibration_data: bool = Field(default=False, exclude=True)

    sparsity: float | list[float] | None = None
    mask_structure: str = "0:0"
    targets: str | list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=list)
    diffusion_steps: int = 50
    sample_interval: int = 5
    noise_eps: float = Field(default=1e-3, ge=0.0, lt=1.0)
    sink_std: float = 2.0
    sink_alpha: float = Field(default=5.0, gt=0.0)
    sink_scope: Literal["all", "transient"] = "all"
    sink_persistence: float = Field(default=0.5, ge=0.0, le=1.0)
    timestep_weighting: Literal["uniform", "inverse", "inverse_square"] = "uniform"
    mask_token_id: int | None = None
    seed: int = 0
    save_format: Literal["auto", "dense", "sparse-bitmask", "sparse-24-bitmask"] = "auto"

    _structure: MaskStructure = PrivateAttr()
    _grid: tuple[float, ...] = PrivateAttr()
    _targets: list[PruningTarget] = PrivateAttr(default_factory=list)
    _blocks: torch.nn.ModuleList = PrivateAttr()
    _batches: list[CalibrationBatch] = PrivateAttr(default_factory=list)
    _corruption: CorruptionSource | None = PrivateAttr(default=None)
    _tally: SinkTally = PrivateAttr()
    _kept_zeros: KeptZeros = PrivateAttr()
    _done: bool = PrivateAttr(default=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_foreign_fields(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, reason in REFUSED_FIELDS.items():
                if values.get(name) is not None:
                    raise UsageError(f"{cls.__name__} doesn't support `{name}`: {reason}")
        return values

    @field_validator("targets", mode="after")
    @classmethod
    def _list_targets(cls, value: str | list[str]) -> list[str]:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_fields(self) -> "SinkAwareModifierBase":
        self._structure = parse_mask_structure(self.mask_structure)
        # Plain assignment would run validation again.
        self.__dict__["sparsity"] = resolve_sparsity(self.sparsity, self._structure)
        self._grid = timestep_grid(self.diffusion_steps, self.sample_interval)
        if self.save_format == "sparse-24-bitmask" and not self._structure.implies_2_of_4:
            raise UsageError(
                f"save_format sparse-24-bitmask needs mask_structure 2:4, not {self._structure}; use "
                "`save_format: auto` or sparse-bitmask"
            )
        return self

    # ---- lifecycle

    def on_initialize(self, state: State, **_kwargs: Any) -> bool:
        """Check everything that can be checked before the first pass.

        :param state: session state with the model and, in ``data.calib``, the calibration loader
        :return: True
        :raises UsageError: if the model, the targets or the data don't fit
        """
        model = state.model
        self._kept_zeros = KeptZeros(type(self).__name__, self._later_modifiers())
        if self._corruption is None:
            spec = resolve_diffusion(model.config, mask_token_id=self.mask_token_id)
            self._corruption = TrajectoryCorruption(spec, self.seed, self.noise_eps)
        self._targets, self._blocks = resolve_targets(model, list(self.targets), self.ignore)
        for target in self._targets:
            weight = target.module.weight
            if weight.dtype not in PRUNABLE_DTYPES:
                raise UsageError(
                    f"{target.name} has {weight.dtype} weights; prune before quantizing, or add it to `ignore`"
                )
            self._structure.check_columns(target.name, target.module.in_features)
        if isinstance(self.sparsity, list) and len(self.sparsity) != len(self._blocks):
            raise UsageError(
                f"sparsity has {len(self.sparsity)} values, but the model has {len(self._blocks)} decoder blocks; "
                "give one value, or one value for each block"
            )
        if state.data.calib is None:
            collect_batches(None)
        return True

    def on_calibration_start(self, state: State, event: Event, **_kwargs: Any) -> None:  # noqa: ARG002
        """Run all calibration passes and prune.

        :param state: session state
        :param event: the event that started calibration
        :raises UsageError: if the data is unusable, attention can't be observed, a target is never reached or
            activations aren't finite
        """
        if self._done:
            return
        started = time.monotonic()
        self._batches = collect_batches(state.data.calib, self.seed)
        self._tally = SinkTally(self.sink_persistence)
        head = getattr(state.model, "get_output_embeddings", lambda: None)()
        head_is_target = any(target.module is head for target in self._targets)
        try:
            with calibration_context(state.model, head_is_target=head_is_target):
                self._calibrate_and_prune(state.model)
        finally:
            self.remove_hooks()
        self._done = True
        self._log_summary(time.monotonic() - started)
        self._batches = []

    def on_finalize(self, state: State, **_kwargs: Any) -> bool:
        """Drop hooks and references, and settle what saving the model will write.

        :param state: session state
        :return: True
        :raises UsageError: if calibration never started, so that nothing was pruned
        """
        self.remove_hooks()
        self._kept_zeros.finish()
        if not self._done:
            raise UsageError(
                f"{type(self).__name__} pruned nothing because the pipeline never started calibration; run it through "
                "oneshot() with the default pipeline"
            )
        self._targets = []
        choose_save_format(state.model, self.save_format)
        return True

    def _later_modifiers(self) -> list[Modifier]:
        modifiers = active_session().lifecycle.recipe.modifiers
        positions = [index for index, modifier in enumerate(modifiers) if modifier is self]
        return modifiers[positions[0] + 1 :] if positions else []

    # ---- for the subclasses

    @abstractmethod
    def _calibrate_and_prune(self, model: torch.nn.Module) -> None:
        """Gather statistics and prune every target."""

    def _observe_weighted(self, leader: str, x: torch.Tensor, weights: torch.Tensor, batch: CalibrationBatch) -> None:
        """Add one input to the statistics, in the block-by-block pass.

        :param leader: name of the target that the input belongs to
        :param x: (B, T, C) input
        :param weights: (B, T) float32 token weights, 0 on padding
        :param batch: where the input comes from
        """
        raise NotImplementedError

    def _prune(self, targets: list[PruningTarget], leaders: dict[str, str]) -> None:
        """Prune targets whose statistics are complete.

        :param targets: the targets
        :param leaders: target name → name under which its statistics were gathered
        """
        raise NotImplementedError

    # ---- passes

    def _soft_masks(self, model: torch.nn.Module, runner: BlockRunner | None) -> list[torch.Tensor]:
        """Sinks of the unpruned model for every batch and timestep.

        :param model: the model
        :param runner: records the first block's corrupted inputs on the way, in (batch, timestep) order
        :return: one (B, S, T) float32 mask a batch, on CPU, 0 where ``sink_scope`` spares the position
        """
        masks = []
        for batch in self._progress(self._batches, "finding sinks"):
            steps = []
            for step_index, timestep in enumerate(self._grid):
                noisy_ids = self._noisy_ids(batch, step_index, timestep)

                def run_model(noisy_ids: torch.Tensor = noisy_ids, batch: CalibrationBatch = batch) -> None:
                    forward(model, noisy_ids, batch.valid)

                with self._capture(model, batch) as capture:
                    if runner is None:
                        run_model()
                    else:
                        runner.record(run_model, whole_model=True)
                steps.append(self._mask_of(capture.mass, batch).cpu())
            stacked = torch.stack(steps, dim=1)
            self._tally.add(stacked)
            masks.append(self._in_scope(stacked))
        return masks

    def _prune_block_by_block(
        self,
        model: torch.nn.Module,
        runner: BlockRunner,
        passes: list[tuple[CalibrationBatch, torch.Tensor, torch.Tensor]],
    ) -> None:
        """Gather statistics of a block, prune it, pass its outputs on; then the targets outside of blocks.

        :param model: the model
        :param runner: holds the first block's inputs, one for each entry of ``passes``
        :param passes: batch, input ids (B, T) and token weights (B, T) of each pass
        """
        for index in self._progress(range(len(self._blocks)), "pruning blocks"):
            targets = [target for target in self._targets if target.block == index]
            if targets:

                def run_block(observer: InputObserver, index: int = index) -> None:
                    for number in runner.run(index, keep=False):
                        self._announce(observer, passes[number])

                self._observe_and_prune(targets, run_block)
            for _ in runner.run(index, keep=True):
                pass
        outside = [target for target in self._targets if target.block is None]
        if outside:

            def run_whole(observer: InputObserver) -> None:
                for entry in passes:
                    self._announce(observer, entry)
                    forward(model, entry[1], entry[0].valid)

            self._observe_and_prune(outside, run_whole)

    def _observe_and_prune(self, targets: list[PruningTarget], run: Any) -> None:
        observer = InputObserver(targets, self._on_input)
        handles = observer.attach(self.register_hook)
        run(observer)
        observer.end()
        self.remove_hooks(handles)
        self._require_reached(observer)
        self._prune(targets, observer.leaders)

    def _announce(self, observer: InputObserver, entry: tuple[CalibrationBatch, torch.Tensor, torch.Tensor]) -> None:
        batch, input_ids, weights = entry
        observer.begin(*input_ids.shape)
        self._current = (batch, weights)

    _current: tuple[CalibrationBatch, torch.Tensor] = PrivateAttr()

    def _on_input(self, leader: str, x: torch.Tensor) -> None:
        batch, weights = self._current
        self._observe_weighted(leader, x, weights.to(x.device), batch)

    # ---- pieces

    def _noisy_ids(self, batch: CalibrationBatch, step_index: int, timestep: float) -> torch.Tensor:
        assert self._corruption is not None  # set in on_initialize
        return self._corruption(batch, step_index, timestep)

    def _capture(self, model: torch.nn.Module, batch: CalibrationBatch) -> Any:
        valid = None if batch.valid is None else batch.valid.to(input_device(model))
        return capture_attention_mass(valid=valid)

    def _mask_of(self, mass: torch.Tensor, batch: CalibrationBatch) -> torch.Tensor:
        if not bool(torch.isfinite(mass).all()):
            raise UsageError(
                f"the attention mass of calibration batch {batch.index} is not finite; check the checkpoint, or "
                "load it with dtype float32"
            )
        valid = None if batch.valid is None else batch.valid.to(mass.device)
        return soft_sink_mask(mass, self.sink_std, self.sink_alpha, valid=valid)

    def _in_scope(self, masks: torch.Tensor) -> torch.Tensor:
        return transient_sink_mask(masks, self.sink_persistence) if self.sink_scope == "transient" else masks

    def _token_weights(self, mask: torch.Tensor, batch: CalibrationBatch) -> torch.Tensor:
        weights = 1.0 - mask
        return weights if batch.valid is None else weights * batch.valid.to(weights.device)

    def _row_scale(self, timestep: float) -> float:
        return timestep_row_scale(timestep, self.timestep_weighting)

    def _sparsity_of(self, target: PruningTarget) -> float:
        if isinstance(self.sparsity, list):
            if target.block is None:
                raise UsageError(
                    f"{target.name} is outside the decoder blocks, where a list of block sparsities gives no value; "
                    "use one sparsity or drop the target"
                )
            return self.sparsity[target.block]
        assert self.sparsity is not None  # resolve_sparsity fills it
        return self.sparsity

    def _replace_weight(self, target: PruningTarget, prune: Any) -> None:
        """Write the pruned weight, also where the module is offloaded, and log time and loss as llm-compressor does."""
        with torch.no_grad(), align_module_device(target.module), CompressionLogger(target.module) as metrics:
            pruned, loss = prune(target.module.weight.detach())
            metrics.set_results(name=type(self).__name__, loss=loss)
        update_offload_parameter(target.module, "weight", pruned)
        self._kept_zeros.remember(target.name, target.module, pruned)
        self._zeros += int((pruned == 0).sum())
        self._weights += pruned.numel()

    _zeros: int = PrivateAttr(default=0)
    _weights: int = PrivateAttr(default=0)

    def _require_reached(self, observer: InputObserver) -> None:
        missing = observer.unreached()
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise UsageError(
                f"calibration never reached {len(missing)} target(s): {shown}; add them to `ignore` or calibrate on "
                "data that uses them"
            )

    def _progress(self, items: Any, what: str) -> Any:
        return tqdm.tqdm(
            items, desc=f"{type(self).__name__}: {what}", disable=None if distributed.rank() == 0 else True
        )

    def _log_summary(self, seconds: float) -> None:
        self._tally.reduce()
        counts = self._tally.sinks_per_timestep
        logger.info(
            f"{type(self).__name__}: {len(self._targets)} modules at sparsity {self._zeros / self._weights:.4f}, "
            f"{min(counts):.1f} to {max(counts):.1f} sinks per timestep, "
            f"{100 * self._tally.transient_share:.0f} % of them transient, {self._extra_summary()}{seconds:.1f} s"
        )

    def _extra_summary(self) -> str:
        return ""
